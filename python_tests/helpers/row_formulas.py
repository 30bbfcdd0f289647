"""The operators on rows in plain float64 torch, with error bounds.

A formula takes the operands by name and returns, for every result and every written operand, the
value and its slack: a bound on the rounding error, from the magnitudes of the summed terms;
infinite where the dtype overflows or rounding decides about the result.
"""

import torch

from imaml_ext.solvers.solution import Status


class Rounding:
    """Error bounds for one dtype."""

    def __init__(self, dtype):
        info = torch.finfo(dtype)
        self.eps, self.max, self.tiny = info.eps, info.max, info.tiny

    def holds(self, number):
        """Whether a number neither overflows nor underflows in the dtype."""
        return number == 0 or self.tiny <= abs(number) <= self.max / 16

    def slack(self, size, factor=16):
        """For a result whose terms have magnitudes that sum to `size`."""
        slack = factor * (self.eps * size + self.tiny)
        return torch.where(size > self.max / 16, torch.inf, slack.nan_to_num(torch.inf))


def size_of(t):
    """Magnitudes; 0 where a value is not finite, since it makes the result non-finite anyway."""
    t = t.double()
    return torch.where(t.isfinite(), t.abs(), 0.0)


def number_size(value):
    return size_of(torch.tensor(value, dtype=torch.float64))


def prox_gradient(o):
    """g [B, D] and the sum of the magnitudes of its terms."""
    phi, grad, theta, lam = (o[name].double() for name in ("phi", "grad", "theta", "lam"))
    size = size_of(grad) + size_of(lam) * (size_of(phi) + size_of(theta))
    return grad + lam * (phi - theta), size


def only_running(o, expected, written):
    """Rows that are not RUNNING do not change."""
    if o["status"] is not None:
        keep = (o["status"] != Status.RUNNING)[:, None]
        for name in written:
            value, slack = expected[name]
            expected[name] = torch.where(keep, o[name].double(), value), slack.masked_fill(keep, 0)
    return expected


def prox_gd_(o):
    rounding = Rounding(o["phi"].dtype)
    g, size = prox_gradient(o)
    expected, step, step_size = {}, g, size
    if o["velocity"] is not None:
        momentum = o["momentum"]
        old = o["velocity"].double()
        new = momentum * old + g
        new_size = number_size(momentum) * size_of(old) + size
        slack = rounding.slack(new_size)
        if number_size(momentum) > rounding.max / 16:
            slack = torch.full_like(slack, torch.inf)
        expected["velocity"] = new, slack
        step = g + momentum * new if o["nesterov"] else new
        step_size = size + number_size(momentum) * new_size if o["nesterov"] else new_size
    phi = o["phi"].double()
    slack = rounding.slack(size_of(phi) + number_size(o["lr"]) * step_size)
    # A factor of 0 may multiply a value that overflows.
    factor = max(number_size(o["lr"]), number_size(o["momentum"]))
    odd = (step_size > rounding.max / 16) | (factor > rounding.max / 16)
    slack = slack.masked_fill(odd, torch.inf)
    expected["phi"] = phi - o["lr"] * step, slack
    return only_running(o, expected, expected)


def prox_adam_(o):
    rounding = Rounding(o["phi"].dtype)
    g, size = prox_gradient(o)
    beta1, beta2, step = o["beta1"], o["beta2"], o["step"]
    m_old, v_old = o["first_moment"].double(), o["second_moment"].double()
    m, m_slack = (
        beta1 * m_old + (1 - beta1) * g,
        rounding.slack(size_of(m_old) + size),
    )
    v, v_slack = (
        beta2 * v_old + (1 - beta2) * g * g,
        rounding.slack(size_of(v_old) + size * size),
    )
    root = v.sqrt() / (1 - beta2**step) ** 0.5
    wide = ((v + v_slack).sqrt() - (v - v_slack).clamp_min(0).sqrt()) / (1 - beta2**step) ** 0.5
    below = root + o["eps"]
    rate = o["lr"] / (1 - beta1**step)
    phi = o["phi"].double()
    quotient_slack = 4 * abs(rate) * (m_slack / below + m.abs() * wide / below / below)
    slack = quotient_slack + rounding.slack(size_of(phi) + (rate * m / below).abs())
    unsure = (wide > below / 4) | (number_size(rate) > rounding.max / 16) | v_slack.isinf()
    finite = v.isfinite() & m.isfinite()
    slack = torch.where((finite & unsure) | slack.isnan(), torch.inf, slack)
    # Where m is not finite, v may overflow or be negative; phi is not finite then.
    expected = {
        "phi": (phi - rate * m / below, slack),
        "first_moment": (m, m_slack),
        "second_moment": (v, v_slack),
    }
    return only_running(o, expected, list(expected))


def prox_norms(o):
    rounding = Rounding(o["phi"].dtype)
    g, size = prox_gradient(o)
    phi, theta, lam = (o[name].double() for name in ("phi", "theta", "lam"))
    displacement, displacement_size = phi - theta, size_of(phi) + size_of(theta)
    norm2, penalty = g * g, lam * displacement * displacement
    value = torch.stack([norm2.sum(1), penalty.sum(1)], 1)
    slacks = torch.stack(
        [
            (size * rounding.slack(size)).sum(1),
            (size_of(lam) * displacement_size * rounding.slack(displacement_size)).sum(1),
        ],
        1,
    )
    return {"result": (value, _sums_slack(slacks))}


def row_dot(o):
    a, b = o["a"].double(), o["b"].double()
    slack = 1e-13 * (size_of(a) * size_of(b)).sum(1)
    return {"result": ((a * b).sum(1), _sums_slack(slack))}


def pull_back(o):
    rounding, use = Rounding(o["x"].dtype), o["use"][:, None]
    x, phi, theta, weight = (o[name].double() for name in ("x", "phi", "theta", "weight"))
    x = torch.where(use > 0, x, 0.0) * weight
    size = torch.where(use > 0, size_of(o["x"]), 0.0) * size_of(weight)
    displacement = torch.where(use > 1, phi - theta, 0.0)
    displacement_size = torch.where(use > 1, size_of(phi) + size_of(theta), 0.0)
    products = size * displacement_size
    # x, the displacement and the weighted x are rounded; so are the sums.
    rounds = rounding.slack(size), rounding.slack(displacement_size), rounding.slack(products)
    slack = rounds[0] * displacement_size + size * rounds[1] + rounds[0] * rounds[1] + rounds[2]
    return {
        "x_sum": (x.sum(0), _sums_slack(rounds[0].sum(0) + rounding.slack(size.sum(0)))),
        "product_sum": (
            (x * displacement).sum(0), _sums_slack(slack.sum(0) + rounding.slack(products.sum(0))),
        ),
    }  # fmt: skip


def _sums_slack(slack):
    return slack.nan_to_num(torch.inf, torch.inf) + 1e-300


def cg_step_(o):
    """Row by row, following the docstring of `ops.cg_step_`."""
    names = ["x", "r", "p", "rr", "status", "steps", "curvature", "beta"]
    names += [] if o["rz"] is None else ["rz"]
    expected = {name: (o[name].double().clone(), _zeros_like(o[name])) for name in names}
    for row in range(len(o["x"])):
        new = _cg_row(o, row)
        for name in names:
            value, slack = (
                new.get(name, (None, torch.inf)) if new is not None else (None, torch.inf)
            )
            if value is None and new is not None and name not in new:
                continue  # unchanged
            expected[name][1][row] = slack
            if value is not None:
                expected[name][0][row] = value
    return expected


def _zeros_like(t):
    return torch.zeros(t.shape, dtype=torch.float64, device=t.device)


def _cg_row(o, row):
    """The changes, {name: (value, slack)}; None if the result cannot be predicted."""
    if o["status"][row] != Status.RUNNING:
        return {"curvature": (0.0, 0.0), "beta": (0.0, 0.0)}
    rounding = Rounding(o["x"].dtype)
    x, r, p, hp = (o[name][row].double() for name in ("x", "r", "p", "hp"))
    shift = o["lam"].double() + o["damping"]
    inverse = None if o["inverse"] is None else o["inverse"][row].double()
    rz = (o["rr"] if o["rz"] is None else o["rz"])[row].double()
    cleared = {"x": (torch.zeros_like(x), 0.0), "status": (Status.NONFINITE, 0.0)}
    cleared |= {"rr": (torch.nan, 0.0), "rz": (torch.nan, 0.0)}
    unknown = ("r", "p", "curvature", "beta")
    cleared |= {name: (None, torch.inf) for name in unknown}

    ap, ap_size = hp + shift * p, size_of(hp) + size_of(shift) * size_of(p)
    if (ap_size > rounding.max / 16).any() or (size_of(shift) > rounding.max / 16).any():
        return None
    ap_slack = rounding.slack(ap_size)
    curvature, apap = (p * ap).sum(), (ap * ap).sum()
    if not (curvature.isfinite() and apap.isfinite()):
        return cleared
    slack = (p.abs() * ap_slack).sum() + 1e-12 * (p * ap).abs().sum()
    threshold = rounding.eps * (p * p).sum().sqrt() * apap.sqrt()
    measured = {"curvature": (curvature / rz, (slack / rz).abs() + 1e-12 * (curvature / rz).abs())}
    if curvature + 2 * slack < threshold or (slack <= 1e-300 and curvature <= threshold):
        stopped = {**measured, "beta": (0.0, 0.0), "status": (Status.NEGATIVE_CURVATURE, 0.0)}
        if o["steps"][row] > 0:
            return stopped
        lam = o["lam"].double().expand_as(x)
        moved = torch.where(lam > 0, x + r / lam, x)
        size = torch.where(lam > 0, size_of(x) + size_of(r) / lam, size_of(x))
        if (size > rounding.max / 16).any():
            return None
        if not (moved.isfinite().all() and r.isfinite().all()):
            return cleared
        return {**stopped, "x": (moved, rounding.slack(size))}
    if curvature - 2 * slack <= threshold:
        return None
    alpha = rz / curvature
    if not alpha.isfinite():
        return cleared
    share = (slack / curvature).abs() + rounding.eps  # relative error of alpha
    if share > 0.01 or not rounding.holds(alpha):
        return None
    new_x, new_r = x + alpha * p, r - alpha * ap
    size_x, size_r = size_of(x) + (alpha * p).abs(), size_of(r) + alpha.abs() * ap_size
    if (torch.maximum(size_x, size_r) > rounding.max / 16).any():
        return None
    slack_x = rounding.slack(size_x) + share * (alpha * p).abs()
    slack_r = rounding.slack(size_r) + share * (alpha * ap).abs() + alpha.abs() * ap_slack
    rr, rr_slack = _weighted_square(new_r, slack_r, torch.ones_like(r), rounding)
    if not (new_x.isfinite().all() and rr.isfinite()):
        return cleared
    new_rz, rz_slack = rr, rr_slack
    if inverse is not None:
        new_rz, rz_slack = _weighted_square(new_r, slack_r, inverse, rounding)
        if (size_of(inverse) * size_r > rounding.max / 16).any():
            return None
    beta, beta_slack = new_rz / rz, (rz_slack / rz).abs() + 1e-12 * (new_rz / rz).abs()
    moved = {
        **measured,
        "x": (new_x, slack_x),
        "r": (new_r, slack_r),
        "rr": (rr, rr_slack),
        "rz": (new_rz, rz_slack),
        "beta": (beta, beta_slack),
        "steps": (o["steps"][row].double() + 1, 0.0),
    }
    tol2 = o["tol2"][row]
    if rr + rr_slack <= tol2 or (tol2 >= 0 and not (r.any() or alpha)):
        return {**moved, "status": (Status.CONVERGED, 0.0)}
    if not rr - rr_slack > tol2 and not tol2.isnan():
        return None
    if not new_rz.isfinite() or (inverse is not None and new_rz + rz_slack <= 0):
        return cleared
    if inverse is not None and new_rz - rz_slack <= 0:
        return None
    z, factor = (new_r, 1.0) if inverse is None else (inverse * new_r, inverse.abs())
    size_p = z.abs() + (beta * p).abs()
    if (size_p > rounding.max / 16).any() or not rounding.holds(beta):
        return None
    slack_p = rounding.slack(size_p) + slack_r * factor + beta_slack * p.abs()
    return {**moved, "p": (z + beta * p, slack_p)}


def _weighted_square(r, slack, weight, rounding):
    value = (weight * r * r).sum()
    loose = weight.abs() * (2 * r.abs() * slack + slack * slack)
    return value, (loose + 4 * rounding.eps * (weight * r * r).abs()).sum() + 1e-300
