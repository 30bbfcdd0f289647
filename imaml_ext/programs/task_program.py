"""A function of one task as a program that runs for all tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from imaml_ext.ops.batching import contiguous_per_task
from imaml_ext.ops.extension import extension
from imaml_ext.programs.arrays import Array, Buffer, Kind
from imaml_ext.programs.assembly import assemble, rounded, with_fused_sums, without_unused
from imaml_ext.programs.instruction import Instruction
from imaml_ext.programs.lowering import Lowering
from imaml_ext.programs.operators import UnsupportedOperator
from imaml_ext.programs.tracing import trace

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint8: "uint8",
    torch.bool: "uint8",
}


class TaskProgram:
    """A function of one task, traced once, that runs for all tasks at once.

    Args:
        function: `(*inputs) -> tensors`. Inputs and results have a leading dimension of 1 for the
            task, except shared inputs.
        examples: the inputs of one task; the dtype of the first is that of the results.
        shared: for each input, whether it is the same for all tasks.
        late: the number of inputs, at the end, that only the last result depends on.

    Attributes:
        scratch: bytes of scratch memory for a task.

    Raises:
        UnsupportedOperator: the function uses an operator or a dtype without an instruction, or
            reads the value of a tensor.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        examples: Sequence[Tensor],
        shared: Sequence[bool],
        *,
        late: int = 0,
    ) -> None:
        graph, captured = trace(function, examples)
        self._dtype = examples[0].dtype
        self.scratch = 0
        early = len(examples) - late
        inputs = [_Input(t, s, self._dtype) for t, s in zip(examples, shared, strict=True)]
        held = [_Input(t, True, self._dtype) for t in captured]
        arrays = [each.array(k) for k, each in enumerate([*inputs, *held])]
        lowering = Lowering(graph.graph, self._dtype, arrays)
        results = [lowering.copied(a) for a in lowering.outputs]
        buffers = [a.buffer for a in arrays]
        first, second = _split(
            without_unused(lowering.instructions, [a.buffer for a in results]),
            {*buffers[early : early + late], results[-1].buffer} if late else set(),
        )
        saved = _passed_on(first, second)
        self._saved = sum(rounded(buffer.size) for buffer in saved)
        self._shapes = [a.shape[1:] for a in results]
        self._captured = list(zip(held, captured, strict=True))
        self._early, self._late = inputs[:early], inputs[early:]
        # The slots of the first program: captured tensors, early inputs, results, saved. Those of
        # the second one: captured tensors, early inputs, late inputs, saved, the last result.
        common = buffers[early + late :] + buffers[:early]
        ends = [[a.buffer] for a in results]
        types = [each.dtype for each in (*held, *self._early)]
        if late:
            last = [*common, *buffers[early : early + late]]
            late_types = [*types, *(each.dtype for each in self._late)]
            self._second = self._program(second, last, late_types, [saved, ends.pop()])
            ends.append(saved)
        self._first = self._program(first, common, types, ends)

    def _program(
        self,
        instructions: Sequence[Instruction],
        inputs: Sequence[Buffer],
        types: Sequence[torch.dtype],
        outputs: Sequence[Sequence[Buffer]],
    ) -> Any:
        fused = with_fused_sums(instructions, [buffer for group in outputs for buffer in group])
        parts = assemble(fused, inputs, outputs)
        slots = [_DTYPES[t] for t in (*types, *(self._dtype for _ in outputs))]
        self.scratch = max(self.scratch, parts.arena * self._dtype.itemsize)
        program = extension.Program(
            _DTYPES[self._dtype], parts.arena, parts.constants, slots, parts.instructions
        )
        sizes = [b.size for b in inputs] + [sum(rounded(b.size) for b in g) for g in outputs]
        if any(used > size for used, size in zip(program.extents, sizes, strict=True)):
            raise RuntimeError(f"a program uses {program.extents} elements of {sizes}")
        return program

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The results [B, ...] of inputs [B, ...]."""
        operands = self._operands(inputs)
        results = [operands.new(shape, self._dtype) for shape in self._shapes]
        operands.run(self._first, results)
        return results

    def begin(self, *inputs: Tensor) -> tuple[list[Tensor], "Continuation"]:
        """All results but the last, of the early inputs; and a function of the late inputs.

        The function returns the last result, and can be called any number of times.
        """
        operands = self._operands(inputs)
        results = [operands.new(shape, self._dtype) for shape in self._shapes[:-1]]
        saved = operands.new((self._saved,), self._dtype)
        operands.run(self._first, [*results, saved])
        return results, Continuation(
            self._second, operands, self._late, saved, self._shapes[-1], self._dtype
        )

    def descend(
        self,
        phi: Tensor,
        *others: Tensor,
        theta: Tensor,
        lam: Tensor,
        steps: int,
        lr: float,
        velocity: Tensor | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        """`steps` times this program, whose last result is a gradient at phi, and `prox_gd_`.

        Args:
            phi: the first input, [B, D], contiguous; written.
            others: the other inputs.
            theta, lam, lr, velocity, momentum, nesterov: as in `prox_gd_`.
        """
        operands = self._operands((phi, *others))
        results = [operands.new(shape, self._dtype) for shape in self._shapes]
        buffers = (phi, results[-1], theta.contiguous(), lam.contiguous(), velocity)
        addresses = [_address(t) for t in buffers]
        tail = phi.shape[1], int(len(lam) > 1), lr, momentum, nesterov
        self._first.descend(steps, *operands.arguments(results), addresses, *tail)
        increment_version((phi,) if velocity is None else (phi, velocity))

    def _operands(self, inputs: Sequence[Tensor]) -> "_Operands":
        operands = _Operands(len(inputs[0]))
        for held, tensor in self._captured:
            operands.add([held], [tensor])
        operands.add(self._early, inputs)
        return operands


_EXACT = 2**24  # integers up to this are exact in float32


class _Input:
    """Shape and dtype of an input, and whether all tasks share it."""

    def __init__(self, example: Tensor, is_shared: bool, dtype: torch.dtype) -> None:
        if example.dtype not in _DTYPES or example.layout != torch.strided:
            raise UnsupportedOperator(f"an input of {example.dtype}")
        self.dtype = example.dtype
        self.is_shared = is_shared
        self._is_inexact = dtype == torch.float32 and self.dtype in (torch.int64, torch.int32)
        self.shape = example.shape if is_shared else example.shape[1:]

    def array(self, number: int) -> Array:
        kind: Kind = "float" if self.dtype.is_floating_point else "int"
        kind = "bool" if self.dtype == torch.bool else kind
        shape = self.shape if self.is_shared else (1, *self.shape)
        return Array.new(shape, kind, self.dtype)

    def contiguous(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy in contiguous memory.

        Raises:
            ValueError: its shape or dtype is not that of the example.
        """
        shape = tensor.shape if self.is_shared else tensor.shape[1:]
        if shape != self.shape or tensor.dtype != self.dtype:
            raise ValueError(
                f"a tensor of one task was recorded as {list(self.shape)} {self.dtype}, and is now "
                f"{list(shape)} {tensor.dtype}: record again"
            )
        if tensor.is_neg():
            tensor = tensor.resolve_neg()
        if self._is_inexact:
            low, high = (int(each) for each in tensor.aminmax())
            if not -_EXACT <= low <= high <= _EXACT:
                raise ValueError(
                    f"integers beyond 2^24, got {low} to {high}, are not exact in a program of "
                    "float32: use float64, or PyTorch's operators, by compile='off'"
                )
        if tensor.is_contiguous():
            return tensor
        return tensor.contiguous() if self.is_shared else contiguous_per_task(tensor)


class _Operands:
    """The tensors of a run, in the order of the program's slots."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self._strides: list[int] = []  # elements from one task to the next

    def copy(self) -> "_Operands":
        other = _Operands(self.tasks)
        other._tensors = list(self._tensors)
        other._addresses, other._strides = list(self._addresses), list(self._strides)
        return other

    def add(self, inputs: Sequence[_Input], tensors: Sequence[Tensor]) -> None:
        for each, tensor in zip(inputs, tensors, strict=True):
            tensor = each.contiguous(tensor)
            if not each.is_shared and len(tensor) != self.tasks:
                raise ValueError(f"expected {self.tasks} tasks, got {len(tensor)}")
            self._tensors.append(tensor)
            self._addresses.append(tensor.data_ptr())
            self._strides.append(0 if each.is_shared else tensor.stride(0))

    def versions(self) -> list[int]:
        return [t._version for t in self._tensors]

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty((self.tasks, *shape), dtype=dtype, device="cpu")

    def arguments(self, results: Sequence[Tensor]) -> tuple[int, list[int], list[int]]:
        """Arguments of `_C.Program.run`; the results, contiguous, are the last slots."""
        addresses = self._addresses + [t.data_ptr() for t in results]
        strides = self._strides + [t.stride(0) for t in results]
        return self.tasks, addresses, strides

    def run(self, program: Any, results: Sequence[Tensor]) -> None:
        program.run(*self.arguments(results))


class Continuation:
    """The rest of a program, as a function of its late inputs [B, ...]."""

    def __init__(
        self,
        program: Any,
        operands: _Operands,
        late: Sequence[_Input],
        saved: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self._program, self._before, self._late = program, operands, late
        self._saved, self._shape, self._dtype = saved, shape, dtype
        self._versions = operands.versions()

    def __call__(self, *late: Tensor) -> Tensor:
        operands, result = self._bind(late)
        operands.run(self._program, [self._saved, result])
        return result

    def conjugate_gradient(
        self, b: Tensor, *, lam: Tensor, damping: float, max_iter: int, rtol: float, atol: float
    ) -> "CgResult":
        """Conjugate gradient from x = 0 with this product, of the late input.

        Args:
            b: [B, D], contiguous.
            lam: Λ for the fused kernels, [1] or [D].
            damping: added to the diagonal.
            max_iter: number of iterations, at least 1.
            rtol, atol: as in `LinearSolver`.
        """
        tasks, dim = b.shape
        # The results that users keep share no memory with others.
        x, (r, p) = torch.empty_like(b), b.new_empty(2, tasks, dim)
        status, steps, count = (b.new_empty(tasks, dtype=torch.int32) for _ in range(3))
        sizes = [max_iter, max_iter, max_iter, max_iter - 1, 1, 1, 1]
        numbers = b.new_empty(sum(sizes), tasks, dtype=torch.float64).split_with_sizes(sizes)
        curvature, beta, diagonal, link, residual, norm, tol2 = numbers
        operands, hp = self._bind((p,))
        lam = lam.contiguous()
        buffers = (
            b, x, r, p, hp, lam, residual, status, steps, count, curvature, beta, diagonal, link,
            norm, tol2,
        )  # fmt: skip
        is_plain = self._program.conjugate_gradient(
            max_iter, *operands.arguments([self._saved, hp]), [_address(t) for t in buffers],
            dim, int(len(lam) > 1), damping, rtol, atol,
        )  # fmt: skip
        return CgResult(
            x, status, steps, residual[0], count, diagonal, link, curvature, beta, norm[0], is_plain
        )

    def _bind(self, late: Sequence[Tensor]) -> tuple[_Operands, Tensor]:
        if self._before.versions() != self._versions:
            raise RuntimeError("a tensor of the linearisation has been modified in place since")
        operands = self._before.copy()
        operands.add(self._late, late)
        return operands, operands.new(self._shape, self._dtype)


@dataclass(frozen=True)
class CgResult:
    """The state of conjugate gradient after its last iteration.

    Attributes:
        x: [B, D].
        status, steps: as in `Solution`; tasks that used all iterations are RUNNING.
        residual: `|r|` by the recurrence, [B] float64.
        count, diagonal, link: as in `Lanczos`.
        curvature, beta: `p·Ap / r·r` and `r·r / old r·r` of each iteration, [max_iter, B] float64.
        norm: `|b|`, [B] float64.
        is_plain: whether every task is finite, its recurrence cannot have drifted, and its residual
            is not larger than |b|.
    """

    x: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    count: Tensor
    diagonal: Tensor
    link: Tensor
    curvature: Tensor
    beta: Tensor
    norm: Tensor
    is_plain: bool


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _split(
    instructions: Sequence[Instruction], changing: set[Buffer]
) -> tuple[list[Instruction], list[Instruction]]:
    """The instructions that neither read nor write buffers which change, and the others.

    What the others write changes as well. A buffer may be written by several instructions: what
    initialises it belongs to those that modify it.
    """
    changing, count = set(changing), -1
    while count < len(changing):
        count = len(changing)
        for each in instructions:
            if any(a.buffer in changing for a in each.arrays):
                changing.update(a.buffer for a in each.results)
    is_late = [any(a.buffer in changing for a in each.arrays) for each in instructions]
    first, second = (
        [each for each, late in zip(instructions, is_late, strict=True) if late is wanted]
        for wanted in (False, True)
    )
    return first, second


def _passed_on(first: Sequence[Instruction], second: Sequence[Instruction]) -> list[Buffer]:
    """The buffers that the first instructions write and the second ones read."""
    written = {a.buffer for each in first for a in each.results}
    read = dict.fromkeys(a.buffer for each in second for a in each.arrays)
    return [buffer for buffer in read if buffer in written]
