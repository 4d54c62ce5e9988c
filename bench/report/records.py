"""Reads records and puts together what belongs together: devices, their cases, and every system's row of a case."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench.record import FORMAT
from bench.runner import SUITES
from bench.systems import OURS, PEERS, is_ours, ours
from fused_resnet.options import UsageError

ORDER = [*PEERS, *ours()]
STATUSES = ("ok", "missing", "failed", "wrong")


class Broken(Exception):
    """A file that is no record; the message says why."""


@dataclass(frozen=True, eq=False)
class Run:
    """The first line of a record, and the name of its file."""

    file: str
    about: dict

    @property
    def when(self) -> tuple[str, str]:
        return self.about["date"], self.about.get("time", "")

    @property
    def device(self) -> str:
        """The hardware's name. Processors of one name differ in what counts most: how many threads computed."""
        hardware = self.about["hardware"]
        threads = hardware.get("threads") if self.about.get("device") == "cpu" else None
        return f"{hardware['name']}, {threads} threads" if threads else hardware["name"]


@dataclass
class Case:
    """A case of a suite with the row of every system, peers first, and the run that each is of."""

    suite: str
    fields: dict
    rows: dict[str, dict] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def ours(self) -> dict | None:
        return self.ok(OURS)

    @property
    def peers(self) -> list[str]:
        """The peers with numbers."""
        return [name for name in self.rows if not is_ours(name) and self.ok(name)]

    @property
    def mode(self) -> str:
        return self.fields.get("mode", "")

    def ok(self, system: str) -> dict | None:
        row = self.rows.get(system)
        return row if row and row["status"] == "ok" else None

    def value(self, system: str, key: str) -> float | None:
        """A number of a system's row; None where there is none."""
        found = (self.ok(system) or {}).get(key)
        return found if isinstance(found, (int, float)) and math.isfinite(found) else None

    def ratio(self, system: str) -> float | None:
        """Its time over ours, both of one run: times of two runs do not compare."""
        found = self.value(system, "fused_is_faster_by")
        return found if found and self.ours else None

    def mixed(self, system: str) -> bool:
        """Whether its row is of another run than ours."""
        return OURS in self.runs and self.runs[system] is not self.runs[OURS]

    def best(self) -> tuple[str, float] | None:
        """The fastest peer and its time over ours."""
        found = [(ratio, name) for name in self.peers if (ratio := self.ratio(name))]
        return min(found)[::-1] if found else None


@dataclass
class Device:
    """Everything that was measured on one piece of hardware."""

    name: str
    runs: list[Run]
    cases: list[Case]

    def of(self, suite: str) -> list[Case]:
        return [case for case in self.cases if case.suite == suite]

    @property
    def about(self) -> dict:
        """What the latest run says of the hardware."""
        return max(self.runs, key=lambda run: run.when).about


def files(paths: Iterable[str | Path]) -> list[Path]:
    """The files that were named, and the records in the folders that were named."""
    named = [Path(path) for path in paths]
    return [file for path in named for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]


def load(paths: Iterable[str | Path]) -> tuple[list[Device], list[str]]:
    """The devices, and what could not be read and why. UsageError where nothing could."""
    runs, problems = [], []
    for path in files(paths):
        try:
            run, rows, cut = read(path)
        except Broken as broken:
            problems.append(f"{path.name}: skipped: {broken}")
            continue
        if cut:
            problems.append(f"{path.name}: {cut}")
        runs.append((run, rows))
    if not runs:
        raise UsageError(
            "\n".join(["no records to report on; `python -m bench all --out FOLDER` makes some", *problems])
        )
    return gather(runs), problems


def read(path: Path) -> tuple[Run, list[dict], str]:
    """The run, its rows, and a word on a last line that an interruption cut in half."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Broken(str(error)) from error
    if not text.strip():
        raise Broken("empty")
    lines, cut = text.rstrip("\n").split("\n"), ""
    if len(lines) > 1 and not text.endswith("\n") and not _is_json(lines[-1]):
        cut = f"line {len(lines)} is cut in half and left out"
        lines.pop()
    parsed = [_parse(number, line) for number, line in enumerate(lines, 1)]
    run = Run(path.name, _header(parsed[0]))
    for number, row in enumerate(parsed[1:], 2):
        if not _is_row(row):
            raise Broken(f"line {number} is no row")
    if len(parsed) == 1:
        raise Broken("it has no rows")
    return run, parsed[1:], cut


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parse(number: int, line: str):
    try:
        return json.loads(line)
    except ValueError as error:
        raise Broken(f"line {number} is no JSON: {error}") from error


def _header(about) -> dict:
    if not isinstance(about, dict) or "format" not in about:
        raise Broken("the first line says nothing of the run")
    if about["format"] != FORMAT:
        raise Broken(f"format {about['format']!r}; this report knows {FORMAT}")
    hardware = about.get("hardware")
    if not (
        isinstance(hardware, dict) and isinstance(hardware.get("name"), str) and isinstance(about.get("date"), str)
    ):
        raise Broken("the first line lacks the hardware's name or the date")
    return about


def _is_row(row) -> bool:
    if not isinstance(row, dict) or row.get("status") not in STATUSES or row.get("suite") not in SUITES:
        return False
    case = row.get("case")
    if not isinstance(case, dict) or not isinstance(row.get("system"), str):
        return False
    return row["suite"] != "layers" or all(isinstance(case.get(key), dict) for key in ("layer", "used_by"))


def gather(runs: list[tuple[Run, list[dict]]]) -> list[Device]:
    """Rows by device and case; of two rows of one system the later run's stays."""
    devices: dict[str, Device] = {}
    cases: dict[tuple, Case] = {}
    for run, rows in sorted(runs, key=lambda pair: pair[0].when):
        device = devices.setdefault(run.device, Device(run.device, [], []))
        device.runs.append(run)
        for row in rows:
            key = (device.name, row["suite"], identity(row["case"]))
            case = cases.get(key)
            if case is None:
                case = cases[key] = Case(row["suite"], dict(row["case"]))
                device.cases.append(case)
            # A run over fewer networks knows fewer users of a problem.
            if "used_by" in row["case"]:
                case.fields["used_by"] = {**case.fields.get("used_by", {}), **row["case"]["used_by"]}
            case.rows[row["system"]], case.runs[row["system"]] = row, run
    for case in cases.values():
        case.rows = {name: case.rows[name] for name in sorted(case.rows, key=place)}
    return sorted(devices.values(), key=lambda device: (device.about.get("device") != "cpu", device.name))


def identity(case: dict) -> str:
    """The same for two rows of one case. "cuda" and "cuda:1" are one device if they have one name."""
    return json.dumps({k: v for k, v in case.items() if k not in ("device", "used_by")}, sort_keys=True)


def place(system: str) -> tuple:
    """Where a system stands in tables: peers in the order of `bench.systems`, then unknown ones, then ours."""
    plain = system.partition("@")[0]
    return is_ours(system), ORDER.index(plain) if plain in ORDER else len(ORDER), system


def grouped(cases: Iterable[Case], *keys: str) -> dict[tuple, list[Case]]:
    """Cases by some of their fields, in the order in which they were measured."""
    found: dict[tuple, list[Case]] = {}
    for case in cases:
        found.setdefault(tuple(case.fields.get(key) for key in keys), []).append(case)
    return found


def systems(cases: Iterable[Case], *, numbers: bool = True) -> list[str]:
    """The systems of the cases, of those with numbers alone or of all."""
    names = {name for case in cases for name in case.rows if case.ok(name) or not numbers}
    return sorted(names, key=place)
