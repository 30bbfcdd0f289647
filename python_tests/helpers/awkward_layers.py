"""Layers that PyTorch cannot batch, or not differentiate twice, each in a model of its own."""

import torch
from torch import nn
from torch.nn import functional as F


class Last(nn.Module):
    """A linear function of what a layer makes of a sequence [N, T, 4], at its last element."""

    def __init__(self, layer, **settings):
        super().__init__()
        self.inside = nn.ModuleDict({"layer": layer})
        self.head = nn.Linear(4, 1)
        self.settings = settings

    def forward(self, x):
        layer = self.inside["layer"]
        h = layer(x, x, x, **self.settings) if self.settings else layer(x)
        return self.head((h[0] if isinstance(h, tuple) else h)[:, -1])


class Attention(nn.Module):
    """Calls the function itself: no module inside is to blame."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


class Bag(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, mode="sum") if fused else nn.Embedding(6, 4)

    def forward(self, x):
        h = self.bag((x[..., 0] * 2).long() % 6)
        return (h if isinstance(self.bag, nn.EmbeddingBag) else h.sum(1))[:, None]


class Distances(nn.Module):
    def __init__(self, mode="use_mm_for_euclid_dist_if_necessary"):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(4, 4))
        self.mode = mode

    def forward(self, x):
        return torch.cdist(x, self.centres, compute_mode=self.mode)


class OwnFunction(torch.autograd.Function):
    """As an extension's layer whose backward pass is a kernel of its own."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def vmap(info, in_dims, x):
        return OwnFunction.apply(x), in_dims[0]


class Generated(OwnFunction):
    """The same, batched by torch: inside vmap its mark gets lost."""

    generate_vmap_rule = True
    vmap = torch.autograd.Function.vmap


class Unbatched(torch.autograd.Function):
    """As most people write one: with ctx in forward, which vmap does not take."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


class Own(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return self.function.apply(x @ self.weight)


class Deciding(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Recurrence(nn.Module):
    """An LSTM written out, with nn.LSTM's parameters."""

    def __init__(self):
        super().__init__()
        self.x, self.h = nn.Linear(4, 16), nn.Linear(4, 16)

    def forward(self, x):
        h = c = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            i, f, g, o = (self.x(step) + self.h(h)).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h[:, None]


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1)
