"""Compiled kernels, as `cuobjdump` shows them: registers, memory, and which instructions."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

SPILL = "spill"
INSTRUCTIONS = re.compile(
    r"\b(?:(?P<spill>LDL|STL)|(?P<wgmma>HGMMA|UTC\w*MMA)|(?P<mma>HMMA)|(?P<tma>UTMALDG|UTMASTG)|(?P<cp_async>LDGSTS)"
    r"|(?P<wide_loads>LDG\S*\.128)|(?P<wide_stores>STG\S*\.128))\b"
)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def tool(name: str) -> str:
    """The path of a program that comes with Triton's wheel, or with a CUDA toolkit in PATH; "": there is none."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    return shutil.which(name) or ""


def cuobjdump(option: str, path: str | Path) -> str:
    return subprocess.run([tool("cuobjdump"), option, str(path)], capture_output=True, text=True, check=True).stdout


def numbers(usage: str, sass: str) -> dict[str, int]:
    """Of one kernel: registers a thread, bytes a block, and instructions of the whole kernel."""
    registers, stack, shared, local = map(int, USAGE.search(usage).groups())
    found = Counter(match.lastgroup for match in INSTRUCTIONS.finditer(sass))
    counts = {name: found[name] for name in INSTRUCTIONS.groupindex if name != SPILL}
    # The stack, where anything goes there: ptxas also reserves some that no instruction uses.
    spilled = stack + local if found[SPILL] else 0
    return {"registers": registers, "spill_bytes": spilled, "shared_bytes": shared, **counts}
