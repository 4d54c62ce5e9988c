"""How calls are timed, on a CPU and, with CUDA's part played by a stand-in, on a GPU; the verdict of a comparison."""

import contextlib
import statistics
import time

import pytest

from bench import compare, timing


class FakeCUDA:
    """Notes what is asked of CUDA, in order; an event's time is the number of what went before it."""

    def __init__(self, captures: bool = True):
        self.log: list[str] = []
        self.captures = captures

    def Event(self, enable_timing):
        return _Event(self)

    def Stream(self):
        return _Stream(self)

    def current_stream(self):
        return _Stream(self)

    def CUDAGraph(self):
        return _Graph(self)

    def synchronize(self):
        self.log.append("synchronize")

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append("side stream")
        yield

    @contextlib.contextmanager
    def graph(self, graph):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.log.append("capture")
        yield
        self.log.append("captured")


class _Event:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.cuda.log.append("event")
        self.at = len(self.cuda.log)

    def elapsed_time(self, end):
        assert self.cuda.log[-1] == "synchronize", "read before the GPU was waited for"
        return float(end.at - self.at)  # milliseconds


class _Stream:
    def __init__(self, cuda):
        self.cuda = cuda

    def wait_stream(self, other):
        self.cuda.log.append("wait")


class _Graph(_Stream):
    def replay(self):
        self.cuda.log.append("replay")


def test_host_clock_measures_the_call_alone():
    def slow():
        time.sleep(0.02)

    times = timing.measure(timing.HostClock(lambda: time.sleep(0.002), before=slow), window=0.1)
    assert 0.002 <= statistics.median(times) < 0.012


def test_host_clock_waits_on_both_sides():
    log = []
    clock = timing.HostClock(lambda: log.append("call"), lambda: log.append("flush"), lambda: log.append("wait"))
    assert len(clock.once()) == 1
    assert log == ["flush", "wait", "call", "wait"]


def test_event_clock_replays_a_graph_after_a_flush():
    cuda = FakeCUDA()
    clock = timing.EventClock(lambda: cuda.log.append("call"), lambda: cuda.log.append("flush"), cuda)
    assert clock.how == "graph"
    warm, capture = ["wait", "side stream", *["call"] * timing.WARM_UP, "wait"], ["capture", "call", "captured"]
    assert cuda.log == warm + capture
    cuda.log.clear()
    times = clock.once()
    assert cuda.log == ["flush", "event", "replay", "event"] * timing.BETWEEN_READINGS + ["synchronize"]
    assert times == [2e-3] * timing.BETWEEN_READINGS  # the replay and the event after it


def test_event_clock_without_capture_times_the_call():
    cuda = FakeCUDA(captures=False)
    clock = timing.EventClock(lambda: cuda.log.append("call"), lambda: cuda.log.append("flush"), cuda)
    assert clock.how == "events"
    cuda.log.clear()
    clock.once()
    assert cuda.log[:4] == ["flush", "event", "call", "event"]


def test_measure_warms_up_and_repeats():
    calls = []
    times = timing.measure(timing.HostClock(lambda: calls.append(time.sleep(0.01))), window=0.0, least=4)
    assert len(times) == 4
    assert len(calls) == 5  # one is not measured


def test_summary_is_median_and_percentiles():
    found = timing.summary([0.005, 0.001, 0.003, 0.002, 0.004, 0.006])
    assert found == pytest.approx({"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0, "count": 6})
    assert timing.summary([0.002]) == pytest.approx({"median_ms": 2.0, "p20_ms": 2.0, "p80_ms": 2.0, "count": 1})


def rounds(this, base, again):
    return {"this": this, "base": base, "base again": again}


STEADY, NOISY = [1.0, 1.01, 0.99, 1.0, 1.0], [1.0, 1.3, 0.8, 1.2, 1.0]


@pytest.mark.parametrize(
    ("this", "base", "again", "word"),
    [
        ([0.8] * 5, STEADY, STEADY[::-1], "faster"),
        ([1.25] * 5, STEADY, STEADY[::-1], "SLOWER"),
        ([1.001] * 5, STEADY, STEADY[::-1], "within noise"),
        ([0.9] * 5, NOISY, [1.3, 1.0, 1.2, 0.8, 1.0], "within noise"),  # the base differs from itself by more
        ([0.5, 1.5, 0.5, 1.5, 0.6], [1.0] * 5, [1.0] * 5, "within noise"),  # on no side in four of five rounds
    ],
    ids=["faster", "slower", "same", "noisy_base", "noisy_change"],
)
def test_compare_verdict(this, base, again, word):
    found = compare.verdict(rounds(this, base, again))
    assert found["verdict"] == word
    assert found["ratio"] == pytest.approx(statistics.median(b / t for b, t in zip(base, this, strict=True)))
    low, high = found["noise"]
    assert low <= 1 <= high
    assert low * high == pytest.approx(1)


def test_compare_unknown_commit_is_named():
    from fused_resnet.options import UsageError

    with pytest.raises(UsageError, match="git knows no commit 'no-such-commit'"):
        compare.worktree("no-such-commit")
