"""Solvers of small smooth problems: to rounding errors, and fast enough to train with."""

from imaml_ext import ConjugateGradient, HessianFree

CG = ConjugateGradient(max_iter=200, rtol=1e-13)
EXACT = {"inner": HessianFree(steps=40, linear=CG, damping=0.0, tol=1e-11), "linear": CG}

_FEW = ConjugateGradient(max_iter=12, rtol=1e-4)
QUICK = {"inner": HessianFree(steps=6, linear=_FEW, damping=0.0, tol=1e-5), "linear": _FEW}
