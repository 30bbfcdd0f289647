"""Instructions on arrays."""

from dataclasses import dataclass

from imaml_ext.programs.arrays import Array


@dataclass(frozen=True, eq=False)
class Instruction:
    """An instruction of `_C.Program`: a loop nest over arrays.

    Attributes:
        name, integers, scalars: as in csrc/cpu/program_*.cpp.
        sizes: of the loops; () for a layer.
        arrays: the results, then the operands; one dimension per loop.
        written: the number of results.
    """

    name: str
    sizes: tuple[int, ...]
    arrays: tuple[Array, ...]
    integers: tuple[int, ...] = ()
    scalars: tuple[float, ...] = ()
    written: int = 1

    @property
    def results(self) -> tuple[Array, ...]:
        return self.arrays[: self.written]

    @property
    def operands(self) -> tuple[Array, ...]:
        return self.arrays[self.written :]
