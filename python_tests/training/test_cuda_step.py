"""Tests that need a GPU: steps, recordings and failed recordings on CUDA."""

import subprocess
import sys
import warnings

import pytest
import torch
from trainings import assert_same_training, make_method, make_trainer, sinusoid

from imaml_ext import IMAML, External, GradientDescent, ProximalStrength, Trainer, module_loss
from imaml_ext.training.capture import cuda_graph, no_capture


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip("tests CUDA")
    return device


@pytest.fixture
def synchronising_raises(cuda):
    """A context in which waiting for the device raises."""

    class Context:
        def __enter__(self):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the mode is a prototype
                torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    return Context()


@pytest.mark.parametrize("kind", [cuda_graph, no_capture])
def test_a_step_on_cuda_does_not_synchronise(kind, cuda, synchronising_raises):
    trainer = make_trainer(cuda, kind)
    trainer.step()
    trainer.step()  # recorded here
    with synchronising_raises:
        for _ in range(5):
            trainer.step()
    assert len(trainer.history) == 7


def test_on_cuda_steps_are_recorded_by_default(cuda):
    trainer = Trainer(make_method(cuda), sinusoid(cuda))
    assert trainer.capture is cuda_graph
    assert trainer.optimizer.param_groups[0]["capturable"]


def test_an_inner_solver_that_reads_values_runs_unrecorded_on_cuda(cuda):
    def solve(problem):
        phi = problem.start()
        if phi.sum().item() > -1e9:
            phi = 0.9 * phi
        return phi

    method = make_method(cuda)
    method.inner = External(solve)
    trainer = make_trainer(cuda, cuda_graph, method=method)
    trainer.step()
    with pytest.warns(UserWarning, match="meta-steps are not recorded: .*synchroniz"):
        trainer.step()
    trainer.step()
    assert all(record["failed"] == 0 for record in trainer.history)


def test_a_dense_strength_is_trained_on_cuda_recorded_or_not(cuda):
    # Whether the Cholesky factor can be captured depends on the library that computes it.
    def make(capture):
        method = make_method(cuda)
        strength = ProximalStrength(method.params, form="dense")
        method = IMAML(method.loss, method.params, lam=strength, inner=method.inner)
        return make_trainer(cuda, capture, method=method)

    trainer, expected = make(cuda_graph), make(None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            trainer.step()
    assert len(caught) <= 1
    assert all("meta-steps are not recorded" in str(w.message) for w in caught)
    for _ in range(5):
        expected.step()
    assert_same_training(trainer, expected)


def test_random_numbers_of_a_recording_are_those_of_unrecorded_steps(cuda):
    def train(capture):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(1, 9), torch.nn.Dropout(), torch.nn.Linear(9, 1)
        ).to(cuda, torch.float64)
        loss = module_loss(model, torch.nn.functional.mse_loss)
        inner = GradientDescent(lr=0.005, steps=3)
        method = IMAML(loss, dict(model.named_parameters()), lam=1.0, inner=inner)
        trainer = make_trainer(cuda, capture, method=method)
        for _ in range(5):
            trainer.step()
        return [record["loss"] for record in trainer.history]

    recorded, run = train(cuda_graph), train(no_capture)
    assert recorded == pytest.approx(run)
    assert len(set(recorded)) == 5


AFTER_A_FAILURE = """
import torch
from imaml_ext.training.capture import cuda_graph

x = torch.zeros(3, device="cuda")
stream = torch.cuda.current_stream()

def synchronises():
    (x + torch.rand(3, device="cuda")).sum().item()

try:
    cuda_graph(synchronises, lambda: None)
except RuntimeError as error:
    assert "captur" in str(error), error
else:
    raise AssertionError("the synchronisation was captured")
assert torch.cuda.current_stream() == stream
torch.rand(3, device="cuda")
pool = torch.cuda.MemPool()
del pool  # aborts the process if the allocator is still in capture mode
replay = cuda_graph(lambda: x.add_(1), lambda: None)
for _ in range(4):
    replay()
assert x.tolist() == [4, 4, 4]
print("recovered")
"""


def test_after_a_failed_capture_cuda_works_as_before(cuda):
    found = subprocess.run(
        [sys.executable, "-c", AFTER_A_FAILURE], capture_output=True, text=True, check=False
    )
    assert found.stdout == "recovered\n", found.stderr
