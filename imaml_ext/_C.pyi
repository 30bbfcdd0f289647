from collections.abc import Sequence

_Operand = tuple[int, int, Sequence[int]]  # slot, offset, strides
_Instruction = tuple[
    str, Sequence[int], Sequence[_Operand], Sequence[int], Sequence[float]
]  # name, sizes, operands, integers, scalars

def build_info() -> dict[str, str]: ...

class Program:
    """The work of one task, as a list of instructions on strided arrays; see csrc/cpu/program.h."""

    def __init__(
        self,
        dtype: str,
        arena: int,
        constants: Sequence[float],
        slots: Sequence[str],
        instructions: Sequence[_Instruction],
    ) -> None: ...
    @property
    def extents(self) -> list[int]: ...
    def run(self, tasks: int, pointers: Sequence[int], strides: Sequence[int]) -> None: ...
