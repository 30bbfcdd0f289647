import dataclasses
import importlib
import os
from pathlib import Path

import hypothesis
import pytest
import torch
from fuzz import tried
from matplotlib.figure import Figure
from tape import Tape

import imaml_ext
from imaml_ext.experiments.models import conv4
from imaml_ext.experiments.registry import DATASETS
from imaml_ext.training.capture import cuda_graph

CUDA = torch.cuda.is_available() and bool(imaml_ext.build_info()["cuda"])


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not CUDA, reason="no GPU, or built without CUDA")
        ),
    ]
)
def device(request, monkeypatch):
    if request.param == "cuda":  # the same inputs as on the CPU, which the tolerances fit
        for name in ("rand", "randn", "randint", "rand_like", "randn_like"):
            monkeypatch.setattr(torch, name, _drawn_on_the_cpu(getattr(torch, name)))
    return torch.device(request.param)


def _drawn_on_the_cpu(draw):
    def drawn(*arguments, device=None, **settings):
        like = arguments[0] if isinstance(arguments[0], torch.Tensor) else None
        if like is not None:
            device, arguments = device or like.device, (like.cpu(), *arguments[1:])
        return draw(*arguments, **settings).to(device or "cpu")

    return drawn


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def capture(device):
    """Records work as a CUDA graph; on the CPU, a simulation of one."""
    return cuda_graph if device.type == "cuda" else Tape()


@pytest.fixture
def adam_capturable_on_the_cpu_too(monkeypatch):
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_, **__: ["cpu", "cuda"])


# HYPOTHESIS_PROFILE=thorough pytest -m fuzz
for _profile, _inputs in (("default", 30), ("thorough", 1000)):
    hypothesis.settings.register_profile(
        _profile,
        max_examples=_inputs,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_terminal_summary(terminalreporter):
    if tried:
        terminalreporter.section("fuzz inputs")
        for name, count in sorted(tried.items()):
            terminalreporter.line(f"{count:8}  {name}")
        terminalreporter.line(f"{tried.total():8}  total")


# The tests are small: a second thread would mostly wait.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _skip_rendering(request, monkeypatch):
    """Rendering its figures is most of the time of a small training."""
    if "renders" not in request.keywords:
        monkeypatch.setattr(Figure, "tight_layout", lambda figure: None)
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b"not drawn"))


@pytest.fixture(scope="session")
def omniglot_root():
    """Folder of Omniglot in torchvision's layout, from the environment."""
    root = os.environ.get("IMAML_TEST_DATA")
    if root is None or not (Path(root) / "omniglot-py").is_dir():
        pytest.skip("set IMAML_TEST_DATA to a folder that holds omniglot-py")
    return Path(root)


@pytest.fixture
def small_omniglot(monkeypatch):
    """In place of Omniglot, five classes of 20 random images, and a network of four filters."""
    images = torch.randint(256, (5, 20, 28, 28), dtype=torch.uint8)
    small = dataclasses.replace(
        DATASETS["omniglot"], images=lambda *_: dict.fromkeys(("train", "val", "test"), images)
    )
    monkeypatch.setitem(DATASETS, "omniglot", small)
    monkeypatch.setitem(conv4.__kwdefaults__, "filters", 4)
