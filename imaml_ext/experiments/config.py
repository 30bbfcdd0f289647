"""The settings of an experiment: data, adaptation, meta-gradient, optimizer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from imaml_ext.methods.meta_gradient import Nonfinite
from imaml_ext.problem.objective import CurvatureKind

LearnLam = Literal["no", "scalar", "tensor", "diagonal"]
Network = Literal["paper", "wide"]
Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Config:
    """One experiment. The command-line flags and their help are generated from the fields.

    The values that `dataset`, `method`, `inner` and `linear` can have are the keys of the
    dictionaries in `registry`.
    """

    dataset: str
    method: Annotated[str, "meta-learning method"] = "imaml"
    network: Annotated[
        Network, "wide: more filters, and batch norm with running statistics, for ridge-head"
    ] = "paper"
    start: Annotated[
        str, "checkpoint, model or run folder that the training starts from; also needed to resume"
    ] = ""
    way: Annotated[int, "classes per task"] = 5
    train_way: Annotated[int, "classes per training task with ridge-head; 0: as way"] = 0
    shot: Annotated[int, "support examples per class, or per regression task"] = 1
    query: Annotated[int, "query examples per class in training"] = 1
    query_batches: Annotated[
        int, "batches into which the training query set of a task is divided, for batch norm"
    ] = 1
    query_scale: Annotated[float, "factor of the logits in the training loss of the query set"] = (
        1.0
    )
    eval_query: Annotated[int, "query examples per class in evaluation"] = 1
    tasks: Annotated[int, "tasks per meta-step"] = 16
    hard_tasks: Annotated[
        float, "fraction of training tasks whose classes are similar, by the features of start"
    ] = 0.0
    neighbours: Annotated[
        int, "classes of a hard task are drawn from one class and this many nearest neighbours"
    ] = 30
    lam: Annotated[float, "proximal strength"] = 2.0
    inner_lr: Annotated[float, "step size of the inner solver"] = 0.1
    inner_steps: Annotated[int, "steps of the inner solver"] = 16
    cg_steps: Annotated[int, "steps of the linear solver of a meta-gradient"] = 5
    damping: Annotated[float, "added to the diagonal in the linear solve"] = 0.0
    curvature: Annotated[CurvatureKind, "H of the linear solve; ggn: Gauss-Newton"] = "hessian"
    inner: Annotated[str, "inner solver of imaml"] = "gd"
    linear: Annotated[str, "linear solver of imaml"] = "cg"
    last: Annotated[int, "inner steps that truncated-maml differentiates"] = 5
    eval_proximal: Annotated[bool, "keep the proximal term of imaml in evaluation"] = True
    learn_lam: Annotated[LearnLam, "learn the proximal strength of imaml in this form"] = "no"
    learn_lr: Annotated[bool, "learn the inner step size of maml"] = False
    meta_lr: Annotated[float, "learning rate of the outer Adam"] = 1e-3
    meta_eps: Annotated[float, "eps of the outer Adam"] = 1e-8
    nonfinite: Annotated[
        Nonfinite, "a non-finite task stops the run (propagate) or is left out (omit)"
    ] = "propagate"
    decay: Annotated[
        Decay,
        "learning rate schedule; linear: decays to 2% over the second half of the run; "
        "cosine: to 0 over the whole run",
    ] = "linear"
    average: Annotated[
        float, "decay of a moving average of the learned tensors, for evaluation; 0: none"
    ] = 0.0
    meta_steps: Annotated[int, "limit on the number of meta-steps"] = 1000
    minutes: Annotated[float, "limit on the training time; 0: no limit"] = 0.0
    seed: Annotated[int, "seed of the initial model and of the training tasks"] = 0
