"""The calls of torch.cuda that record a CUDA graph, in order, and what a failure restores."""

import pytest
import torch

from imaml_ext import _tracing
from imaml_ext.training.capture import cuda_graph


class FakeCuda:
    """A fake of the parts of torch.cuda that a recording calls, with a log of the calls.

    Args:
        ends_late: whether a failed capture leaves the allocator in capture mode, as up to torch
            2.11, or ends that before it raises.
    """

    def __init__(self, monkeypatch, ends_late=True):
        self.log, self.current, self.mode, self.ends_late = [], "caller", 0, ends_late
        self.allocates_to, self.generator_captures, self.random = None, False, 7
        cuda = self

        class Stream:
            def wait_stream(self, other):
                cuda.log.append(f"{self.name} waits")

            def __init__(self, name="side"):
                self.name = name

        class Within:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                self.before, cuda.current = cuda.current, self.stream.name

            def __exit__(self, *_):
                cuda.current = self.before

        class Graph:
            def replay(self):
                cuda.log.append("replay")

        class Capture(Within):
            def __init__(self, graph, pool="its own", stream=None):
                super().__init__(stream)
                self.pool = pool

            def __enter__(self):
                super().__enter__()
                cuda.log.append("begin")
                cuda.allocates_to, cuda.generator_captures = self.pool, True

            def __exit__(self, kind, *_):
                if kind is not None:  # as in torch: the stream stays, and this hides the cause
                    if not cuda.ends_late:
                        cuda.allocates_to = None
                    raise RuntimeError("operation failed due to a previous error during capture")
                super().__exit__()
                cuda.log.append("end")
                cuda.allocates_to, cuda.generator_captures = None, False

        def end_allocation(device, pool):
            if cuda.allocates_to != pool:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            cuda.allocates_to = None

        fakes = {
            "Stream": Stream,
            "stream": Within,
            "CUDAGraph": Graph,
            "graph": Capture,
            "graph_pool_handle": lambda: (0, 5),
            "current_device": lambda: 3,
            "current_stream": lambda: Stream(self.current),
            "set_stream": lambda stream: setattr(self, "current", stream.name),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "get_rng_state": lambda device: self.random,
            "set_rng_state": lambda state, device: setattr(self, "random", state),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocation, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda *of: self.log.append(f"release {of}"),
            raising=False,
        )  # fmt: skip
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **kw: zeros(*size, **kw))

    def is_restored(self):
        idle = self.allocates_to is None and not self.generator_captures
        return idle and (self.current, self.mode, self.random) == ("caller", 0, 7)


def test_a_cuda_graph_is_warmed_up_on_its_stream_then_captured(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def warmup():
        cuda.random += 1
        assert _tracing.is_recording()
        cuda.log.append(f"warmup on {cuda.current}, {cuda.mode}")

    def function():
        assert cuda.random == 7
        assert _tracing.is_recording()
        cuda.log.append(f"run on {cuda.current}, into {cuda.allocates_to}")
        return "result"

    replay = cuda_graph(function, warmup)
    warmed_up = ["warmup on side, 0"] * 2 + ["warmup on side, error"]
    around = ["side waits", *warmed_up, "caller waits"]
    around += ["begin", "run on side, into (0, 5)", "end"]
    assert cuda.log == around
    assert not _tracing.is_recording()
    assert replay() == "result"
    assert cuda.log == [*around, "replay"]
    assert cuda.is_restored()


@pytest.mark.parametrize("ends_late", [True, False], ids=["torch 2.11", "torch 2.13"])
def test_a_failed_capture_raises_its_cause_and_restores_the_state(ends_late, monkeypatch):
    cuda = FakeCuda(monkeypatch, ends_late)

    def fails():
        raise RuntimeError("the cause")

    with pytest.raises(RuntimeError, match=r"^the cause$"):
        cuda_graph(fails, lambda: None)
    assert cuda.is_restored()
    # If torch ends the allocation itself, it releases the pool too.
    released = ["release (3, (0, 5))"] if ends_late else []
    assert cuda.log == ["side waits", "caller waits", "begin", *released, "begin", "end"]
    assert not _tracing.is_recording()


def test_a_failed_warm_up_raises_its_cause_and_is_waited_for(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def fails():
        cuda.random += 1
        raise RuntimeError("the cause")

    with pytest.raises(RuntimeError, match=r"^the cause$"):
        cuda_graph(lambda: None, fails)
    assert cuda.log == ["side waits", "caller waits"]
    assert cuda.is_restored()
