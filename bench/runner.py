"""Runs a suite: every case by every system, in turn, so that a slow spell of the machine hits all of them."""

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

from bench.floors import Cost
from bench.pool import Failed, Pool
from bench.record import Record
from bench.systems import OURS, does, find, is_ours, ours
from bench.timing import summary

SUITES = ("layers", "ops", "models", "training", "memory", "startup", "accuracy")
CEILINGS_LAST = 120.0  # seconds until the ceilings of a CPU are measured again: its speed drifts


@dataclass(frozen=True)
class Options:
    """What is measured; see `python -m bench --help`."""

    device: str
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    models: tuple[str, ...]
    backends: tuple[str, ...]
    peers: tuple[str, ...]
    size: int = 224
    rounds: int = 3
    window: float = 1.0
    limit: float = 600.0
    quick: bool = False
    only: str = ""


def suite(name: str) -> ModuleType:
    return importlib.import_module(f"bench.suites.{name}")


def systems(found: ModuleType, case: dict, options: Options) -> list[str]:
    """The systems of a case, peers first; fused_resnet by the automatic choice and by each backend that was named."""
    task = found.TASKS[case.get("mode")]
    names = [*options.peers, *ours(), *(f"{OURS}@{backend}" for backend in options.backends)]
    model = case.get("model", "")
    return [name for name in names if does(name, task, options.device) and find(name).takes(model)]


def run(found: ModuleType, options: Options, record: Record, show: Callable[[str], None] = print) -> list[dict]:
    """Run a suite and return its rows. A row is written as soon as its case is done."""
    rows = []
    with Pool() as pool:
        ceilings = Ceilings(pool, options)
        for case in wanted(found, options):
            show(f"\n{found.title(case)}")
            timed = hasattr(found, "prepare")
            measured = _timed(found, case, options, pool, ceilings) if timed else _untimed(found, case, options, pool)
            for row in measured:
                row = {"suite": found.__name__.rpartition(".")[2], "case": case, **row}
                record.row(row)
                rows.append(row)
                show(line(row))
    return rows


def wanted(found: ModuleType, options: Options) -> list[dict]:
    """The cases of a suite that the options leave."""
    return [case for case in found.cases(options) if options.only in found.title(case)]


class Ceilings:
    """The machine's ceilings, measured when they are asked for and again when they are old."""

    def __init__(self, pool: Pool, options: Options):
        self._pool, self._options, self._found = pool, options, {}

    def of(self, dtype: str) -> dict | None:
        """None where they cannot be measured: then there are no floors."""
        old = CEILINGS_LAST if self._options.device == "cpu" else float("inf")
        if dtype not in self._found or time.monotonic() - self._found[dtype][0] > old:
            arguments = self._options.device, dtype, self._options.window
            try:
                found = self._pool.ask_worker("ceilings", "ceilings", *arguments, limit=self._options.limit)
            except Failed as failure:
                print(f"  no ceilings: {failure}", file=sys.stderr)
                found = None
            self._found[dtype] = (time.monotonic(), found)
        return self._found[dtype][1]


def wrong(answer: dict) -> str:
    """Why a result is not to be believed; "": it is right, or its suite compares it with nothing. NaN is wrong."""
    error = answer.get("error")
    return "" if error is None or error <= answer["limit"] else f"error {error:.2g} is above {answer['limit']:.2g}"


def _prepare(wanted, options, ask) -> tuple[dict[str, dict], list[dict]]:
    """What every system that can be timed said of itself, and the rows of those that cannot."""
    ready, rows = {}, []
    for system in wanted:
        reason = find(system).missing(options.device)
        if reason:
            rows.append({"system": system, "status": "missing", "reason": reason})
            continue
        try:
            answer = ask(system)
        except Failed as failure:
            rows.append({"system": system, "status": "failed", "reason": str(failure)})
            continue
        if reason := wrong(answer):
            rows.append({"system": system, "status": "wrong", "reason": reason, **answer})
            continue
        ready[system] = answer
    return ready, rows


def _timed(found, case, options, pool, ceilings) -> Iterator[dict]:
    def ask(system):
        return pool.ask_worker(system, "prepare", found.__name__, case, system, limit=options.limit)

    names = systems(found, case, options)
    ready, rows = _prepare(names, options, ask)
    yield from rows
    times, how = alternate(pool, list(ready), options)
    for system in list(ready):
        if isinstance(times[system], Failed):
            yield {"system": system, "status": "failed", "reason": str(times.pop(system))}
    numbers = {system: summary(seconds) for system, seconds in times.items()}
    fused = numbers.get(OURS, {}).get("median_ms")
    known, cost = ceilings.of(case["dtype"]), found.cost(case)
    images = found.images(case) if hasattr(found, "images") else None
    for system, found_numbers in numbers.items():
        derived = derive(cost, images, found_numbers["median_ms"], known) if known else {}
        if fused:
            derived["fused_is_faster_by"] = found_numbers["median_ms"] / fused
        yield {"system": system, "status": "ok", **ready[system], **found_numbers, **derived, "timed_by": how[system]}
    for system in names:
        pool.release(system)


def alternate(pool: Pool, names: list[str], options: Options) -> tuple[dict, dict]:
    """Times of every system, taken in turns of one window each; for one that failed, its `Failed`."""
    times: dict = {name: [] for name in names}
    how: dict[str, str] = {}
    for _ in range(options.rounds):
        for name in names:
            if isinstance(times[name], Failed):
                continue
            try:
                answer = pool.running(name).ask("time", options.window, limit=options.limit)
            except Failed as failure:
                times[name] = failure
                continue
            times[name] += answer["times"]
            how[name] = answer["timed_by"]
    return times, how


def derive(cost: Cost, images: int | None, median_ms: float, known: dict) -> dict:
    """Floor, fraction of it, bytes and images a second."""
    seconds = median_ms * 1e-3
    floor = cost.floor_s(known["peak"], known["bandwidth"])
    numbers = {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "floor_ms": floor * 1e3,
        "of_floor": floor / seconds,
        "gb_per_s": cost.bytes / seconds / 1e9,
        "copy_gb_per_s": known["bandwidth"] / 1e9,
        "peak_tflops": known["peak"] / 1e12,
    }
    if images is not None:
        numbers["images_per_s"] = images / seconds
    return numbers


def _untimed(found, case, options, pool) -> Iterator[dict]:
    """A suite without a clock; each system in a process of its own where the suite asks for it."""

    def ask(system):
        request = "values", found.__name__, case, system
        if getattr(found, "FRESH", False):
            return pool.ask_fresh(*request, limit=options.limit)
        return pool.ask_worker(system, *request, limit=options.limit)

    ready, rows = _prepare(systems(found, case, options), options, ask)
    yield from rows
    for system, answer in ready.items():
        yield {"system": system, "status": "ok", **answer}


SHOWN = {
    "median_ms": "{:.4g} ms",
    "images_per_s": "{:.4g} images/s",
    "gb_per_s": "{:.3g} GB/s",
    "of_floor": "{:.0%} of the floor",
    "fused_is_faster_by": "fused is {:.2f} x",
    "ready_s": "ready in {:.2g} s",
    "import_s": "import {:.2g} s",
    "first_s": "first {:.2g} s",
    "new_batch_s": "new batch {:.2g} s",
    "new_size_s": "new size {:.2g} s",
    "first_peak_mb": "first call {:.0f} MB",
    "peak_mb": "peak {:.0f} MB",
    "kept_mb": "kept {:.0f} MB",
    "max_error": "max error {:.2g}",
    "rms_error": "rms error {:.2g}",
    "error": "error {:.1e}",
}


def line(row: dict) -> str:
    """A row for the terminal."""
    if row["status"] != "ok":
        return f"  {row['system']:22} {row['status'].upper()}: {row['reason']}"
    cells = [form.format(row[key]) for key, form in SHOWN.items() if row.get(key) is not None]
    mark = "* " if is_ours(row["system"]) else "  "
    return f"{mark}{row['system']:22} {'  '.join(cells)}"
