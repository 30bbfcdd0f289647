"""Batch norm with the statistics of the support set."""

import torch
from torch import nn
from torch.func import functional_call, vmap

from imaml_ext.experiments.models import conv4
from imaml_ext.training.support_statistics import SupportStatistics


def running_statistics_of(model, support, query):
    """Outputs with torch's running statistics of the support set, its variance made biased."""
    twin = conv4(5, channels=3, filters=4, image=16, pool=True).to(support)
    for i, layer in enumerate(twin):
        if isinstance(layer, nn.BatchNorm2d):
            twin[i] = nn.BatchNorm2d(layer.num_features, momentum=1.0).to(support)
    twin.load_state_dict(model.state_dict(), strict=False)
    counts, hooks = [], []
    for layer in twin:
        if isinstance(layer, nn.BatchNorm2d):
            hooks.append(
                layer.register_forward_hook(lambda _, x, __: counts.append(x[0][:, 0].numel()))
            )
    twin.train()(support)
    for hook in hooks:
        hook.remove()
    norms = [layer for layer in twin if isinstance(layer, nn.BatchNorm2d)]
    for norm, count in zip(norms, counts, strict=True):
        norm.running_var *= (count - 1) / count
    return twin.eval()(query)


def test_support_statistics_are_those_of_the_support_set_alone():
    model = conv4(5, channels=3, filters=4, image=16, pool=True).double()
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    support, query = torch.rand(2, 6, 3, 16, 16, dtype=torch.float64)
    outputs = SupportStatistics(model)
    params = dict(model.named_parameters())
    got = outputs(params, support, query)
    torch.testing.assert_close(got, running_statistics_of(model, support, query))
    # Differs from the paper's evaluation, which uses the statistics of the query set.
    assert not torch.allclose(got, functional_call(model, params, (query,)))
    torch.testing.assert_close(outputs(params, support, query[:1]), got[:1])


def test_support_statistics_for_many_tasks_and_other_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    outputs = SupportStatistics(model)
    params = {name: torch.rand(6, *p.shape) for name, p in model.named_parameters()}
    support, query = torch.rand(6, 5, 3), torch.rand(6, 2, 3)
    together = vmap(outputs)(params, support, query)
    for i in range(6):
        alone = outputs({name: p[i] for name, p in params.items()}, support[i], query[i])
        torch.testing.assert_close(together[i], alone)
    assert isinstance(model[1], nn.BatchNorm1d)  # the model was copied
