"""From instructions on arrays to programs: fusion, and where each buffer lies in memory."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from imaml_ext.programs.arrays import Array, Buffer
from imaml_ext.programs.instruction import Instruction

_ALIGNMENT = 16  # elements: a cache line of float32


def without_unused(
    instructions: Sequence[Instruction], outputs: Iterable[Buffer]
) -> list[Instruction]:
    """The instructions that the outputs depend on."""
    needed = set(outputs)
    kept = []
    for each in reversed(instructions):
        if any(a.buffer in needed for a in each.results):
            needed.update(a.buffer for a in each.arrays)
            kept.append(each)
    return kept[::-1]


def with_fused_sums(
    instructions: Sequence[Instruction], outputs: Iterable[Buffer]
) -> list[Instruction]:
    """`add(matmul(a, b), c)` as one matrix product that starts from c."""
    uses = Counter(a.buffer for each in instructions for a in each.operands)
    uses.update(outputs)
    writer: dict[Buffer, int] = {}
    fused: list[Instruction | None] = []
    for each in instructions:
        if each.name == "add" and each.scalars == (1.0,):
            for product, other in (each.operands, each.operands[::-1]):
                at = writer.get(product.buffer, -1)
                if at < 0 or uses[product.buffer] > 1:
                    continue
                sum_ = _matmul_plus(fused[at], product, each.arrays[0], other)
                if sum_ is not None:
                    fused[at], each = None, sum_
                    break
        writer |= {a.buffer: len(fused) for a in each.results}
        fused.append(each)
    return [each for each in fused if each is not None]


def _matmul_plus(
    matmul: Instruction | None, product: Array, result: Array, other: Array
) -> Instruction | None:
    """An addition to a matrix product as one instruction.

    None if `matmul` is no plain matrix product, or if `product`, a view of its result, is only a
    part of it, or has merged its dimensions.
    """
    if matmul is None or matmul.name != "matmul" or len(matmul.arrays) > 3:
        return None
    if not product.size == product.buffer.size == result.size:
        return None
    kept = [d for d in range(len(matmul.sizes)) if d != len(matmul.sizes) - 1]
    own = matmul.arrays[0]
    order: list[int] = []  # dimension of `product` for each loop of the matmul
    for d in kept:
        if matmul.sizes[d] == 1:
            order.append(-1)
            continue
        found = [
            e for e in range(len(product.shape))
            if product.shape[e] == matmul.sizes[d] and product.strides[e] == own.strides[d]
        ]  # fmt: skip
        if len(found) != 1 or found[0] in order:
            return None
        order.append(found[0])
    if any(n > 1 and e not in order for e, n in enumerate(product.shape)):
        return None

    def strides(a: Array) -> tuple[int, ...]:
        return (*(0 if e < 0 else a.strides[e] for e in order), 0)

    sizes = matmul.sizes
    arrays = [replace(a, shape=sizes, strides=strides(a)) for a in (result, other)]
    return replace(matmul, arrays=(arrays[0], *matmul.operands, arrays[1]))


@dataclass(frozen=True)
class Assembled:
    """The arguments of `_C.Program`.

    Attributes:
        arena: elements of scratch memory.
        instructions: as in `_C.Program`.
        constants: its constants.
    """

    arena: int
    constants: list[float]
    instructions: list[Any]


def assemble(
    instructions: Sequence[Instruction],
    inputs: Sequence[Buffer],
    outputs: Sequence[Sequence[Buffer]],
) -> Assembled:
    """Place every buffer, and translate the instructions.

    Args:
        instructions: in order.
        inputs: the buffers of the slots 2, 3, ...
        outputs: for each of the following slots, the buffers that lie there one after another.
    """
    place: dict[Buffer, tuple[int, int]] = {buffer: (2 + k, 0) for k, buffer in enumerate(inputs)}
    for k, buffers in enumerate(outputs, 2 + len(inputs)):
        start = 0
        for buffer in buffers:
            place[buffer] = k, start
            start += rounded(buffer.size)
    instructions = _written_in_place(instructions, place)
    constants: dict[str, int] = {}
    values: list[float] = []
    arena = _Arena()
    last = {a.buffer: k for k, each in enumerate(instructions) for a in each.arrays}
    translated = []
    for k, each in enumerate(instructions):
        for a in each.arrays:
            if a.buffer.constant is not None:
                name = repr(a.buffer.constant)  # NaN differs from itself, -0.0 equals 0.0
                if name not in constants:
                    constants[name] = len(values)
                    values.append(a.buffer.constant)
                place[a.buffer] = 1, constants[name]
            elif a.buffer not in place:
                place[a.buffer] = 0, arena.take(a.buffer.size)
        for buffer in {a.buffer for a in each.arrays}:
            if place[buffer][0] == 0 and last[buffer] == k:
                arena.free(place[buffer][1], buffer.size)
        operands = []
        sizes, arrays = _with_few_loops(each)
        for a in arrays:
            slot, start = place[a.buffer]
            strides = a.strides[: len(sizes)]  # none of a layer, which is contiguous
            operands.append((slot, start + a.offset, list(strides)))
        translated.append(
            (each.name, list(sizes), operands, list(each.integers), list(each.scalars))
        )
    return Assembled(arena.size, values, translated)


def _with_few_loops(each: Instruction) -> tuple[Sequence[int], Sequence[Array]]:
    """The sizes and arrays of an instruction; without loops of size 1, if there are many."""
    if len(each.sizes) <= 6:
        return each.sizes, each.arrays
    kept = [k for k, n in enumerate(each.sizes) if n != 1]

    def chosen(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values[k] for k in kept)

    arrays = [replace(a, shape=chosen(a.shape), strides=chosen(a.strides)) for a in each.arrays]
    return chosen(each.sizes), arrays


def _written_in_place(
    instructions: Sequence[Instruction], place: Mapping[Buffer, tuple[int, int]]
) -> list[Instruction]:
    """Without copies of whole buffers: the copied buffer is written at its destination.

    A matrix product that starts from a buffer which nothing else reads is added to it in place.
    """
    written = {a.buffer for each in instructions for a in each.results}
    modified = {
        a.buffer for each in instructions if each.name.startswith("scatter") for a in each.results
    }
    moves = _Moves(instructions)
    kept = []
    for each in instructions:
        source, target = each.arrays[-1], each.arrays[0]
        free = source.buffer in written and source.buffer not in place
        if each.name == "copy" and free and target.buffer not in modified:
            if moves.add(source, target):
                continue
        elif (
            each.name == "matmul"
            and len(each.arrays) > 3
            and free
            and moves.reads[source.buffer] == 1
        ):
            moves.add(_without_sum(source), _without_sum(target))
        kept.append(each)
    return [_by_rows(replace(each, arrays=tuple(map(moves.apply, each.arrays)))) for each in kept]


def _without_sum(a: Array) -> Array:
    """An operand of a matrix product without the loop of the sum."""
    return replace(a, shape=a.shape[:-1], strides=a.strides[:-1])


class _Moves:
    """Buffers that become parts of others."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self._moves: dict[Buffer, _Move] = {}
        # How often each buffer is read, including buffers that were moved into it.
        self.reads = Counter(a.buffer for each in instructions for a in each.operands)
        # The views of each buffer, and whether their strides are fixed.
        self._views: dict[Buffer, list[tuple[Array, bool]]] = {}
        for each in instructions:
            for a in each.arrays:
                # Integers contain strides: of a layer, and of what gather and scatter index.
                self._views.setdefault(a.buffer, []).append((a, bool(each.integers)))

    def add(self, source: Array, target: Array) -> bool:
        """Let `source`, which must be all of its buffer, lie at `target`; whether that can be."""
        move, views = _move(source, target), self._views[source.buffer]
        if source.buffer in self._moves or move is None or not all(move.maps(*v) for v in views):
            return False
        self._moves[source.buffer] = move
        self.reads[target.buffer] += self.reads[source.buffer]
        self._views[target.buffer] += [(move.apply(a), is_fixed) for a, is_fixed in views]
        return True

    def apply(self, a: Array) -> Array:
        while a.buffer in self._moves:
            a = self._moves[a.buffer].apply(a)
        return a


def _by_rows(each: Instruction) -> Instruction:
    """A matrix product whose result has contiguous columns as the transposed product."""
    result = each.arrays[0]
    if each.name != "matmul" or result.strides[-2] == 1 or result.strides[-3] != 1:
        return each

    def swapped(values: tuple[int, ...]) -> tuple[int, ...]:
        *others, m, n, k = values
        return *others, n, m, k

    result, a, b, *c = (
        replace(array, shape=swapped(array.shape), strides=swapped(array.strides))
        for array in each.arrays
    )
    return replace(each, sizes=swapped(each.sizes), arrays=(result, b, a, *c))


@dataclass(frozen=True)
class _Move:
    """A buffer as a part of another one.

    Attributes:
        target, offset: the other buffer, and where the part begins.
        dims: the size and the new stride of each dimension by its old stride; None if all remain.
    """

    target: Buffer
    offset: int
    dims: dict[int, tuple[int, int]] | None

    def maps(self, a: Array, is_fixed: bool) -> bool:
        """Whether a view of the buffer remains one, with the same strides if these are fixed."""
        if self.dims is None:
            return True
        if is_fixed or a.offset:
            return False
        moving = [(n, s) for n, s in zip(a.shape, a.strides, strict=True) if n > 1 and s]
        distinct = len({s for _, s in moving}) == len(moving)
        return distinct and all(n <= self.dims.get(s, (0, 0))[0] for n, s in moving)

    def apply(self, a: Array) -> Array:
        strides = a.strides
        if self.dims is not None:
            strides = tuple(self.dims.get(s, (0, 0))[1] for s in strides)
        return replace(a, buffer=self.target, strides=strides, offset=a.offset + self.offset)


def _move(source: Array, target: Array) -> _Move | None:
    """The move that makes a copy from `source` to `target` unnecessary, if there is one."""
    if source.is_whole and target.is_contiguous:
        return _Move(target.buffer, target.offset, None)
    order = sorted(
        (stride, d)
        for d, (n, stride) in enumerate(zip(source.shape, source.strides, strict=True))
        if n > 1
    )
    expected = 1
    for stride, d in order:  # whether the source is all of its buffer, permuted
        if stride != expected:
            return None
        expected *= source.shape[d]
    if expected != source.buffer.size or source.offset:
        return None
    dims = {s: (source.shape[d], target.strides[d]) for s, d in order}
    return _Move(target.buffer, target.offset, dims)


class _Arena:
    """First fit, with holes."""

    def __init__(self) -> None:
        self.size = 0
        self._holes: list[tuple[int, int]] = []  # start, end

    def take(self, size: int) -> int:
        size = rounded(size)
        for k, (start, end) in enumerate(self._holes):
            if end - start >= size:
                self._holes[k] = start + size, end
                return start
        self.size += size
        return self.size - size

    def free(self, start: int, size: int) -> None:
        holes = sorted([*self._holes, (start, start + rounded(size))])
        self._holes = []
        for start, end in holes:
            if self._holes and self._holes[-1][1] == start:
                self._holes[-1] = self._holes[-1][0], end
            elif end > start:
                self._holes.append((start, end))


def rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
