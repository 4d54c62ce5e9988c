"""Tables as the page shows them: a cell is text, a kind that says how it looks, and the system whose colour it has."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.report import findings
from bench.report.records import Case, Device, grouped, systems
from bench.report.words import commit, hardware, in_order, megabytes, number, percent, ratio, share, size_of, versions
from bench.systems import OURS, is_ours

FOLD = 16  # a table with more rows is folded; what loses stays outside


@dataclass(frozen=True)
class Cell:
    """kind: "" text, "num", "loss" (a number that loses), "fault" (words of one), "muted"."""

    text: str
    kind: str = ""
    system: str = ""


@dataclass
class Table:
    """`fold`: what stands for the table until a reader opens it; "": it is open."""

    caption: str
    head: list[Cell]
    rows: list[list[Cell]]
    fold: str = ""


def words(*texts: str) -> list[Cell]:
    return [Cell(str(text)) for text in texts]


def numbers(*texts: str) -> list[Cell]:
    return [Cell(text, "num") for text in texts]


def name(system: str) -> Cell:
    return Cell(system, "", system)


def verdict(case: Case, system: str) -> Cell:
    """The system's time over ours."""
    found = case.ratio(system)
    if found is None:
        return Cell("–", "muted")
    return Cell(ratio(found) + ("†" if case.mixed(system) else ""), "loss" if found < 1 else "num")


def value(case: Case, system: str, key: str, show: Callable = number) -> Cell:
    """A number of a row, or why there is none."""
    if system not in case.rows:
        return Cell("–", "muted")
    if not case.ok(system):
        status = case.rows[system]["status"]
        return Cell(status, "loss" if is_ours(system) and status != "missing" else "muted")
    return Cell(show(case.value(system, key)), "num")


def shape_of(case: Case) -> list[Cell]:
    """The first cells of a network's row."""
    model = ", ".join(part for part in (str(case.fields.get("model")), case.mode, size_of(case)) if part)
    return [Cell(model), *numbers(str(case.fields.get("batch"))), Cell(str(case.fields.get("dtype")))]


SHAPE = [Cell("network"), Cell("batch", "num"), Cell("dtype")]


def split(caption: str, head: list[Cell], rows: list[list[Cell]]) -> list[Table]:
    """One table; where it is long, what loses and below it, folded, everything."""
    if len(rows) <= FOLD:
        return [Table(caption, head, rows)]
    losing = [row for row in rows if any(cell.kind == "loss" for cell in row)]
    outside = [Table(f"{caption}: where fused_resnet is the slower one", head, losing)] if losing else []
    return [*outside, Table(caption, head, rows, f"{caption}: all {len(rows)} rows")]


def beside(cases: list[Case]) -> tuple[list[str], list[Cell], Callable[[Case], list[Cell]]]:
    """Two columns for each peer, its time and its time over ours."""
    peers = [system for system in systems(cases) if system != OURS]
    head = [cell for peer in peers for cell in (Cell(f"{peer} ms", "num", peer), Cell("ratio", "num"))]
    return peers, head, lambda case: [c for p in peers for c in (value(case, p, "median_ms"), verdict(case, p))]


def layers(cases: list[Case]) -> list[Table]:
    found = []
    for (dtype, batch), members in grouped(cases, *findings.BY).items():
        _, head, peers = beside(members)
        head = [*words("layer", "used by"), *numbers("ms", "floor ms", "of floor"), *head, *numbers("lost ms")]
        rows = []
        for case in findings.losing_first(members):
            users = ", ".join(f"{network} ×{len(names)}" for network, names in case.fields["used_by"].items())
            mine = [value(case, OURS, key) for key in ("median_ms", "floor_ms")]
            lost = findings.lost_ms(case)
            label = case.fields["layer"].get("label", "?")
            rows.append([*words(label, users), *mine, value(case, OURS, "of_floor", percent), *peers(case),
                         *numbers(number(lost) if lost else "")])  # fmt: skip
        found += split(f"Layers, {dtype}, batch {batch}", head, rows)
    return found


def totals(cases: list[Case]) -> Table:
    """Sums over whole networks."""
    sums = findings.totals(cases)
    peers = list(dict.fromkeys(peer for total in sums for peer in total.ratios))
    head = [*SHAPE, *numbers("convolutions", "ms", "floor ms"), *(Cell(f"{p} / ours", "num", p) for p in peers)]
    rows = []
    for total in sums:
        count = f"{total.layers}" + (f", {total.without} of them not measured" if total.without else "")
        row = [Cell(total.network), *numbers(str(total.group[1])), Cell(str(total.group[0])),
               *numbers(count, number(total.ours_ms), number(total.floor_ms))]  # fmt: skip
        for peer in peers:
            found, both = total.ratios.get(peer, (None, 0))
            part = f" ({both} of {total.layers})" if found and both < total.layers else ""
            row.append(Cell(ratio(found) + part, "loss" if found and found < 1 else "num"))
        rows.append(row)
    return Table("Convolutions of whole networks: sums of median × count", head, rows)


def ops(cases: list[Case]) -> list[Table]:
    found = []
    for (dtype, batch), members in grouped(cases, *findings.BY).items():
        _, head, peers = beside(members)
        head = [*words("operator", "shape", "direction"), *numbers("ms", "GB/s", "of copy"), *head]
        rows = []
        for case in findings.losing_first(members):
            shape = " × ".join(map(str, case.fields.get("shape", ())))
            mine = [value(case, OURS, key) for key in ("median_ms", "gb_per_s")]
            copied = Cell(percent(findings.of_copy(case)), "num")
            what = words(case.fields.get("op", "?"), shape, case.fields.get("direction", ""))
            rows.append([*what, *mine, copied, *peers(case)])
        found += split(f"Operators, {dtype}, batch {batch}", head, rows)
    return found


def speed(cases: list[Case], *, ready: bool) -> list[Table]:
    """Images a second of every system side by side; below it the rest, folded."""
    cases = in_order(cases)
    shown = [OURS, *(name for name in systems(cases) if name != OURS)]  # ours and the verdict first, always in view
    head = [*SHAPE, Cell(OURS, "num", OURS), Cell("fastest peer's time / ours", "num"), Cell("fastest peer")]
    head += [Cell(system, "num", system) for system in shown[1:]]
    rows = []
    for case in cases:
        best = case.best()
        last = [verdict(case, best[0]), name(best[0])] if best else [Cell("–", "muted")] * 2
        mine, *others = (value(case, system, "images_per_s") for system in shown)
        rows.append([*shape_of(case), mine, *last, *others])
    return [Table("Images a second", head, rows), details(cases, ready=ready)]


def details(cases: list[Case], *, ready: bool) -> Table:
    keys = ["images_per_s", "median_ms", "p20_ms", "p80_ms"]
    head = [*SHAPE, Cell("system"), *numbers("images/s", "median ms", "p20", "p80", "of floor", "error")]
    head += numbers(*(["ready in s"] if ready else []), "time / ours")
    rows = []
    for case in cases:
        for system in systems([case], numbers=False):
            row = [*shape_of(case), name(system), *(value(case, system, key) for key in keys)]
            row += [value(case, system, "of_floor", percent), value(case, system, "error")]
            row += [value(case, system, "ready_s")] if ready else []
            rows.append([*row, Cell("1", "num") if system == OURS and case.ours else verdict(case, system)])
    return Table("Every system", head, rows, f"Every system: times, part of the floor, errors ({len(rows)} rows)")


def memory(cases: list[Case]) -> Table:
    head = [*SHAPE, Cell("system"), *numbers("first call's peak", "peak", "of eager's", "kept", "of eager's")]
    rows = []
    for case in in_order(cases):
        for system in systems([case], numbers=False):
            cells = [value(case, system, "first_peak_mb", megabytes)]
            for key in ("peak_mb", "kept_mb"):
                cells += [value(case, system, key, megabytes), _of_eager(case, system, key)]
            rows.append([*shape_of(case), name(system), *cells])
    return Table("Memory", head, rows)


def _of_eager(case: Case, system: str, key: str, most: float = 1.0) -> Cell:
    """A number over eager's; ours loses above `most`."""
    found, eager = case.value(system, key), case.value("eager", key)
    if found is None or not eager:
        return Cell("–", "muted")
    return Cell(share(found / eager), "loss" if is_ours(system) and found / eager > most else "num")


def startup(cases: list[Case]) -> Table:
    head = [*SHAPE, Cell("system"), *numbers("import s", "first result s", "new batch s", "new size s")]
    keys = ("import_s", "first_s", "new_batch_s", "new_size_s")
    rows = [[*shape_of(case), name(s), *(value(case, s, key) for key in keys)]
            for case in in_order(cases) for s in systems([case], numbers=False)]  # fmt: skip
    return Table("Start", head, rows)


def accuracy(cases: list[Case]) -> Table:
    head = [*SHAPE, Cell("system"), *numbers("max error", "of eager's", "rms error", "of eager's")]
    rows = []
    for case in in_order(cases):
        for s in systems([case], numbers=False):
            cells = [
                c for key in ("max_error", "rms_error") for c in (value(case, s, key), _of_eager(case, s, key, 2.0))
            ]
            rows.append([*shape_of(case), name(s), *cells])
    return Table("Errors", head, rows)


def runs(device: Device) -> Table:
    head = words("suite", "dtypes", "date", "commit", "command", "hardware", "versions", "record")
    rows = []
    for run in device.runs:
        about = run.about
        what = words(about.get("suite", ""), " ".join(about.get("dtypes", ())), " ".join(run.when))
        state = Cell(commit(about), "" if about.get("clean") else "fault")
        ran = words(about.get("command", "unknown"), hardware(about), versions(about), run.file)
        rows.append([*what, state, *ran])
    return Table("Runs", head, rows)


def excuses(found: list[findings.Excuse]) -> list[list[Cell]]:
    """Cells and, last, the cases that have no number."""
    return [[Cell(e.suite), name(e.system), Cell(e.status, "fault" if e.serious else ""),
             *numbers(f"{len(e.cases)} of {e.of}"), *words(e.reason, "; ".join(e.cases))] for e in found]  # fmt: skip
