"""MAML, which differentiates the query losses through the inner steps, and its approximations."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from imaml_ext._checks import check_choice, check_integer
from imaml_ext.methods.meta_gradient import Nonfinite
from imaml_ext.methods.step_weights import StepWeights
from imaml_ext.methods.unrolled import Unrolled, checked
from imaml_ext.problem.lam import Lam, ProximalStrength
from imaml_ext.problem.objective import Loss
from imaml_ext.solvers.inner import Adam, GradientDescent, StepSize


class MAML(Unrolled):
    """Model-agnostic meta-learning: back-propagation through every step of the adaptation.

    Memory grows with the number of steps, whose graphs are all kept. The graph contains a copy of
    theta, and of lam and the step sizes where they are learned, for each task.

    Args:
        loss, params, query_loss, nonfinite: as in `Method`.
        inner: `GradientDescent`, plain or with momentum, or `Adam`; without `tol`. If its lr is a
            `StepSize`, it is learned too, under the names of `StepSize.named`.
        accelerated: Nesterov's method for a lam-strongly convex G, `GradientDescent.accelerated`;
            needs lam and the step size as floats.
        lam: adds the proximal term to the inner objective, as in iMAML; None: no such term. Its
            tensors that require grad, or those of a `ProximalStrength`, are learned too, except a
            lam per task, which must be constant.
        learn_lr: learn the step size too, as `log_lr`: equivalent to a scalar `StepSize` whose
            initial value is the lr of `inner`.
        shared: parameters that are learned but not adapted, {name: tensor}: the body in ANIL (Raghu
            et al. 2020), or hyper-parameters of the loss, such as a weight decay or a temperature.
            The losses receive them together with phi, and the gradient includes their effect
            through the inner steps. With `nonfinite="omit"` or weights of tasks, the gradient is
            computed a second time, without the failed tasks, if there are any; on CUDA always,
            since finding out would synchronise.
        step_weights: minimise a weighted sum of the query losses after each of the K steps, instead
            of the loss after the last step. Weights [K], or a function that maps the meta-step, a
            0-d integer tensor on the device, to weights [K], such as `MultiStepLoss`. Without a
            `Trainer`, call `at_step` before each meta-gradient.

    Raises:
        TypeError: `inner` is another solver; or as in `Method`.
        ValueError: `inner` has a `tol`, a `StepSize` or `step_weights` is for another number of
            steps, a lam per task requires grad, a name is in both `params` and `shared`, or no loss
            uses a shared parameter; or as in `Method`.

    Source: Finn, Abbeel, Levine 2017, "Model-agnostic meta-learning".
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        inner: GradientDescent | Adam | None = None,
        accelerated: bool = False,
        lam: Lam | ProximalStrength | None = None,
        learn_lr: bool = False,
        shared: Mapping[str, Tensor] | None = None,
        step_weights: StepWeights | None = None,
        query_loss: Loss | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        check_choice("accelerated", accelerated, (False, True))
        if accelerated:
            inner = _accelerated(checked(inner), lam)
        super().__init__(
            loss, params, inner=inner, lam=lam, learn_lr=learn_lr, shared=shared,
            step_weights=step_weights, query_loss=query_loss, nonfinite=nonfinite,
        )  # fmt: skip


def _accelerated(inner: GradientDescent | Adam, lam: Any) -> GradientDescent:
    if not isinstance(inner, GradientDescent):
        raise ValueError(
            f"accelerated needs inner=GradientDescent(...), got {type(inner).__name__}"
        )
    if not isinstance(lam, (int, float)) or isinstance(inner.lr, StepSize):
        which = "inner.lr" if isinstance(inner.lr, StepSize) else "lam"
        raise ValueError(f"accelerated needs {which} as a float, to compute the momentum")
    if inner.momentum:
        raise ValueError(f"accelerated sets the momentum: inner must have 0, got {inner.momentum}")
    return GradientDescent.accelerated(lr=inner.lr, steps=inner.steps, strong_convexity=lam)


class TruncatedMAML(Unrolled):
    """MAML that back-propagates through the last `last` steps only.

    With lam, theta enters through the proximal terms of those steps, and the result of the steps
    before them is a constant (Shaban et al. 2019). Without lam, the derivative of the earlier steps
    is taken to be the identity: `last=0` is first-order MAML. Other learned tensors get no gradient
    through the earlier steps.

    Args:
        loss, params: as in `MAML`.
        last: number of steps that are differentiated.
        settings: inner, lam, learn_lr, shared, query_loss and nonfinite, as in `MAML`.

    Raises:
        TypeError, ValueError: last is not an integer, negative, or 0 with `lam` or a learned step
            size; or as in `MAML`.

    Source: Shaban, Cheng, Hatch, Boots 2019, "Truncated back-propagation for bilevel optimization".
    """

    def __init__(
        self, loss: Loss, params: Mapping[str, Tensor], *, last: int, **settings: Any
    ) -> None:
        check_integer("last", last, minimum=0)
        if settings.get("step_weights") is not None:
            raise ValueError("step_weights needs the derivative of every step: use MAML")
        super().__init__(loss, params, **settings)
        if last == 0 and (self.lam is not None or self.hyperparameters()):
            raise ValueError("with lam or learn_lr, last must be at least 1, got 0")
        self.last = last


class FOMAML(Unrolled):
    """First-order MAML: the query gradient at phi, as if phi - theta did not depend on theta.

    The gradients in the inner steps are treated as constants. A `StepSize` gets the gradient
    through its product with them, and shared parameters get that of the query loss alone.

    Args:
        loss, params, inner, shared, step_weights, query_loss, nonfinite: as in `MAML`.

    Raises:
        TypeError, ValueError: as in `MAML`.

    Source: Finn, Abbeel, Levine 2017, section 5.2.
    """

    first_order = True

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        inner: GradientDescent | Adam | None = None,
        shared: Mapping[str, Tensor] | None = None,
        step_weights: StepWeights | None = None,
        query_loss: Loss | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        super().__init__(
            loss, params, inner=inner, shared=shared, step_weights=step_weights,
            query_loss=query_loss, nonfinite=nonfinite,
        )  # fmt: skip
