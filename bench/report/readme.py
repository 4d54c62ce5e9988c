"""The README's section on speed: everything between two markers is made from the records."""

import difflib
import re
import sys
import textwrap
from pathlib import Path
from statistics import median

from bench.report import findings
from bench.report.records import Case, Device, grouped, systems
from bench.report.words import (
    commit,
    hardware,
    in_order,
    megabytes,
    number,
    percent,
    plural,
    ratio,
    share,
    short,
    size_of,
    title,
)
from bench.systems import OURS, is_ours
from fused_resnet.options import UsageError

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
WIDTH = 120
REASON = 160  # characters of a reason
HOW = (
    "Medians; all systems of a case in turn in one run. A ratio is a peer's time over ours: above 1 fused_resnet is "
    "faster, **bold** is slower. `python -m bench report` writes this section and a page with every layer and figure "
    "from `bench/results/`; speeds of shared machines drift, so read along a row."
)


def rewritten(path: Path, devices: list[Device]) -> tuple[str, str]:
    """The README's text as it is and as it should be."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"README: {error}") from error
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise UsageError(f"README: {path} must hold {START} and, after it, {END}, once each")
    before, rest = text.split(START)
    return text, f"{before}{START}\n{section(devices)}\n{END}{rest.split(END)[1]}"


def check(path: Path, devices: list[Device]) -> int:
    """0 if the README is what the records make of it; shows the difference."""
    found, expected = rewritten(path, devices)
    if found == expected:
        return 0
    lines = difflib.unified_diff(found.splitlines(), expected.splitlines(), str(path), "records", lineterm="", n=0)
    print("\n".join(lines), file=sys.stderr)
    print(f"{path} is not what the records say; `python -m bench report` writes it", file=sys.stderr)
    return 1


def section(devices: list[Device]) -> str:
    parts = [wrap(HOW)]
    for device in devices:
        parts += [wrap(intro(device)), *models(device)]
        lines = [*training(device), *memory(device), *startup(device), *layers(device), *ops(device), *without(device)]
        if lines:
            parts.append("\n".join(wrap(line, "* ") for line in lines))
    return "\n\n".join(parts)


def escape(text: str) -> str:
    """Text as it is, whatever it holds, in a cell of a Markdown table or in a line."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`*|\[\]~])", r"\\\1", text)
    text = re.sub(r"(?<!\S)>", "&gt;", text)  # at the beginning of a line it would be a quotation
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def wrap(text: str, bullet: str = "") -> str:
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * len(bullet)}
    return textwrap.fill(bullet + text, WIDTH, **options)


def times(value: float | None) -> str:
    """A ratio; bold where we lose."""
    return f"**{ratio(value)}**" if value is not None and value < 1 else ratio(value)


def code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', '')}`".replace("<", "").replace(">", "")


def where(case: Case) -> str:
    return escape(title(case))


def intro(device: Device) -> str:
    """What was measured on, when, at which commit, and by which commands."""
    abouts = [run.about for run in device.runs]
    dates = sorted({about["date"] for about in abouts})
    commits = list(dict.fromkeys(escape(commit(about)) for about in abouts))
    commands = list(dict.fromkeys(code(about.get("command", "unknown")) for about in abouts))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    known = device.about.get("versions", {})
    packages = ", ".join(f"{name} {known[name]}" for name in ("torch", "triton") if name in known)
    head = f"**{escape(device.name)}** ({escape(hardware(device.about))}), {escape(packages)}"
    return f"{head}; {when}, commit {', '.join(commits)}, by {', '.join(commands)}."


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def models(device: Device) -> list[str]:
    cases = in_order(device.of("models"))
    if not cases:
        return []
    peers = [name for name in systems(cases) if not is_ours(name)]
    mine = [OURS, *(name for name in systems(cases) if is_ours(name) and name != OURS)]
    head = ["images/s", "batch", "dtype", *(escape(name) for name in [*peers, *mine]), "fastest peer's time / ours"]
    rows = []
    for case in cases:
        model = ", ".join(part for part in (str(case.fields.get("model")), size_of(case)) if part)
        cells = [escape(cell) for cell in (model, case.fields.get("batch"), case.fields.get("dtype"))]
        cells += [_images(case, name) for name in [*peers, *mine]]
        best = case.best()
        rows.append([*cells, f"{times(best[1])} ({escape(best[0])})" if best else "–"])
    return [table(head, rows)]


def _images(case: Case, system: str) -> str:
    """The rate, or why there is none; beside that of a variant of ours, the fastest peer's time over its."""
    status = case.rows.get(system, {}).get("status", "–")
    if status != "ok":
        return escape(status)
    best, mine = case.best(), case.ratio(system)
    beside = f" ({times(best[1] / mine)})" if is_ours(system) and system != OURS and best and mine else ""
    return number(case.value(system, "images_per_s")) + beside


def training(device: Device) -> list[str]:
    found = []
    for case in in_order(device.of("training")):
        if not case.ours:
            continue
        beside = [f"{times(case.ratio(name))} × {escape(name)}" for name in case.peers if case.ratio(name)]
        says = f"{where(case)} {number(case.value(OURS, 'images_per_s'))} ({', '.join(beside) or 'no peer'})"
        for name in (name for name in systems([case]) if is_ours(name) and name != OURS):
            says += f", {escape(name)} {_images(case, name)}"
        found.append(says)
    return (
        [f"Training, images/s (in brackets against peers; a variant against the fastest): {'; '.join(found)}."]
        if found
        else []
    )


def memory(device: Device) -> list[str]:
    lines = []
    for (mode,), cases in grouped(in_order(device.of("memory")), "mode").items():
        found = []
        for case, name in [(c, name) for c in cases for name in systems([c]) if is_ours(name)]:
            keys = {"peak_mb": "peak", "kept_mb": "kept for backward"}
            parts = [text for key, word in keys.items() if (text := _of_eager(case, name, key, word))]
            if parts:
                found.append(f"{escape(title(case, mode=False))}, {escape(name)}: {', '.join(parts)}")
        if found:
            lines.append(f"Memory of {escape(str(mode))}: {'; '.join(found)}.")
    return lines


def _of_eager(case: Case, system: str, key: str, word: str) -> str:
    value, eager = case.value(system, key), case.value("eager", key)
    if value is None:
        return ""
    if not eager:
        return f"{word} {megabytes(value)}"
    part = f"{share(value / eager)} of eager's"
    return f"{word} {megabytes(value)} ({f'**{part}**' if value > eager else part})"


def startup(device: Device) -> list[str]:
    found = []
    for case in in_order(device.of("startup")):
        beside = [f"{escape(name)} {number(case.value(name, 'first_s'))}" for name in systems([case])]
        if beside:
            found.append(f"{where(case)}: {', '.join(beside)}")
    return [f"Seconds to the first result after the imports, caches empty: {'; '.join(found)}."] if found else []


def layers(device: Device) -> list[str]:
    return [line for group, cases in grouped(device.of("layers"), *findings.BY).items()
            for line in _standing("Layers", "problem", group, cases, "of_floor", "of the floor")]  # fmt: skip


def ops(device: Device) -> list[str]:
    return [line for group, cases in grouped(device.of("ops"), *findings.BY).items()
            for line in _standing("Operators", "case", group, cases, "", "of a copy's bytes/s")]  # fmt: skip


def _standing(what: str, one: str, group: tuple, cases: list[Case], key: str, of: str) -> list[str]:
    """How many win, by how much, the worst of all, and the part of the limit that is reached."""
    says = []
    for found in findings.all_against(cases):
        low, case = found.worst
        says.append(
            f"{found.won} of {plural(len(found.ratios), one)} faster than {escape(found.system)}, "
            f"median {times(found.median)}, best {times(found.most)}, worst {times(low)} ({escape(short(case))})"
        )
    reached = findings.over(cases, lambda case: case.value(OURS, key) if key else findings.of_copy(case))
    if reached:
        says.append(f"{percent(median(reached))} {of} in the median ({percent(reached[0])} to {percent(reached[-1])})")
    dtype, batch = group
    return [f"{what}, {escape(dtype)}, batch {batch}: {'; '.join(says)}."] if says else []


def without(device: Device) -> list[str]:
    """Who has no number and why; one line for each reason."""
    found: dict[tuple, list[findings.Excuse]] = {}
    for excuse in findings.excuses(device):
        found.setdefault((excuse.system, excuse.status, excuse.reason), []).append(excuse)
    lines = []
    for (system, status, reason), members in found.items():
        count = ", ".join(f"{len(e.cases)} of {e.of} in {e.suite}" for e in members)
        reason = " ".join(reason.split())
        reason = reason if len(reason) <= REASON else f"{reason[:REASON]} …"
        word = f"**{status}**" if is_ours(system) or status == "wrong" else status
        lines.append(f"{escape(system)} {word} ({escape(count)}): {escape(reason)}")
    return lines
