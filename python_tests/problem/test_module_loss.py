"""Mistakes in what module_loss gets, and the names and shapes in their messages."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imaml_ext import implicit_meta_grad, module_loss
from imaml_ext.problem.module_loss import call_loss


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))


NAMES = {
    "misspelt": (
        "0.weight",
        "0.wieght",
        r"is not a parameter of the model: the nearest name is '0.",
    ),
    "of a wrapper": ("2.bias", "module.2.bias", r"pass names without 'module\.', those of"),
    "compiled": ("2.bias", "_orig_mod.2.bias", r"pass names without '_orig_mod\.', those of"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_that_the_model_does_not_have_is_named(name):
    right, wrong, message = NAMES[name]
    model = net()
    params = {wrong if n == right else n: p.detach() for n, p in model.named_parameters()}
    loss, x = module_loss(model, F.mse_loss), torch.randn(2, 5, 4)
    for call in (
        lambda: loss(params, (x[0], x[0])),
        lambda: implicit_meta_grad(loss, params, (x, x), (x, x), lam=1.0),
    ):
        with pytest.raises(ValueError, match=rf"^params\['{wrong}'\] .*{message}") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_parameter_of_another_shape_is_named():
    model = net()
    params = {n: p.detach() for n, p in model.named_parameters()}
    params["0.weight"] = params["0.weight"].T.contiguous()
    x = torch.randn(2, 5, 4)
    message = r"^params\['0.weight'\] must be of shape \[3, 4\], as in the model, got \[4, 3\]$"
    with pytest.raises(ValueError, match=message):
        implicit_meta_grad(module_loss(model, F.mse_loss), params, (x, x), (x, x), lam=1.0)


def test_hyper_parameters_of_another_loss_are_ignored():
    """As shared parameters, and where a metric is evaluated."""
    model = net()
    plain = module_loss(model, F.mse_loss)
    params = {n: p.detach() for n, p in model.named_parameters()}

    def decayed(params, data):
        squares = sum(params[n].square().sum() for n, _ in model.named_parameters())
        return plain({n: p for n, p in params.items() if n != "decay"}, data) + (
            params["decay"].exp() * squares
        )

    x = torch.randn(2, 5, 4)
    out = implicit_meta_grad(
        decayed, params, (x, x), (x, x), lam=1.0, query_loss=plain,
        shared={"decay": torch.tensor(-1.0)},
    )  # fmt: skip
    assert out.shared["decay"] != 0
    phi = out.adapted | {"decay": torch.zeros(2)}
    torch.testing.assert_close(torch.func.vmap(plain)(phi, (x, x)), out.query_loss)
    assert torch.func.vmap(plain.outputs)(phi, x).shape == (2, 5, 4)


def wrapped(name):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    Wrapper.__name__ = name
    return Wrapper(net())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.DataParallel(net()),
        lambda: wrapped("DistributedDataParallel"),
        lambda: wrapped("FullyShardedDataParallel"),
        lambda: wrapped("FSDPModule"),
    ],
)
def test_a_model_that_distributes_its_computations_is_refused(make, inside):
    model = nn.Sequential(make()) if inside else make()
    message = r"^module_loss cannot use \w+, .*: pass model.module, .*Trainer\(process_group=...\)"
    with pytest.raises(TypeError, match=message) as caught:
        module_loss(model, F.mse_loss)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_other_arguments_of_the_wrong_kind_are_named():
    model = net()
    with pytest.raises(TypeError, match=r"^model must be an nn.Module.*got the function mse_loss"):
        module_loss(F.mse_loss, model)
    with pytest.raises(TypeError, match=r"got the class Linear: pass Linear\(\.\.\.\)$"):
        module_loss(nn.Linear, F.mse_loss)
    with pytest.raises(TypeError, match=r"^criterion must be a function .*got the model itself$"):
        module_loss(model, model)
    with pytest.raises(TypeError, match=r"^criterion must be a function .*got ModuleLoss$"):
        module_loss(model, module_loss(model, F.mse_loss))
    with pytest.raises(TypeError, match=r"^criterion must be a function .*got str$"):
        module_loss(model, "mse")
    with pytest.raises(TypeError, match=r"^module_loss cannot use a scripted module"):
        module_loss(torch.jit.script(nn.Linear(2, 2)), F.mse_loss)


X, LABELS = torch.randn(2, 6, 4), torch.randint(3, (2, 6))
MISTAKES = {
    "features": (RuntimeError, F.cross_entropy, torch.randn(2, 6, 5), LABELS,
                 r"^0 \(Linear\): .* \(in model\(x\) with x \[6, 5\] float32 of one task\)$"),
    "type": (Exception, F.cross_entropy, LABELS[..., None].expand(2, 6, 4), LABELS,
             r"^0 \(Linear\): .* \(in model\(x\) with x \[6, 4\] int64 of one task\)$"),
    "examples": (ValueError, F.cross_entropy, X, LABELS[:, :5],
                 r"^the criterion: Expected input batch_size \(6\).*outputs \[6, 3\] float32 and"),
    "float labels": (RuntimeError, F.cross_entropy, X, LABELS.float(),
                     r"^the criterion: .*outputs \[6, 3\] float32 and y \[6\] float32 of one task"),
    "column": (AssertionError, F.cross_entropy, X, LABELS[..., None],
               r"^the criterion: .*outputs \[6, 3\] float32 and y \[6, 1\] int64 of one task"),
    "classes": (Exception, F.cross_entropy, X, LABELS + 3, r"^the criterion: .*of one task"),
    "arguments": (TypeError, nn.Linear(3, 3), X, LABELS,
                  r"^the criterion: .*takes 2 positional.* \(in criterion\(outputs, y\) with"),
    "own": (ValueError, lambda o, y: (_ for _ in ()).throw(ValueError("first\nsecond")), X, LABELS,
            r"^the criterion: first \(in criterion"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_errors_in_the_data_name_the_layer_or_the_criterion_and_the_shapes_of_one_task(name):
    kind, criterion, x, y, message = MISTAKES[name]
    model = nn.Sequential(nn.Linear(4, 3))
    loss, params = module_loss(model, criterion), dict(model.named_parameters())
    with pytest.raises(kind, match=message) as caught:
        implicit_meta_grad(loss, params, (x, y), (x, y), lam=1.0)
    assert "\n" not in str(caught.value)
    assert type(caught.value.__cause__) is type(caught.value)


def test_an_error_of_another_class_is_not_changed():
    class Own(ValueError):
        pass

    def fail(outputs, y):
        raise Own("as it was")

    with pytest.raises(Own, match=r"^as it was$"):
        module_loss(net(), fail)(dict(net().named_parameters()), (X[0], X[0]))


def test_an_error_in_a_plain_loss_names_it_and_the_shapes_of_one_task():
    def ridge(params, data):
        x, y = data
        return (x.T @ params["w"] - y).square().mean()

    data = torch.randn(2, 5, 3), torch.randn(2, 5)
    message = (
        r"^the loss ridge: .* \(in .* with params \[3\] float32 and data \[5, 3\] .* of one task\)$"
    )
    with pytest.raises(RuntimeError, match=message) as caught:
        torch.func.vmap(partial(call_loss, ridge))({"w": torch.randn(2, 3)}, data)
    assert "\n" not in str(caught.value)
