"""Experiments as data: what to train on, how to adapt, how to differentiate, how to step."""

from dataclasses import dataclass

from imaml_ext.problem.objective import CurvatureKind


@dataclass(frozen=True)
class Config:
    """One experiment. The command line has a flag for each field."""

    dataset: str
    method: str = "imaml"
    way: int = 5
    shot: int = 1
    query: int = 1
    eval_query: int = 1
    tasks: int = 16
    lam: float = 2.0
    inner_lr: float = 0.1
    inner_steps: int = 16
    cg_steps: int = 5
    damping: float = 0.0
    curvature: CurvatureKind = "hessian"
    inner: str = "gd"
    linear: str = "cg"
    last: int = 5
    eval_proximal: bool = True
    learn_lam: str = "no"
    learn_lr: bool = False
    meta_lr: float = 1e-3
    meta_eps: float = 1e-8
    nonfinite: str = "propagate"
    decay: str = "linear"
    meta_steps: int = 1000
    minutes: float = 0.0
    seed: int = 0


CHOICES = {
    "method": ["imaml", "maml", "maml-accelerated", "truncated-maml", "fomaml", "reptile"],
    "inner": ["gd", "gd-then-proximal", "nesterov", "adam", "hessian-free", "lbfgs"],
    "linear": ["cg", "cg-authors-code", "cg-jacobi", "minres", "neumann"],
    "curvature": ["hessian", "ggn"],
    "learn_lam": ["no", "scalar", "tensor", "diagonal"],
    "nonfinite": ["propagate", "omit"],
    "decay": ["constant", "linear"],
}
