"""The page: one file that needs no other, with a section for each device."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.record import slug
from bench.report import findings, tables
from bench.report.figures import Drawn, draw
from bench.report.records import Case, Device, grouped
from bench.report.style import colour
from bench.report.tables import Cell, Table
from bench.report.words import commit, hardware, percent, plural, ratio, short, title

NETWORKS = {
    "models": ("Inference of whole networks", "Images a second, from the call to the output."),
    "training": ("Training", "A step: forward, loss, backward, SGD; low precision under autocast."),
}
OTHERS = {"memory": "Memory", "startup": "First result", "accuracy": "Accuracy"}
ABOUT = {
    "memory": "Above what the process had before the network was made; the peak is that of the calls after the first. "
    "Dark within a bar: what the forward pass keeps for the backward pass.",
    "startup": "In a new process with empty caches: imports, the first result, and the first at a new batch size and "
    "image size.",
    "accuracy": "Output and gradients against fp64, relative to the largest value and to the root of the mean square; "
    "marked above twice eager's.",
}


@dataclass
class Section:
    """A part of a device's report. One without tables says in words that nothing was measured."""

    key: str
    title: str
    about: str = ""
    says: list[tuple[str, bool]] = field(default_factory=list)  # sentence, whether it tells of a loss
    figures: list[Drawn] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass
class Part:
    """A device's part of the page."""

    key: str
    name: str
    about: str
    tiles: list[tuple[str, str, str, bool]]  # label, value, note, whether it tells of a loss
    sections: list[Section]
    excuses: list[list[Cell]]


def write(devices: list[Device], problems: list[str], folder: Path) -> Path:
    """Write the figures and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [part(device, draw(device, folder)) for device in devices]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(parts=parts, problems=problems, colour=colour)
    path = folder / "index.html"
    path.write_text(text, encoding="utf-8")
    return path


def part(device: Device, figures: dict[str, list[Drawn]]) -> Part:
    networks = [_speed(device, key, name, about) for key, (name, about) in NETWORKS.items()]
    sections = [*networks, _layers(device), _ops(device), *_others(device)]
    for section in sections:
        section.figures = figures.get(section.key, [])
    excuses = findings.excuses(device)
    about = f"{hardware(device.about)}; commit {commit(device.about)}, {device.about['date']}"
    return Part(slug(device.name), device.name, about, tiles(device, excuses), sections, tables.excuses(excuses))


def standing(found: findings.Against, what: str, name: Callable[[Case], str]) -> tuple[str, bool]:
    """Such as "54 of 62 layer problems are faster than eager; median 1.40, worst 0.84 (7x7 ...)"."""
    worst, case = found.worst
    text = f"{found.won} of {plural(len(found.ratios), what)} are faster than {found.system}; "
    text += f"median {ratio(found.median)}, worst {ratio(worst)} ({name(case)})"
    return text, found.lost > 0


def _compared(cases: list[Case], what: str, name: Callable[[Case], str] = title) -> list[tuple[str, bool]]:
    says = [standing(found, what, name) for found in findings.all_against(cases)]
    without = [case for case in cases if not case.ours]
    if without:
        says.append((f"{plural(len(without), what)} without a result of fused_resnet, see below", True))
    return says


def _speed(device: Device, key: str, name: str, about: str) -> Section:
    """Networks in images a second; inference says how long it took to get ready."""
    cases = device.of(key)
    section = Section(key, name, about)
    if cases:
        section.says, section.tables = _compared(cases, "case"), tables.speed(cases, ready=key == "models")
    return section


def _layers(device: Device) -> Section:
    cases = device.of("layers")
    about = "Each convolution with scale, shift, residual and activation. What loses comes first, by the time that all "
    about += "layers of its kind lose to the fastest peer."
    section = Section("layers", "Layers", about)
    for (dtype, batch), members in grouped(cases, *findings.BY).items():
        section.says += [
            (f"{dtype}, batch {batch}: {t}", lost) for t, lost in _compared(members, "layer problem", short)
        ]
    if cases:
        section.tables = [tables.totals(cases), *tables.layers(cases)]
    return section


def _ops(device: Device) -> Section:
    cases = device.of("ops")
    section = Section("ops", "Operators", "What stands around the convolutions, in bytes a second beside a copy.")
    for (dtype, batch), members in grouped(cases, *findings.BY).items():
        section.says += [
            (f"{dtype}, batch {batch}: {t}", lost) for t, lost in _compared(members, "operator case", short)
        ]
        if copied := findings.over(members, findings.of_copy):
            text = (
                f"{percent(median(copied))} of the copy in the median ({percent(copied[0])} to {percent(copied[-1])})"
            )
            section.says.append((f"{dtype}, batch {batch}: {text}", False))
    section.tables = tables.ops(cases)
    return section


def _others(device: Device) -> list[Section]:
    memory, startup, accuracy = (Section(key, name, ABOUT[key]) for key, name in OTHERS.items())
    for section, table in ((memory, tables.memory), (startup, tables.startup), (accuracy, tables.accuracy)):
        if cases := device.of(section.key):
            section.tables = [table(cases)]
    runs = Section("runs", "Runs", "Where two records hold the same case and system, the later one is shown.")
    runs.tables = [tables.runs(device)]
    return [memory, startup, accuracy, runs]


def tiles(device: Device, excuses: list[findings.Excuse]) -> list[tuple[str, str, str, bool]]:
    """The device at a glance: how many cases win against the fastest peer."""
    found = []
    for suite, label in {"models": "Inference", "training": "Training", "layers": "Layers", "ops": "Operators"}.items():
        best = sorted(case.best()[1] for case in device.of(suite) if case.best())
        if best:
            won = sum(one >= 1 for one in best)
            note = f"faster than the fastest peer; {ratio(best[0])} to {ratio(best[-1])}, median {ratio(median(best))}"
            found.append((label, f"{won} of {len(best)}", note, won < len(best)))
    serious = sum(len(excuse.cases) for excuse in excuses if excuse.serious)
    if serious:
        found.append(("Failed or wrong", str(serious), "rows, see below", True))
    return found
