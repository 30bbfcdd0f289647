"""The operators of the layers in plain float64 torch, with error bounds; see `row_formulas.py`."""

import torch
import torch.nn.functional as F
from row_formulas import Rounding, size_of


def images_first(t):
    return t.permute(0, 1, 4, 2, 3)  # [B, N, C, H, W] from [B, N, H, W, C]


def images_last(t):
    return t.permute(0, 1, 3, 4, 2)


def _per_task(one, left, right, *, spreads):
    """`one(left_i, right_i)` for every task. The slack is infinite for tasks whose `spreads` is not
    finite, since a padding zero may or may not multiply it."""
    value, sizes = [], []
    for a, b in zip(left, right, strict=True):
        value.append(one(a.double(), b.double()))
        sizes.append(one(size_of(a), size_of(b)))
    value, size = torch.stack(value), torch.stack(sizes)
    rounding, terms = Rounding(left.dtype), max(left[0].numel(), right[0].numel())
    slack = rounding.slack(size, 4 + terms)
    unsure = ~torch.stack([t.isfinite().all() for t in spreads])
    slack[unsure] = torch.inf
    return value, slack


def _window(o):
    return {
        "stride": (o["stride_h"], o["stride_w"]),
        "padding": (o["pad_h"], o["pad_w"]),
    }


def conv(o):
    value, slack = _per_task(
        lambda x, w: F.conv2d(x, w, **_window(o)), images_first(o["x"]), o["w"], spreads=o["w"]
    )
    if o["bias"] is not None:
        bias = o["bias"][:, None, :, None, None]
        value = value + bias.double()
        slack = slack + Rounding(o["x"].dtype).slack(size_of(bias) + value.abs().nan_to_num(0))
    return {"result": (images_last(value), images_last(slack))}


def conv_data_gradient(o):
    size = (o["g"].shape[1], o["w"].shape[2], o["in_h"], o["in_w"])
    value, slack = _per_task(
        lambda g, w: torch.nn.grad.conv2d_input(size, w, g, **_window(o)),
        images_first(o["g"]),
        o["w"],
        spreads=o["w"],
    )
    return {"result": (images_last(value), images_last(slack))}


def conv_weight_gradient(o):
    size = (o["g"].shape[4], o["x"].shape[4], o["kernel_h"], o["kernel_w"])
    value, slack = _per_task(
        lambda x, g: torch.nn.grad.conv2d_weight(x, size, g, **_window(o)),
        images_first(o["x"]),
        images_first(o["g"]),
        spreads=o["g"],
    )
    return {"result": (value, slack)}


def patches(o):
    x = images_first(o["x"])
    kernel = o["kernel_h"], o["kernel_w"]
    columns = F.unfold(x.flatten(0, 1).double(), kernel, **_window(o))  # [B N, columns, pixels]
    rows = columns.mT.reshape(len(x), -1, columns.shape[1])
    return {"result": (rows, torch.zeros_like(rows))}


def patches_transpose(o):
    def fold(rows):
        one = rows.unflatten(1, (-1, pixels)).flatten(0, 1).mT  # [B N, columns, pixels]
        images = F.fold(one, size, kernel, **_window(o))
        return images_last(images.unflatten(0, (len(rows), -1)))

    g, size, kernel = o["g"], (o["in_h"], o["in_w"]), (o["kernel_h"], o["kernel_w"])
    pixels = F.unfold(torch.zeros(1, 1, *size), kernel, **_window(o)).shape[2]
    value = fold(g.double())
    return {"result": (value, Rounding(g.dtype).slack(fold(size_of(g)), kernel[0] * kernel[1]))}


def channel_sums(o):
    g = o["g"]
    return {"result": (g.double().sum(1), Rounding(g.dtype).slack(size_of(g).sum(1)))}


def batched_product(o):
    def product(a, b):
        return (a.mT if o["transpose_a"] else a) @ (b.mT if o["transpose_b"] else b)

    a, b = o["a"], o["b"]
    terms = a.shape[1 if o["transpose_a"] else 2]
    slack = Rounding(a.dtype).slack(product(size_of(a), size_of(b)), 4 + terms)
    return {"result": (product(a.double(), b.double()), slack)}


def mean(t):
    return t.mean(1, keepdim=True)


def channels(o, *names):
    return [o[name].double()[:, None] for name in names]


def batch_norm(o):
    rounding = Rounding(o["x"].dtype)
    x, (gamma, beta) = o["x"].double(), channels(o, "gamma", "beta")
    center = mean(x)
    variance = mean((x - center) ** 2)
    scale = 1 / (variance + o["eps"]).sqrt()
    offset = (x - x[:, :1]).abs().amax(1, keepdim=True)
    share = 8 * rounding.eps * (1 + offset * offset / (variance + o["eps"]))
    share = torch.where((share > 0.1) | (scale > rounding.max / 16), torch.inf, share)
    center_slack = rounding.slack(x.abs().amax(1, keepdim=True))
    y = (x - center) * scale * gamma + beta
    size = (size_of(x) + size_of(center)) * scale * size_of(gamma) + size_of(beta)
    slack = (
        rounding.slack(size)
        + (share + 16 * rounding.eps) * (y - beta).abs().nan_to_num(0)
        + center_slack * scale * size_of(gamma)
    )
    unsure = share.isinf() | (scale * size_of(gamma) > rounding.max / 16) | center_slack.isinf()
    slack = torch.where(unsure | slack.isnan(), torch.inf, slack)
    scale_slack = torch.where(share.isinf() | share.isnan(), torch.inf, share * scale)
    bad = ~x.isfinite().all(1, keepdim=True)  # the channel is NaN
    nothing = torch.full_like(center, torch.nan)
    y, slack = torch.where(bad, torch.nan, y), slack.masked_fill(bad, 0)
    positive = y.relu(), slack
    return {
        "result": (y, slack),
        "positive": positive if o["relu"] else (y.new_empty(0), y.new_empty(0)),
        # An infinite mean may be computed as NaN, so it is only checked to be non-finite.
        "mean": _squeezed(torch.where(bad, nothing, center), center_slack.masked_fill(bad, -1)),
        "scale": _squeezed(torch.where(bad, nothing, scale), scale_slack.masked_fill(bad, 0)),
    }


def _squeezed(value, slack):
    return value[:, 0], slack[:, 0]


class Normalised:
    """h, P u and the derivative of relu, shared by both derivatives, with magnitudes."""

    def __init__(self, o):
        self.rounding = Rounding(o["x"].dtype)
        x, (self.gamma, beta, center, self.scale) = (
            o["x"].double(),
            channels(o, "gamma", "beta", "mean", "scale"),
        )
        self.rows = x.shape[1]
        self.h = (x - center) * self.scale
        self.size = (size_of(x) + size_of(center)) * size_of(self.scale)
        y = self.h * self.gamma + beta
        self.passes = y > 0 if o["relu"] else torch.ones_like(y, dtype=torch.bool)
        near = y.abs() <= self.rounding.slack(self.size * size_of(self.gamma) + size_of(beta), 64)
        tensors = [x, *channels(o, "gamma", "beta", "mean", "scale")]
        odd = torch.stack(
            [(~t.isfinite()).any(1, keepdim=True).expand_as(self.scale) for t in tensors]
        ).any(0)
        overflows = self.size > self.rounding.max / 16  # 0 times such an h is NaN
        unsure = overflows | near if o["relu"] else overflows
        self.unsure = odd | unsure.any(1, keepdim=True)

    def project(self, u):
        return u - mean(u) - mean(self.h * u) * self.h

    def project_size(self, u):
        return u + mean(u) + mean(self.size * u) * self.size

    def expected(self, value, size, *others):
        """Value and slack. `others`: further intermediate magnitudes that must not overflow."""
        slack = self.rounding.slack(size, 64)
        for other in others:
            slack = slack + torch.where(other > self.rounding.max / 16, torch.inf, 0.0)
        return value, torch.where(self.unsure, torch.inf, slack)


def batch_norm_backward(o):
    n = Normalised(o)
    g = torch.where(n.passes, o["g"].double(), 0.0)
    size = size_of(g)
    factor, factor_size = n.gamma * n.scale, size_of(n.gamma) * size_of(n.scale)
    inner = n.project_size(size)
    odd = ~g.isfinite().all(1, keepdim=True)
    n.unsure = n.unsure | odd
    return {
        "result": n.expected(factor * n.project(g), factor_size * inner, inner),
        "dgamma": _squeezed(
            *n.expected(n.rows * mean(n.h * g), n.rows * mean(n.size * size), inner)
        ),
        "dbeta": _squeezed(*n.expected(n.rows * mean(g), n.rows * mean(size))),
    }


def batch_norm_double_backward(o):
    n = Normalised(o)
    g, a = torch.where(n.passes, o["g"].double(), 0.0), o["a"].double()
    b, c = channels(o, "b", "c")
    n.unsure = n.unsure | ~(g + a + b + c).isfinite().all(1, keepdim=True)
    factor, factor_size = n.gamma * n.scale, size_of(n.gamma) * size_of(n.scale)
    pa, pg, pa_size, pg_size = (
        n.project(a),
        n.project(g),
        n.project_size(size_of(a)),
        n.project_size(size_of(g)),
    )
    inner = size_of(b) + factor_size * mean(n.size * size_of(a))
    along = [inner, *(factor_size * mean(t) for t in (n.size * size_of(g), size_of(a) * pg_size))]
    others = [pa_size, pg_size, *along, *(t * size_of(n.scale) for t in [factor_size, *along])]
    to_g = torch.where(n.passes, factor * pa + b * n.h + c, 0.0)
    to_g_size = factor_size * pa_size + size_of(b) * n.size + size_of(c)
    to_x = (
        (b - factor * mean(n.h * a)) * pg
        - factor * mean(n.h * g) * pa
        - factor * mean(a * pg) * n.h
    ) * n.scale
    to_x_size = (
        inner * pg_size
        + factor_size * mean(n.size * size_of(g)) * pa_size
        + factor_size * mean(size_of(a) * pg_size) * n.size
    )
    # A factor of P g, P a or h may underflow to 0.
    underflow = (pg_size + pa_size + n.size) * n.rounding.tiny / n.rounding.eps
    return {
        "result": n.expected(to_g, to_g_size, *others),
        "to_x": n.expected(to_x, to_x_size * size_of(n.scale) + underflow, to_x_size, *others),
        "to_gamma": _squeezed(
            *n.expected(
                n.rows * n.scale * mean(a * pg),
                n.rows * size_of(n.scale) * mean(size_of(a) * pg_size),
                *others,
            )
        ),
    }
