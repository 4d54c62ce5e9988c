"""How numbers and cases are written, on the page and in the README."""

import math
import re

from bench.options import ALL_DTYPES
from bench.report.records import Case


def number(value: float | None, unit: str = "") -> str:
    """Three digits that count: 12,345; 123; 1.23; 0.00123."""
    if value is None:
        return "–"
    if value == 0:
        text = "0"
    elif abs(value) < 1e-3:
        text = f"{value:.1e}"
    else:
        size = math.floor(math.log10(abs(float(f"{value:.3g}"))))  # 0.9999 has the size of 1
        text = f"{value:,.{max(2 - size, 0)}f}"
    return f"{text} {unit}".strip()


def ratio(value: float | None) -> str:
    """Two decimals; nothing that is below 1 is rounded up to it."""
    if value is None:
        return "–"
    if value >= 100 or value < 0.1:
        return number(value)
    return f"{min(round(value, 2), 0.99) if value < 1 else value:.2f}"


def share(value: float | None) -> str:
    """A ratio of which more is worse: nothing that is above 1 is rounded down to it."""
    return f"{max(round(value, 2), 1.01):.2f}" if value and value > 1 else ratio(value)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def megabytes(value: float | None) -> str:
    if value is None:
        return "–"
    return number(value / 1e3, "GB") if value >= 1000 else number(value, "MB")


def plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def size_of(case: Case) -> str:
    """The size of the images where it is not the usual one."""
    size = case.fields.get("size", 224)
    return "" if size == 224 else f"{size} px"


def short(case: Case) -> str:
    """Such as "resnet50", for cases of one dtype and batch."""
    fields = case.fields
    name = fields.get("model") or fields.get("op") or fields.get("layer", {}).get("label", "?")
    shape = "x".join(map(str, fields.get("shape", ())))
    return ", ".join(part for part in (str(name), fields.get("direction", ""), shape) if part)


def title(case: Case, *, mode: bool = True) -> str:
    """Such as "resnet50, inference, batch 16, fp32"; `mode`: with what is asked of the network."""
    batch = "" if "shape" in case.fields else f"batch {case.fields.get('batch')}"
    parts = [short(case), case.mode if mode else "", batch, str(case.fields.get("dtype")), size_of(case)]
    return ", ".join(part for part in parts if part)


def natural(text: str) -> list:
    """resnet50 before resnet101."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def in_order(cases: list[Case]) -> list[Case]:
    """Cases of networks by model, batch and dtype, whichever run came first."""

    def key(case):
        fields = case.fields
        return case.mode, natural(str(fields.get("model"))), fields.get("size", 0), fields.get("batch", 0), dtype(case)

    return sorted(cases, key=key)


def dtype(case: Case) -> int:
    """Where the case's dtype stands among all."""
    found = case.fields.get("dtype")
    return ALL_DTYPES.index(found) if found in ALL_DTYPES else len(ALL_DTYPES)


def commit(about: dict) -> str:
    return about.get("commit", "unknown") + ("" if about.get("clean") else " with uncommitted changes")


def hardware(about: dict) -> str:
    """What bounds the device, in one line."""
    known = about["hardware"]
    if about.get("device") == "cpu":
        parts = [f"on {known.get('cores')} cores", known.get("capability")]  # the device's name has the threads
    else:
        parts = [f"{known.get('multiprocessors')} multiprocessors", number(known.get("memory_gb"), "GB")]
        parts += [f"driver {known.get('driver')}", f"CUDA {known.get('cuda')}", f"cuDNN {known.get('cudnn')}"]
    return ", ".join(str(part) for part in parts if part)


def versions(about: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
