"""Losses and their derivatives by task programs, instead of PyTorch's operators.

The losses, the gradient, and the Hessian or Gauss-Newton product of one task are each traced once,
and then run for all tasks by one call, whatever the solver.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from imaml_ext._tracing import is_recording
from imaml_ext.problem.captured import captured_state
from imaml_ext.programs.operators import UnsupportedOperator
from imaml_ext.programs.task_program import Continuation, TaskProgram

Piece = Literal["losses", "gradient", "hessian", "ggn"]

_MOST_STATES = 8  # of one loss: other shapes, or another state of its model
_MOST = 64  # of all losses: some programs make a new loss in every step
_LARGE = 20_000  # parameters of a network that occupies several threads

_active: ContextVar["Programs | None"] = ContextVar("active", default=None)


class _Entry:
    """A program, its number of uses, and whether PyTorch's operators are used instead."""

    def __init__(self) -> None:
        self.program: TaskProgram | None = None
        self.uses = 0
        self.refused = False


class Programs:
    """The programs of the losses that are evaluated within `use()`, on the CPU.

    A program is traced when it is first needed, and compared with PyTorch's operators in its first,
    second, fourth, eighth, ... use. A new one is traced if, from one `use()` to the next, something
    changes that the loss depends on: the shapes of the data, the training mode of a module, or a
    number or tensor among the variables of the loss or the attributes of its modules. There are at
    most 8 programs of a kind for one loss, and 64 in all.

    With fewer tasks than threads, a large network uses PyTorch's operators, which divide the work
    of a task.

    Args:
        most_scratch: bytes of scratch memory for a task beyond which PyTorch's operators are used:
            a program is fast as long as a task fits into the cache. None: no limit.

    Attributes:
        refusals: reasons for using PyTorch's operators.
    """

    def __init__(self, most_scratch: int | None = None) -> None:
        self.most_scratch = most_scratch
        self.refusals: list[str] = []
        self._found: dict[Any, dict[Piece, _Entry]] = {}
        self._states: dict[Any, int] = {}  # how many of each loss
        self._objects: list[Any] = []  # kept alive: keys contain their ids
        self._states_now: dict[int, Any] = {}

    def __reduce__(self) -> Any:
        return Programs, (self.most_scratch,)  # a copy records again: keys are identities

    @contextmanager
    def use(self) -> Iterator[None]:
        """The context in which losses are evaluated by programs."""
        token = _active.set(self)
        self._states_now = {}
        try:
            yield
        finally:
            _active.reset(token)

    def check(self) -> None:
        """Raises RuntimeError if PyTorch's operators were used for a loss, or if there was none."""
        if self.refusals:
            raise RuntimeError(f"cannot be recorded: {self.refusals[0]}")
        if not self._found:
            raise RuntimeError("cannot be recorded: it evaluates no loss on the CPU")

    def describe(self) -> str:
        """What is used, in one line; empty before a loss has been evaluated."""
        if self.refusals:
            return f"PyTorch's operators are used instead of programs: {self.refusals[0]}"
        return "gradients and curvature products run as recorded programs" if self._found else ""

    def of(self, objective: Any) -> dict[Piece, _Entry] | None:
        """The programs of an objective's loss; None if PyTorch's operators are to be used."""
        threads = torch.get_num_threads()
        if objective.tasks < threads and objective.layout.dim > _LARGE:
            self.refuse(f"there are fewer tasks ({objective.tasks}) than threads ({threads})")
            return None
        loss = id(objective.loss)
        found_state = self._states_now.get(loss)  # another thread may replace the dict
        if found_state is None:
            try:
                found_state = captured_state(objective.loss)
            except (ValueError, RecursionError) as error:  # of unusual variables
                self.refuse(f"the variables of the loss cannot be listed: {error}")
                return None
            self._states_now[loss] = found_state
        state, objects = found_state
        key = (
            _structure(objective.data),
            *[(leaf.dtype, leaf.shape[1:]) for leaf in objective.leaves],
            *[(name, t.shape, t.dtype) for name, t in objective.shared.items()],
            objective.layout.key, state,
        )  # fmt: skip
        found = self._found.get(key)
        if found is None:
            code = state[0]
            if self._states.get(code, 0) == _MOST_STATES:
                self.refuse(f"a loss changed more than {_MOST_STATES} times")
                return None
            if len(self._found) == _MOST:
                self.refuse(f"there are more than {_MOST} losses")
                return None
            self._states[code] = self._states.get(code, 0) + 1
            self._objects.append(objects)
            found = self._found[key] = {}
        return found

    def refuse(self, reason: str) -> None:
        """Add to the refusals."""
        if reason not in self.refusals:
            self.refusals.append(reason)


def _structure(data: Any) -> Any:
    """Equal for data of the same structure."""
    if type(data) is tuple and all(isinstance(each, Tensor) for each in data):
        return len(data)  # faster
    return pytree.tree_structure(data)


def recorded(objective: Any) -> "Recorded | None":
    """The programs of an objective; None if PyTorch's operators are to be used."""
    active = _active.get()
    if active is None or is_recording() or objective.usage is not None:
        return None
    if objective.layout.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    if torch.is_inference_mode_enabled():
        return None  # an error, as without programs
    found = active.of(objective)
    return None if found is None else Recorded(objective, active, found)


class Recorded:
    """The programs of an objective. Every method returns None if there is no program."""

    def __init__(self, objective: Any, programs: Programs, found: dict[Piece, _Entry]) -> None:
        self._objective, self._programs, self._found = objective, programs, found
        self._rest = [*objective.leaves, *objective.shared.values()]

    def losses(self, rows: Tensor) -> Tensor | None:
        """[B] from [B, D]; in grad mode in the graph of the rows, for one derivative."""
        if torch.is_grad_enabled():
            program = self._program("gradient", rows) if rows.requires_grad else None
            if program is None:
                return None
            losses: Tensor = _Losses.apply(rows, program, self._rest)
            return losses
        program = self._program("losses", rows)
        return None if program is None else program(rows, *self._rest)[0]

    def gradient(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """Losses [B] and gradients [B, D]."""
        program = self._program("gradient", rows)
        if program is None:
            return None
        losses, gradient = program(rows, *self._rest)
        return losses, gradient

    def descend(self, rows: Tensor, **settings: Any) -> bool:
        """Steps of `prox_gd_` from rows [B, D], which are written; whether there is a program.

        Args:
            settings: steps, theta, lam and the others of `prox_gd_`.
        """
        program = self._program("gradient", rows)
        if program is None:
            return False
        program.descend(rows, *self._rest, **settings)
        return True

    def differentiable_gradient(self, rows: Tensor) -> Tensor | None:
        """Gradients [B, D] in the graph of the rows, for one derivative."""
        program = self._program("hessian", rows)
        if program is None:
            return None
        gradient: Tensor = _Gradient.apply(rows, program, self._rest)
        return gradient

    def linearise(
        self, rows: Tensor, kind: Literal["hessian", "ggn"]
    ) -> tuple[Tensor, Tensor, Continuation] | None:
        """Losses [B], gradients [B, D], and the product of the curvature with rows [B, D]."""
        program = self._program(kind, rows)
        if program is None:
            return None
        (losses, gradient), product = program.begin(rows, *self._rest)
        return losses, gradient, product

    def _program(self, piece: Piece, rows: Tensor) -> TaskProgram | None:
        """The program of a piece; compared with PyTorch in its first, second, fourth, ... use."""
        entry = self._found.setdefault(piece, _Entry())
        entry.uses += 1
        if entry.refused or entry.uses & (entry.uses - 1):
            return entry.program
        with torch.random.fork_rng(devices=[]):  # of a loss that draws random numbers
            vectors = [_generic(rows)] if piece in ("hessian", "ggn") else []
            # Evaluated first: it checks values, which tracing cannot.
            want = self._eager(piece, rows, vectors)
            reason = self._compared(entry, piece, rows, vectors, want)
        if reason is not None:
            entry.program, entry.refused = None, True
            self._programs.refuse(f"no program for {reason}")
            if entry.uses > 1:
                warnings.warn(
                    f"PyTorch's operators are used from now on: {reason}. Since use "
                    f"{entry.uses // 2} of its program, results may have been wrong",
                    stacklevel=2,
                )
        return entry.program

    def _compared(
        self,
        entry: _Entry,
        piece: Piece,
        rows: Tensor,
        vectors: list[Tensor],
        want: list[Tensor],
    ) -> str | None:
        """Trace the program, if there is none, and compare it with PyTorch; the error, if any."""
        try:
            if entry.program is None:
                entry.program = self._traced(piece, rows, vectors)
            if vectors:
                got, product = entry.program.begin(rows, *self._rest)
                product(-2 * vectors[0])  # must not change the next product
                got.append(product(*vectors))
            else:
                got = entry.program(rows, *self._rest)
        except Exception as error:  # of tracing: the loss itself is computed above
            if isinstance(error, UnsupportedOperator):
                return str(error)
            return f"this loss ({type(error).__name__}: {str(error).splitlines()[0]})"
        if all(map(_agree, got, want)):
            return None
        return f"a loss whose {piece} is not that of the traced operators"

    def _traced(self, piece: Piece, rows: Tensor, vectors: Sequence[Tensor]) -> TaskProgram:
        objective, structure = self._objective, pytree.tree_structure(self._objective.data)
        names, leaves = list(objective.shared), len(self._rest) - len(objective.shared)

        def function(rows: Tensor, *rest: Tensor) -> Sequence[Tensor]:
            data = pytree.tree_unflatten(rest[:leaves], structure)
            shared = dict(zip(names, rest[leaves : len(self._rest)], strict=True))
            return _evaluate(objective.of_tasks(data, shared), piece, rows, rest[len(self._rest) :])

        inputs = [rows, *self._rest, *vectors]
        is_shared = [0 < k - leaves <= len(names) for k in range(len(inputs))]
        examples = [t if s else t[:1] for t, s in zip(inputs, is_shared, strict=True)]
        program = TaskProgram(function, examples, is_shared, late=len(vectors))
        most = self._programs.most_scratch
        if most is not None and program.scratch > most:
            raise UnsupportedOperator(
                f"a task of {program.scratch / 2**20:.0f} MiB, beyond the cache"
            )
        return program

    def _eager(self, piece: Piece, rows: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
        token = _active.set(None)
        try:
            objective = self._objective.of_tasks(self._objective.data, self._objective.shared)
            return _evaluate(objective, piece, rows, vectors)
        finally:
            _active.reset(token)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, program: TaskProgram, rest: Sequence[Tensor]) -> Tensor:
        losses, ctx.gradient = program(rows, *rest)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g[:, None] * ctx.gradient, None, None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, program: TaskProgram, rest: Sequence[Tensor]) -> Tensor:
        (_, gradient), ctx.product = program.begin(rows, *rest)
        return gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vector: Tensor) -> tuple[Tensor, None, None]:
        return ctx.product(vector), None, None


def _evaluate(
    objective: Any, piece: Piece, rows: Tensor, vectors: Sequence[Tensor]
) -> list[Tensor]:
    """By PyTorch's operators."""
    if piece == "losses":
        return [objective.losses(rows)]
    if piece == "gradient":
        return list(objective.gradient(rows))
    at = objective.linearise(rows, piece)
    return [at.losses, at.gradient, at.matvec(*vectors)]


def _generic(rows: Tensor) -> Tensor:
    """A direction without structure, [B, D], the same in every call."""
    numbers = torch.arange(1.0, rows.numel() + 1, dtype=rows.dtype, device=rows.device)
    return (numbers * numbers).sin().view_as(rows)


def _agree(got: Tensor, want: Tensor) -> bool:
    """Whether the results of every task are equal up to rounding errors, relative in norm."""
    finite, eps = want.isfinite(), torch.finfo(want.dtype).eps
    if not torch.equal(got.isfinite(), finite):
        return False
    got, want = (torch.where(finite, t, 0.0).double().view(len(t), -1) for t in (got, want))
    tolerance = 10 * eps**0.5
    return bool(((got - want).norm(dim=1) <= tolerance * want.norm(dim=1)).all())
