"""`fused-resnet kernels`: every kernel, without a GPU, and whether it fits the GPU.

Those of Triton are compiled for it, in every configuration; those of the compiled library are read from it.
"""

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from fused_resnet.backends import cuda, sass
from fused_resnet.backends.cpu import extension_missing
from fused_resnet.backends.triton import interpreted
from fused_resnet.options import UsageError
from fused_resnet.parity import table

# What `--dtype` may name: the keys of `shipped.MODES`, which cannot be imported without Triton.
MODES = ("bf16", "fp16", "tf32", "fp32")

COUNTS = ("registers", "spill_bytes", "shared_bytes", "wgmma", "mma", "tma", "cp_async", "wide_loads", "wide_stores")
ABOUT = ("architecture", "kernel", "configuration", "dtype", "problem")
NUMBERS = ("registers", "spills", "shared", "wgmma", "mma", "TMA", "cp.async", "wide loads", "wide stores", "verdict")
HEADER = (*ABOUT, *NUMBERS)
LIBRARY_HEADER = (*ABOUT[:2], *NUMBERS)

# Of a kernel's time some third is Python's and holds its lock: more threads than this would wait for it.
MOST_THREADS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--triton", action="store_true", help="only the kernels of Triton")
    parser.add_argument("--library", action="store_true", help="only those of the compiled library, as it was built")
    parser.add_argument("--arch", nargs="+", metavar="ARCH", help="such as sm_80 sm_90 (default: sm_90; the library's)")
    parser.add_argument("--family", help="only this family of Triton's kernels, such as conv1x1")
    parser.add_argument("--dtype", nargs="+", choices=MODES, default=MODES, help="of Triton's kernels (default: all)")
    parser.add_argument("--quick", action="store_true", help="Triton's configurations once a dtype, not a problem")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def run(args: argparse.Namespace) -> int:
    if args.library and (args.triton or args.family is not None):
        raise UsageError("--library excludes --triton and --family, which are about the kernels of Triton")
    start = time.perf_counter()
    rows = None if args.library else compile_all(_wanted(args))
    seconds = time.perf_counter() - start
    library = None if args.triton or args.family is not None else _library(args)
    fit = all(row["fits"] for row in [*(rows or ()), *(library["kernels"] if library else ())])
    if args.json:
        parts = {name: part for name, part in (("kernels", rows), ("library", library)) if part is not None}
        print(json.dumps({"fit": fit, "seconds": round(seconds, 1), **parts}, indent=2))
        return 0 if fit else 1
    if rows is not None:
        print("\n".join(table(HEADER, map(_cells, rows), right=range(5, 14))))
        print(f"{summary(_archs(args), rows)}; {seconds:.0f} s")
    if library is not None:
        if library["kernels"]:
            print("\n".join(table(LIBRARY_HEADER, map(_cells, library["kernels"]), right=range(2, 11))))
        archs = dict.fromkeys(row["architecture"] for row in library["kernels"])
        found = summary(archs, library["kernels"]) or f"no kernels for {' '.join(_archs(args))}"
        print(f"library: {library['missing'] or found}")
    return 0 if fit else 1


def _archs(args: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(args.arch or ["sm_90"]))


def _wanted(args: argparse.Namespace) -> list:
    """The kernels of Triton that are asked for."""
    _check_triton()
    from fused_resnet.backends.triton import launch, shipped

    archs = {f"sm_{major}{minor}": (major, minor) for major, minor in launch.SHARED_MEMORY}
    for name in _archs(args):
        if name not in archs:
            raise UsageError(f"--arch: unknown architecture {name!r}, expected one of {', '.join(archs)}")
    if args.family is not None and args.family not in shipped.names():
        raise UsageError(f"--family: unknown family {args.family!r}, expected one of {', '.join(shipped.names())}")
    return [
        row
        for name in _archs(args)
        for row in shipped.shipped(archs[name], args.family or "", args.quick)
        if row.mode in args.dtype
    ]


def _check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise UsageError("Triton is not installed; pip install triton")
    if interpreted():
        raise UsageError("TRITON_INTERPRET is set: kernels are interpreted then, not compiled; unset it")
    missing = [name for name in ("ptxas", "cuobjdump") if not sass.tool(name)]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} came neither with Triton nor with a CUDA toolkit; pip install triton"
        )


def _library(args: argparse.Namespace) -> dict[str, Any]:
    """The kernels of the compiled library, or why there are none."""
    missing = extension_missing() or ("" if cuda.architectures() else cuda.NO_KERNELS)
    if not missing and not sass.tool("cuobjdump"):
        missing = "neither Triton nor a CUDA toolkit has cuobjdump, which reads it; pip install triton"
    if missing:
        if args.library:
            raise UsageError(missing)
        return {"missing": missing, "architectures": "", "kernels": []}
    from fused_resnet.backends.cuda import compiled

    # "sm_90a" is asked for as "sm_90" too.
    rows = [
        {**row, "error": ""}
        for row in compiled.kernels(cuda.library())
        if not args.arch or {row["architecture"], row["architecture"].rstrip("af")} & set(args.arch)
    ]
    return {"missing": "", "architectures": cuda.architectures(), "kernels": rows}


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
    if row["shared_bytes"] > row.get("shared_limit", row["shared_bytes"]):
        reasons.append(f"TOO LARGE: of {row['shared_limit'] >> 10} KiB shared memory")
    return ", ".join(reasons) or "DOES NOT FIT"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    kib = "-" if row["shared_bytes"] is None else f"{row['shared_bytes'] / 1024:.1f} KiB"
    counts = ["-" if row[name] is None else str(row[name]) for name in COUNTS if name != "shared_bytes"]
    return (*(row[name] for name in ABOUT if name in row), *counts[:2], kib, *counts[2:], verdict(row))


def summary(archs: Iterable[str], rows: list[dict[str, Any]]) -> str:
    """Such as "sm_80: 17 of 17 kernels fit, sm_90: 200 of 201 kernels fit"."""
    parts = []
    for arch in archs:
        fit = [row["fits"] for row in rows if row["architecture"] == arch]
        parts.append(f"{arch}: {sum(fit)} of {len(fit)} kernels fit" if fit else f"{arch}: no such kernels")
    return ", ".join(parts)
