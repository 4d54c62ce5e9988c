"""What the rows of a suite say together; the page and the README say the same."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

from bench.report.records import Case, Device, grouped, systems
from bench.report.words import in_order, title
from bench.systems import OURS, is_ours

BY = ("dtype", "batch")


@dataclass
class Against:
    """Ratios of one system's time to ours over a group of cases."""

    system: str
    ratios: list[tuple[float, Case]]  # slowest of ours first

    @property
    def won(self) -> int:
        return sum(ratio >= 1 for ratio, _ in self.ratios)

    @property
    def lost(self) -> int:
        return len(self.ratios) - self.won

    @property
    def median(self) -> float:
        return median(ratio for ratio, _ in self.ratios)

    @property
    def worst(self) -> tuple[float, Case]:
        return self.ratios[0]

    @property
    def most(self) -> float:
        return self.ratios[-1][0]


def against(cases: Iterable[Case], system: str) -> Against | None:
    """How we stand against a system; None where no case has numbers of both."""
    found = [(ratio, case) for case in cases if (ratio := case.ratio(system))]
    return Against(system, sorted(found, key=lambda pair: pair[0])) if found else None


def all_against(cases: list[Case]) -> list[Against]:
    """The same for every peer."""
    return [found for name in systems(cases) if not is_ours(name) and (found := against(cases, name))]


def loses(case: Case) -> bool:
    best = case.best()
    return best is not None and best[1] < 1


def uses(case: Case, network: str | None = None) -> int:
    """How many layers of the network, or of all, pose this problem; 1 for a case that is no layer."""
    users = case.fields.get("used_by")
    return 1 if users is None else sum(len(names) for name, names in users.items() if network in (None, name))


def lost_ms(case: Case) -> float:
    """The time that all layers of this problem would save with the fastest peer."""
    best, took = case.best(), case.value(OURS, "median_ms")
    return took * (1 - best[1]) * uses(case) if best and took and best[1] < 1 else 0.0


def losing_first(cases: list[Case]) -> list[Case]:
    """What we have no result for, what loses most time, then what wins least; what no peer has a time for is last."""

    def key(case):
        best = case.best()
        if not case.ours:
            return -1, 0.0
        return (0, -lost_ms(case)) if loses(case) else (1, best[1]) if best else (2, 0.0)

    return sorted(cases, key=key)


def over(cases: Iterable[Case], value: Callable[[Case], float | None]) -> list[float]:
    """The values that there are, sorted."""
    return sorted(found for case in cases if (found := value(case)) is not None)


def of_copy(case: Case) -> float | None:
    """The part of the measured copy's bytes a second, where bytes and not arithmetic are the floor."""
    reached, copied, flops, peak, moved = (
        case.value(OURS, key) for key in ("gb_per_s", "copy_gb_per_s", "flops", "peak_tflops", "bytes")
    )
    if not (reached and copied) or (flops and peak and moved and flops / (peak * 1e12) > moved / (copied * 1e9)):
        return None
    return reached / copied


@dataclass
class Total:
    """All convolutions of a network, one after the other: ours, the floor, and each peer's over ours."""

    network: str
    group: tuple
    layers: int
    without: int  # of them, layers without numbers of ours
    ours_ms: float
    floor_ms: float
    ratios: dict[str, tuple[float, int]] = field(default_factory=dict)  # system -> ratio, layers that both have


def totals(cases: list[Case]) -> list[Total]:
    """Sums of median * count over each network, for each dtype and batch."""
    found = []
    for group, members in grouped(cases, *BY).items():
        for network in dict.fromkeys(name for case in members for name in case.fields["used_by"]):
            mine = [case for case in members if network in case.fields["used_by"]]
            found.append(_total(network, group, mine))
    return found


def _total(network: str, group: tuple, cases: list[Case]) -> Total:
    def summed(key, chosen):
        return sum((case.value(OURS, key) or 0.0) * uses(case, network) for case in chosen)

    count = sum(uses(case, network) for case in cases)
    without = sum(uses(case, network) for case in cases if not case.ours)
    total = Total(network, group, count, without, summed("median_ms", cases), summed("floor_ms", cases))
    for name in systems(cases):
        both = [case for case in cases if case.ratio(name) and case.value(OURS, "median_ms")]
        if name == OURS or not both:
            continue
        theirs = sum(case.ratio(name) * case.value(OURS, "median_ms") * uses(case, network) for case in both)
        layers = sum(uses(case, network) for case in both)
        total.ratios[name] = theirs / summed("median_ms", both), layers
    return total


@dataclass
class Excuse:
    """Why a system has no number in some cases of a suite."""

    suite: str
    system: str
    status: str
    reason: str
    cases: list[str]
    of: int  # cases of the suite that it was asked for

    @property
    def serious(self) -> bool:
        """A peer that is not installed is no fault; everything else is."""
        return self.status != "missing" or is_ours(self.system)


def excuses(device: Device) -> list[Excuse]:
    """Every failed, missing or wrong row; those of one reason together, ours and wrong ones first."""
    found: dict[tuple, Excuse] = {}
    asked: dict[tuple, int] = {}
    for case in in_order(device.cases):
        for name, row in case.rows.items():
            asked[case.suite, name] = asked.get((case.suite, name), 0) + 1
            if row["status"] == "ok":
                continue
            reason = str(row.get("reason", "no reason given"))
            key = (case.suite, name, row["status"], reason)
            found.setdefault(key, Excuse(*key, [], 0)).cases.append(title(case))
    for excuse in found.values():
        excuse.of = asked[excuse.suite, excuse.system]
    return sorted(found.values(), key=lambda e: (not (is_ours(e.system) and e.serious), not e.serious))
