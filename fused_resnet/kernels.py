"""`fused-resnet kernels`: every kernel in every configuration, compiled without a GPU, and whether it fits the GPU."""

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from fused_resnet.backends.triton import interpreted
from fused_resnet.options import UsageError
from fused_resnet.parity import table

# What `--dtype` may name: the keys of `shipped.MODES`, which cannot be imported without Triton.
MODES = ("bf16", "fp16", "tf32", "fp32")

COUNTS = ("registers", "spill_bytes", "shared_bytes", "wgmma", "mma", "tma", "cp_async", "wide_loads")
ABOUT = ("architecture", "kernel", "configuration", "dtype", "problem")
HEADER = (*ABOUT, "registers", "spills", "shared", "wgmma", "mma", "TMA", "cp.async", "verdict")

# Of a kernel's time some third is Python's and holds its lock: more threads than this would wait for it.
MOST_THREADS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", nargs="+", default=["sm_90"], metavar="ARCH", help="such as sm_80 sm_90 (default: sm_90)"
    )
    parser.add_argument("--family", help="only this family of kernels, such as conv1x1")
    parser.add_argument("--dtype", nargs="+", choices=MODES, default=MODES, help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="each configuration once a dtype, not with every problem")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def run(args: argparse.Namespace) -> int:
    _check_triton()
    from fused_resnet.backends.triton import launch, shipped

    archs = {f"sm_{major}{minor}": (major, minor) for major, minor in launch.SHARED_MEMORY}
    for name in args.arch:
        if name not in archs:
            raise UsageError(f"--arch: unknown architecture {name!r}, expected one of {', '.join(archs)}")
    if args.family is not None and args.family not in shipped.names():
        raise UsageError(f"--family: unknown family {args.family!r}, expected one of {', '.join(shipped.names())}")
    wanted = [
        row
        for name in dict.fromkeys(args.arch)
        for row in shipped.shipped(archs[name], args.family or "", args.quick)
        if row.mode in args.dtype
    ]
    start = time.perf_counter()
    rows = compile_all(wanted)
    seconds = time.perf_counter() - start
    if args.json:
        found = {"fit": all(row["fits"] for row in rows), "seconds": round(seconds, 1), "kernels": rows}
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(table(HEADER, map(_cells, rows), right=range(5, 12))))
        print(summary(dict.fromkeys(args.arch), rows, seconds))
    return 0 if all(row["fits"] for row in rows) else 1


def _check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise UsageError("Triton is not installed; pip install triton")
    if interpreted():
        raise UsageError("TRITON_INTERPRET is set: kernels are interpreted then, not compiled; unset it")
    from fused_resnet.backends.triton.compiled import TOOLS

    missing = [tool for tool in ("ptxas", "cuobjdump") if not (TOOLS / tool).exists()]
    if missing:
        raise UsageError(f"this Triton comes without {' and '.join(missing)} in {TOOLS}; pip install triton")


def compile_all(wanted: Iterable) -> list[dict[str, Any]]:
    """Compile every `shipped.Shipped`; as many rows in the same order, with all of the compiler's numbers."""
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    wanted = list(wanted)
    pool = ThreadPoolExecutor(threads)
    try:
        # stderr is tqdm's default; a pipe or a file gets no bar but its last state.
        return list(tqdm(pool.map(_compile, wanted), total=len(wanted), desc="compile", unit="kernel"))
    finally:
        pool.shutdown(cancel_futures=True)


def _compile(row) -> dict[str, Any]:
    from fused_resnet.backends.triton.compiled import compile_launch
    from fused_resnet.backends.triton.launch import shared_memory

    about = {
        "architecture": "sm_{}{}".format(*row.capability),
        **{"kernel": row.kernel, "family": row.family, "configuration": row.config},
        **{"dtype": row.mode, "problem": row.problem},
    }
    limit = {"shared_limit": shared_memory(row.capability)}
    try:
        compiled = compile_launch(row.launch, row.capability)
    except Exception as error:  # of the front end, of MLIR, of ptxas: each has its own
        return {**about, **dict.fromkeys(COUNTS), **limit, "fits": False, "error": _last_line(error)}
    return {**about, **compiled._asdict(), **limit, "fits": compiled.fits(row.capability), "error": ""}


def _last_line(error: BaseException) -> str:
    """What the first of the errors that led to this one says last."""
    while error.__cause__ is not None:
        error = error.__cause__
    # ptxas's errors end with the command, whose file is gone by now.
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Repro command")]
    return lines[-1].strip() if lines else type(error).__name__


def verdict(row: dict[str, Any]) -> str:
    """ "fits", or what is wrong."""
    if row["fits"] or row["error"]:
        return row["error"] or "fits"
    reasons = [f"SPILLS {row['spill_bytes']} bytes"] if row["spill_bytes"] else []
    if row["shared_bytes"] > row["shared_limit"]:
        reasons.append(f"TOO LARGE: of {row['shared_limit'] >> 10} KiB shared memory")
    return ", ".join(reasons) or "DOES NOT FIT"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    kib = "-" if row["shared_bytes"] is None else f"{row['shared_bytes'] / 1024:.1f} KiB"
    counts = ["-" if row[name] is None else str(row[name]) for name in COUNTS if name != "shared_bytes"]
    return (*(row[name] for name in ABOUT), *counts[:2], kib, *counts[2:6], verdict(row))


def summary(archs: Iterable[str], rows: list[dict[str, Any]], seconds: float) -> str:
    """Such as "sm_90: 200 of 201 kernels fit; 80 s"."""
    parts = []
    for arch in archs:
        fit = [row["fits"] for row in rows if row["architecture"] == arch]
        parts.append(f"{arch}: {sum(fit)} of {len(fit)} kernels fit" if fit else f"{arch}: no such kernels")
    return f"{', '.join(parts)}; {seconds:.0f} s"
