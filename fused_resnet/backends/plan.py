"""Plans: for each problem the kernel that was measured to be the fastest on one kind of GPU.

The user's own, made by `fr.tune`, goes before the one that is shipped for that GPU. A plan is a JSON file of one
object: `format`, `device` (the GPU's name), `versions` (of what was measured), and `problems`, which maps a problem's
key to `{"backend": ..., "kernel": ..., "microseconds": ..., "candidates": {...}}`.
"""

import json
import re
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fused_resnet._version import __version__
from fused_resnet.backends.problem import Problem
from fused_resnet.files import cache_folder, write_atomically

FORMAT = 1
SHIPPED = Path(__file__).parent.parent / "plans"

# Choices that are remembered, before they are looked up anew.
MOST_PROBLEMS = 4096


class Entry(NamedTuple):
    """The backend of a problem, its kernel ("" where the backend has but one), and which plan says so."""

    backend: str
    kernel: str
    source: str


_lock = threading.Lock()
_plans: dict[tuple, dict] = {}
_generation = 0


def generation() -> int:
    """Rises whenever a plan may have changed: what was chosen before has to be chosen anew."""
    return _generation


def reload() -> None:
    """Read the plans again from their files."""
    global _generation
    with _lock:
        _plans.clear()
        _generation += 1


def tf32() -> bool:
    """Whether torch lets fp32 convolutions round their inputs to TF32."""
    try:
        return torch._C._get_cudnn_allow_tf32()
    except RuntimeError:  # set through the newer switch, which the older one cannot always express
        return torch.backends.cudnn.conv.fp32_precision == "tf32"


def switches() -> tuple:
    """torch's own settings that a choice depends on."""
    return torch._C._get_mkldnn_enabled(), tf32()


def key_of(problem: Problem) -> str:
    """The name of a problem in a plan."""
    return f"{problem} tf32" if problem.dtype == torch.float32 and tf32() else str(problem)


@cache
def device_name(device: torch.device) -> str:
    """What a plan is for: the GPU's name; the CPU, where Triton's interpreter runs, has one for tests."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def user_path(name: str) -> Path:
    """Where the user's plan for a device is."""
    return cache_folder() / "plans" / f"{_slug(name)}.json"


def shipped_path(name: str) -> Path:
    return SHIPPED / f"{_slug(name)}.json"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def find(problem: Problem, device: torch.device) -> Entry | None:
    """What the plans say about a problem; None: nothing."""
    name, key = device_name(device), key_of(problem)
    for path, source in ((user_path(name), "tuned plan"), (shipped_path(name), "shipped plan")):
        found = _load(path).get(key)
        if found is not None:
            return Entry(found["backend"], found["kernel"], source)
    return None


def _load(path: Path) -> dict:
    with _lock:
        if path not in _plans:
            _plans[path] = read(path)
        return _plans[path]


def read(path: Path) -> dict[str, dict]:
    """The problems of a plan; none, with a warning, where the file is broken or of other kernels than these."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is not a plan and is ignored: {error}", stacklevel=2)
        return {}
    try:
        if plan["format"] != FORMAT or plan["versions"]["fused_resnet"] != __version__:
            warnings.warn(f"{path} was made for other kernels and is ignored; tune again", stacklevel=2)
            return {}
        if not all(isinstance(e["backend"], str) and isinstance(e["kernel"], str) for e in plan["problems"].values()):
            raise TypeError("an entry without backend or kernel")
        return plan["problems"]
    except (TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} is not a plan and is ignored: {error!r}", stacklevel=2)
        return {}


def own(path: Path, device: str) -> dict[str, dict]:
    """The problems of a plan that is about to be written again; none where there is no file, or one of other kernels.

    Raises:
        ValueError: the file is something else, or the plan of another device.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whose = found["device"] if isinstance(found["problems"], dict) else None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is there and is not a plan: {error!r}") from error
    if whose != device:
        raise ValueError(f"{path} is the plan of {whose!r}, and this is {device!r}")
    return read(path)


def write(path: Path, device: str, versions: dict[str, str], problems: dict[str, dict]) -> None:
    """Write a plan, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"format": FORMAT, "device": device, "versions": versions, "problems": problems}
    write_atomically(path, json.dumps(whole, indent=1, sort_keys=True) + "\n")
