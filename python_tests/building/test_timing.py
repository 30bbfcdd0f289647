"""How the benchmarks time: only equal results, in turn, on CUDA by events."""

import math

import pytest
import torch


def test_different_results_are_not_timed(benchmark):
    harness = benchmark("harness")
    right, wrong = torch.ones(3), torch.tensor([1.0, 1.0, 1.001])
    with pytest.raises(SystemExit, match="wrong differs by"):
        harness.check_agreement({"right": lambda: right, "wrong": lambda: wrong}, int, 1e-5)
    with pytest.raises(SystemExit, match="nan"):
        harness.check_agreement({"right": lambda: right, "nan": lambda: right / 0 * 0}, int, 1e-5)


def test_a_result_in_a_shared_buffer_is_compared_before_it_is_overwritten(benchmark):
    buffer = torch.ones(3, dtype=torch.float64)
    with pytest.raises(SystemExit, match="second differs"):
        benchmark("harness").check_agreement(
            {"first": lambda: buffer, "second": lambda: buffer.fill_(2.0)}, int, 1e-5
        )


def test_a_peer_that_is_not_installed_is_reported(benchmark, monkeypatch, capsys):
    harness = benchmark("harness")
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert not harness.has_peer("torchopt")
    assert "left out, not installed: TorchOpt" in capsys.readouterr().err


# ---- on CUDA, with a clock that the calls advance -----------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Milliseconds that have passed on a simulated device."""
    passed = [0.0]

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.at = passed[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return passed


CUDA = torch.device("cuda")


def counted(clock, milliseconds):
    def call():
        clock[0] += milliseconds
        call.made += 1

    call.made = 0
    return call


def test_a_sample_is_the_mean_of_twenty_short_calls_or_one_long_call(benchmark, clock):
    timing = benchmark("cuda_timing")
    for short, calls in ((True, 20), (False, 1)):
        call = counted(clock, 3.0)
        assert timing.cuda_seconds(call, CUDA, short=short) == pytest.approx(3e-3)
        assert call.made == calls


def test_every_copy_of_the_operands_is_used_once_in_a_sample(benchmark, clock, monkeypatch):
    timing = benchmark("cuda_timing")
    calls = [counted(clock, milliseconds) for milliseconds in (1.0, 2.0, 6.0)]
    rotated = timing.Rotated(calls)
    assert timing.cuda_seconds(rotated, CUDA, short=True) == pytest.approx(3e-3)
    assert [call.made for call in calls] == [1, 1, 1]
    monkeypatch.setattr(timing, "cuda_graph", lambda function, warmup: function)
    graph = timing.Captured(rotated)
    assert timing.cuda_seconds(graph, CUDA, short=True) == pytest.approx(3e-3)
    assert [call.made for call in calls] == [2, 2, 2]


def test_the_copies_exceed_the_cache_and_are_at_least_twenty(benchmark, monkeypatch):
    copies = benchmark("cuda_timing").copies
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("", (), {"L2_cache_size": 50e6})
    )
    assert copies(10**9, CUDA) == 20
    assert copies(10**6, CUDA) == 100
    assert copies(10**6, torch.device("cpu")) == 1


def test_the_time_of_jax_includes_waiting_for_the_result(benchmark, clock, monkeypatch):
    timing = benchmark("cuda_timing")
    waited = []

    class Array:
        def block_until_ready(self):
            clock[0] += 5.0
            waited.append(self)

    class Call:
        def submit(self):
            return Array()

    monkeypatch.setattr(timing.time, "perf_counter", lambda: 1e-3 * clock[0])
    assert timing.cuda_seconds(Call(), CUDA, short=True) == pytest.approx(5e-3)
    assert len(waited) == len(set(waited)) == 20


def test_a_call_that_cannot_be_captured_is_reported(benchmark, monkeypatch, capsys):
    timing = benchmark("cuda_timing")

    def refuse(function, warmup):
        raise RuntimeError("it synchronises\nat length")

    monkeypatch.setattr(timing, "cuda_graph", refuse)
    assert timing.captured("some way", int) == {}
    assert "left out, cannot be captured: some way: it synchronises\n" in capsys.readouterr().err


def test_calls_on_cuda_are_prepared_once_per_turn_and_timed_by_events(benchmark, clock):
    calls = {"fast": counted(clock, 1.0), "slow": counted(clock, 100.0)}
    prepared = []
    times = benchmark("harness").time_in_turn(
        calls, lambda: prepared.append(clock[0]), CUDA, 3, warm_up=1
    )
    assert times["fast"] == pytest.approx({"median": 1e-3, "min": 1e-3, "max": 1e-3})
    assert times["slow"] == pytest.approx({"median": 0.1, "min": 0.1, "max": 0.1})
    assert calls["fast"].made == 1 + 3 * 20  # the first turn finds that it is short
    assert calls["slow"].made == 4
    assert len(prepared) == 2 * 4


def test_tf32_keeps_eleven_bits_and_rounds_ties_to_even(benchmark):
    to_tf32, emulated = benchmark("tf32").to_tf32, benchmark("tf32").EmulatedTF32
    step = 2.0**-10  # of numbers between 1 and 2
    given = [1 + step, 1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -3.0, 0.0, math.inf, math.nan]
    expected = [1 + step, 1, 1 + 2 * step, 1 + step, -3.0, 0.0, math.inf, math.nan]
    got = to_tf32(torch.tensor(given))
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
    a, b = torch.randn(2, 4, 4)
    with emulated():
        product, total = a @ b, a + b
    assert torch.equal(product, to_tf32(a) @ to_tf32(b))
    assert torch.equal(total, a + b)
    assert not torch.equal(product, a @ b)
