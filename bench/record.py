"""Records: JSON lines that say what was measured, on what, and by which command.

The first line of a file is the run: hardware, versions, commit and command. Every further line is one row: a suite, a
case, a system, and its numbers or the reason why there are none (`status`: ok, missing, failed, wrong).
"""

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import fused_resnet
from fused_resnet.backends import backend_report
from fused_resnet.backends.cpu import extension_missing

FORMAT = 1
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "triton", "numpy", "openvino", "onnxruntime", "tensorrt", "torch_tensorrt", "nvidia-cudnn-frontend",
)  # fmt: skip


def git(*arguments: str) -> str:
    """The output of a git command, "unknown" where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return asked.stdout.strip().splitlines()[0] if asked.returncode == 0 and asked.stdout.strip() else "unknown"


def hardware(device: str) -> dict:
    """What computes: the device's name and, on a GPU, what bounds it."""
    found = {"processor": _processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
        }
    else:
        found |= {"name": found["processor"]}
        found["capability"] = extension_missing() or torch.ops.fused_resnet_C.cpu_capability()
    return found


def versions() -> dict:
    found = {"python": platform.python_version(), "torch": torch.__version__, "fused_resnet": fused_resnet.__version__}
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    return found | {package: installed[package] for package in PACKAGES if package in installed}


def command_line(arguments: list[str]) -> str:
    """The command of a run, without the folder that its records went to."""
    kept = [a for i, a in enumerate(arguments) if a != "--out" and (i == 0 or arguments[i - 1] != "--out")]
    return f"python -m bench {shlex.join(a for a in kept if not a.startswith('--out='))}"


def environment(device: str) -> dict:
    """The first line of a record. Other records do not make a tree unclean: they change no result."""
    changes = git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
    return {
        "format": FORMAT,
        "date": datetime.date.today().isoformat(),
        "time": datetime.datetime.now(datetime.timezone.utc).strftime("%H:%M:%S"),
        "device": torch.device(device).type,
        "hardware": hardware(device),
        "versions": versions(),
        "backends": backend_report(),
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "clean": changes == "",
        "command": command_line(sys.argv[1:]),
    }


def slug(text: str) -> str:
    """`text` as a part of a file's name."""
    text = re.sub(r"\((r|tm)\)", "", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


class Record:
    """One run's file: every row is written as it is measured, so that an interrupted run keeps what it has."""

    def __init__(self, folder: str | Path | None, suite: str, device: str, dtypes: list[str]):
        self.about = {**environment(device), "suite": suite, "dtypes": dtypes}
        self.path = None
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            name = slug(self.about["hardware"]["name"])
            stem = f"{name}-{suite}-{'-'.join(dtypes)}-{self.about['date']}"
            self.path = _unused(Path(folder), stem)
            self._write(self.about, "x")

    def row(self, values: dict) -> None:
        if self.path:
            self._write(values, "a")

    def _write(self, values: dict, mode: str) -> None:
        with self.path.open(mode) as file:
            file.write(json.dumps(values) + "\n")


def _unused(folder: Path, stem: str) -> Path:
    """A run overwrites no record: a second one of a day is numbered."""
    path, number = folder / f"{stem}.jsonl", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.jsonl"
    return path
