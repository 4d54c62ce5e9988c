"""Builds csrc/cuda for the CPU, against tests/emulator instead of a GPU, and loads it.

The operators `fused_resnet_C::cuda_*` then take CPU tensors: every kernel runs as it stands, thread by thread.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
OUT = ROOT / "build" / "emulator"
ABI_TARGET = "0x020b000000000000"  # as in setup.py


def missing() -> str:
    """Why it cannot be built here; empty: it can."""
    if not (ROOT / "csrc").exists():
        return "the CUDA sources are not here: it runs in a checkout"
    if shutil.which("c++") is None:
        return "no C++ compiler is here to build the kernels for the CPU"
    return ""


def _ninja_file() -> str:
    from torch.utils import cpp_extension

    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), *sorted((ROOT / "tests" / "emulator").glob("*.cpp"))]
    include = [ROOT / "csrc", ROOT / "tests", *cpp_extension.include_paths()]
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-DFUSED_RESNET_EMULATED", f"-DTORCH_TARGET_VERSION={ABI_TARGET}", *[f"-I{path}" for path in include]]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    lines = [
        "rule compile",
        f"  command = c++ {' '.join(flags)} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = c++ -shared $in -o $out {' '.join(libraries)}",
    ]
    objects = []
    for source in sources:
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    return "\n".join([*lines, f"build {_name()}: link {' '.join(objects)}", ""])


def _name() -> str:
    return f"emulator-torch{torch.__version__}.so"


@cache
def load() -> str:
    """Build what has changed and load it, once; return why that failed, empty: it is there."""
    reason = missing()
    if reason:
        return reason
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "build.ninja").write_text(_ninja_file(), encoding="utf-8")
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    ninja = [sys.executable, "-m", "ninja", "-C", str(OUT), "-j", jobs]
    with open(OUT / "lock", "w") as lock:  # against a second run of the tests
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = subprocess.run(ninja, capture_output=True, text=True, check=False)
    if built.returncode:
        raise RuntimeError(f"the kernels do not compile for the CPU:\n{built.stdout[-6000:]}{built.stderr[-2000:]}")
    torch.ops.load_library(OUT / _name())
    return ""
