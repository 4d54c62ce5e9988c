"""Records: JSON lines that say what was measured, on what, and by which command."""

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

import fused_resnet
from fused_resnet.backends import backend_report
from fused_resnet.backends.cpu import extension_missing


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def environment() -> dict:
    missing = extension_missing()
    capability = missing or torch.ops.fused_resnet_C.cpu_capability()
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "capability": capability,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_resnet": fused_resnet.__version__,
        "backends": backend_report(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "clean": _git("status", "--porcelain") == "",
        "command": " ".join(["python -m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]),
    }


class Record:
    """One run's file: every row is written as it is measured, so that an interrupted run keeps what it has."""

    def __init__(self, folder: str | None, suite: str):
        self._environment = environment()
        self._path = None
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._path = Path(folder) / f"cpu-{suite}-{self._environment['date']}.jsonl"
            self._path.write_text(json.dumps({"suite": suite, **self._environment}) + "\n")

    def row(self, **values) -> None:
        print("  ".join(f"{key}={_short(value)}" for key, value in values.items()), flush=True)
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
