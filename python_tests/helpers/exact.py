"""Solvers that solve small smooth problems to rounding errors."""

from imaml_ext import ConjugateGradient, HessianFree

CG = ConjugateGradient(max_iter=200, rtol=1e-13)
EXACT = {"inner": HessianFree(steps=40, linear=CG, damping=0.0, tol=1e-11), "linear": CG}
