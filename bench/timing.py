"""Timing of several systems in one run, in turn, so that a slow spell of the machine hits all of them."""

import statistics
import time
from collections.abc import Callable


def alternate(
    systems: dict[str, Callable[[], object]], *, window: float = 1.0, rounds: int = 3
) -> dict[str, list[float]]:
    """Return seconds of every call of each system.

    In each round a system first runs `window` seconds unmeasured: after a pause, or after another system's threads, a
    virtual processor takes that long to come back to speed. Then it is measured for `window` seconds, two calls at
    least.
    """
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, call in systems.items():
            start = time.perf_counter()
            call()
            while time.perf_counter() - start < window:
                call()
            start, calls = time.perf_counter(), 0
            while calls < 2 or time.perf_counter() - start < window:
                before = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - before)
                calls += 1
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds, and the number of measurements."""
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    return {
        "median_ms": statistics.median(times) * 1e3,
        "p20_ms": cuts[0] * 1e3,
        "p80_ms": cuts[3] * 1e3,
        "count": len(times),
    }
