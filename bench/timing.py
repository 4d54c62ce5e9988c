"""How one call is timed.

On a CPU: the host's clock. On a GPU a single operator is captured in a CUDA graph and its replays are timed by events,
so that the way through Python is no part of it; networks and training steps are timed by the host's clock around a call
and a synchronisation, as their user sees them. Before every call on a GPU the L2 cache is overwritten, unmeasured.
"""

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP = 3
BETWEEN_READINGS = 20  # repeats whose events are read together: reading waits for the GPU


def percentiles(values: list[float]) -> tuple[float, float]:
    """The 20th and the 80th."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return cuts[0], cuts[3]


def summary(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds, and the number of measurements."""
    low, high = percentiles(times)
    return {
        "median_ms": statistics.median(times) * 1e3,
        "p20_ms": low * 1e3,
        "p80_ms": high * 1e3,
        "count": len(times),
    }


class HostClock:
    """The host's clock around a call, and around the GPU's end of it where there is one."""

    how = "host"

    def __init__(self, call: Callable[[], object], before: Callable[[], object] = lambda: None, wait=lambda: None):
        self.call, self.before, self.wait = call, before, wait

    def once(self) -> list[float]:
        self.before()
        self.wait()
        start = time.perf_counter()
        self.call()
        self.wait()
        return [time.perf_counter() - start]


class EventClock:
    """CUDA events around the replay of a graph of the call; around the call itself where it cannot be captured."""

    def __init__(self, call: Callable[[], object], flush: Callable[[], object], cuda=torch.cuda):
        self.flush, self.cuda = flush, cuda
        try:
            self.call, self.how = graphed(call, cuda), "graph"
        except RuntimeError:
            cuda.synchronize()
            self.call, self.how = call, "events"

    def once(self) -> list[float]:
        pairs = []
        for _ in range(BETWEEN_READINGS):
            pair = [self.cuda.Event(enable_timing=True) for _ in range(2)]
            self.flush()
            pair[0].record()
            self.call()
            pair[1].record()
            pairs.append(pair)
        self.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


def graphed(call: Callable[[], object], cuda=torch.cuda) -> Callable[[], object]:
    """`call` captured in a CUDA graph, after a warm-up on a stream of its own; returns the captured result.

    A graph holds addresses and no tensors: whatever `call` holds lives as long as what is returned.
    """
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    cuda.current_stream().wait_stream(stream)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        result = call()

    def replay():
        graph.replay()
        return result

    replay.captured = call
    return replay


def l2_flush(device: str) -> Callable[[], object]:
    """Overwrites twice the L2 cache of the GPU."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device=device)
    return scratch.zero_


def clock(call: Callable[[], object], device: str, *, network: bool) -> HostClock | EventClock:
    """What times `call`; `network`: as its user sees it, the way through Python included."""
    if device == "cpu":
        return HostClock(call)
    flush = l2_flush(device)
    return HostClock(call, flush, torch.cuda.synchronize) if network else EventClock(call, flush)


def measure(source: HostClock | EventClock, window: float, least: int = 2) -> list[float]:
    """Seconds of every call, for `window` seconds and `least` calls, after as long a window unmeasured.

    After a pause, or after other processes' threads, a virtual processor takes that long to come back to speed; a GPU
    raises its clocks.
    """
    start = time.perf_counter()
    source.once()
    while time.perf_counter() - start < window:
        source.once()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < least or time.perf_counter() - start < window:
        times += source.once()
    return times
