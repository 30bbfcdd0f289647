"""A recorded meta-gradient equals the eager one of the batch that it is called with."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tape import Tape
from trainings import assert_close, make_method, sinusoid

from imaml_ext import (
    ConjugateGradient,
    RecordedMetaGradient,
    TaskBatch,
    Trainer,
    implicit_meta_grad,
)
from imaml_ext.data import Sinusoid
from imaml_ext.training.capture import cuda_graph, no_capture

# ---- A meta-gradient -------------------------------------------------------------------------


def test_a_recorded_meta_gradient_follows_the_batch_and_theta(device, capture):
    method = make_method(
        device, lam=torch.tensor(2.0, device=device, dtype=torch.float64, requires_grad=True)
    )
    source = sinusoid(device, 5)
    recorded = RecordedMetaGradient(method.meta_gradient, source.sample(0), capture=capture)
    for step in range(1, 4):
        expected = method.meta_gradient(source.sample(step))
        got = recorded(source.sample(step))
        assert_close(got.named().values(), expected.named().values(), rtol=1e-5, atol=1e-7)
        assert torch.equal(got.linear.status, expected.linear.status)
        assert_close(
            [got.linear.error_estimate], [expected.linear.error_estimate], rtol=1e-4, atol=1e-9
        )
        with torch.no_grad():
            for tensor in method.learned().values():
                tensor.mul_(0.9)


def test_any_function_of_a_batch_can_be_recorded(device, capture):
    method = make_method(device)

    def meta_gradient(batch):
        return implicit_meta_grad(
            method.loss, method.params, batch.support, batch.query, lam=3.0, linear=method.linear
        )

    source = sinusoid(device, 5)
    recorded = RecordedMetaGradient(meta_gradient, source.sample(0), capture=capture)
    expected = meta_gradient(source.sample(1))
    got = recorded(source.sample(1))
    assert_close(got.params.values(), expected.params.values(), rtol=1e-5, atol=1e-7)
    assert_close([got.query_loss], [expected.query_loss])


def test_a_batch_of_another_shape_is_refused_and_nothing_is_written(device, capture):
    method, source = make_method(device), sinusoid(device, 5)
    batch = source.sample(0)
    recorded = RecordedMetaGradient(method.meta_gradient, batch, capture=capture)
    before = [t.clone() for t in recorded(batch).params.values()]
    with pytest.raises(ValueError, match=r"the batch must have .*\[5, 10, 1\].* got .*\[4, 10, 1"):
        recorded(sinusoid(device, 4).sample(1))
    other = source.sample(1)
    with pytest.raises(ValueError, match="the batch must have"):
        recorded(TaskBatch(other.support, (other.query[0], other.query[1].float())))
    assert_close(recorded(batch).params.values(), before, rtol=0, atol=0)


def test_the_error_of_a_failed_recording_has_the_cause(device):
    method = make_method(device)
    size = method.layout.dim
    method.lam = 2 * torch.eye(size, dtype=torch.float64, device=device)
    tape = Tape(refuses=torch.ops.aten.linalg_cholesky_ex.default)
    with pytest.raises(RuntimeError, match=r"cusolver error.*linalg_cholesky_ex"):
        RecordedMetaGradient(method.meta_gradient, sinusoid(device, 2).sample(0), capture=tape)


def test_a_cuda_graph_needs_cuda():
    method, batch = make_method("cpu"), Sinusoid(tasks=2).sample(0)
    with pytest.raises(RuntimeError, match="needs a batch on CUDA, got one on cpu"):
        RecordedMetaGradient(method.meta_gradient, batch, capture=cuda_graph)


# ---- Compiled, on the CPU ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled_and_eager():
    lam = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    method, source = make_method("cpu", lam=lam), sinusoid("cpu", 5)
    return RecordedMetaGradient(method.meta_gradient, source.sample(0)), method, source


def test_a_compiled_meta_gradient_equals_the_eager_one(compiled_and_eager):
    compiled, method, source = compiled_and_eager
    theta = [t.detach().clone() for t in method.learned().values()]
    for step in range(1, 3):
        expected = method.meta_gradient(source.sample(step))
        got = compiled(source.sample(step))
        assert_close(got.named().values(), expected.named().values(), rtol=1e-9, atol=1e-12)
        assert_close(
            [got.query_loss, got.inner.residual], [expected.query_loss, expected.inner.residual]
        )
        assert_close(
            [got.linear.error_estimate], [expected.linear.error_estimate], rtol=1e-6, atol=1e-12
        )
        assert torch.equal(got.linear.status, expected.linear.status)
        assert torch.equal(got.linear.steps, expected.linear.steps)
        with torch.no_grad():  # calls read the current theta and lam
            for tensor in method.learned().values():
                tensor.mul_(0.9)
    with torch.no_grad():
        for tensor, value in zip(method.learned().values(), theta, strict=True):
            tensor.copy_(value)


def test_compiled_training_equals_eager_training(compiled_and_eager):
    compiled, method, source = compiled_and_eager
    theta = [t.detach().clone() for t in method.learned().values()]
    runs = []
    for meta_gradient in (None, compiled):
        with torch.no_grad():
            for tensor, value in zip(method.learned().values(), theta, strict=True):
                tensor.copy_(value)
        trainer = Trainer(method, source, meta_gradient=meta_gradient)
        losses = [trainer.step()["loss"] for _ in range(4)]
        runs.append(
            [torch.tensor(losses), *(t.detach().clone() for t in method.learned().values())]
        )
    assert_close(*runs, rtol=1e-7, atol=1e-10)


def test_a_compiled_meta_gradient_reports_failed_tasks(compiled_and_eager):
    compiled, _, source = compiled_and_eager
    batch = source.sample(1)
    batch.support[1][2] = torch.inf
    out = compiled(batch)
    assert out.failed.tolist() == [False, False, True, False, False]
    assert all(t.isnan().all() for t in out.params.values())


def test_a_compiled_function_may_read_values_and_use_any_solver():
    cg = ConjugateGradient(max_iter=20, rtol=1e-4, preconditioner="jacobi")
    method, source = make_method("cpu", linear=cg), sinusoid("cpu", 2)

    def meta_gradient(batch):
        out = method.meta_gradient(batch)
        assert float(out.query_loss.sum()) > 0
        return out

    compiled = RecordedMetaGradient(meta_gradient, source.sample(0))
    want, got = method.meta_gradient(source.sample(1)), compiled(source.sample(1))
    assert_close(got.named().values(), want.named().values(), rtol=1e-7, atol=1e-10)
    assert torch.equal(got.linear.steps, want.linear.steps)


def test_replaced_parameters_are_read(compiled_and_eager):
    compiled, method, source = compiled_and_eager
    parameter = next(iter(method.params.values()))
    memory = parameter.data
    parameter.data = memory.clone() * 1.1
    try:
        got, want = compiled(source.sample(1)), method.meta_gradient(source.sample(1))
    finally:
        parameter.data = memory
    assert_close(got.named().values(), want.named().values(), rtol=1e-9, atol=1e-12)


def test_what_cannot_be_compiled_is_an_error():
    method, source = make_method("cpu"), sinusoid("cpu", 2)

    def noisy(params, data):
        return method.loss(params, data) * torch.rand(())

    def meta_gradient(batch):
        return implicit_meta_grad(noisy, method.params, batch.support, batch.query, lam=1.0)

    with pytest.raises(RuntimeError, match=r"cannot be recorded: no program for aten.rand"):
        RecordedMetaGradient(meta_gradient, source.sample(0))
    with pytest.raises(RuntimeError, match="cannot be recorded: it evaluates no loss"):
        RecordedMetaGradient(lambda batch: batch, source.sample(0))


def test_threads_do_not_mix_their_batches(compiled_and_eager):
    compiled, _, source = compiled_and_eager
    batches = [source.sample(step) for step in range(8)]
    expected = [compiled(batch).query_loss.clone() for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda k: compiled(batches[k % 8]).query_loss, range(200)))
    assert_close(got, [expected[k % 8] for k in range(200)])


def test_a_meta_gradient_argument_is_accepted_on_the_cpu_only(device):
    method, source = make_method(device), sinusoid(device, 2)
    if device.type == "cpu":
        Trainer(method, source, meta_gradient=method.meta_gradient)
        with pytest.raises(ValueError, match="meta_gradient is for the CPU"):
            Trainer(method, source, meta_gradient=method.meta_gradient, capture=no_capture)
    else:
        with pytest.raises(ValueError, match="meta_gradient is for the CPU"):
            Trainer(method, source, meta_gradient=method.meta_gradient)
