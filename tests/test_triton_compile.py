"""Kernels compiled for GPUs that are not here: all fit, nothing spills, and the instructions are the fast ones.

In processes of their own: with TRITON_INTERPRET, which the other tests need without a GPU, there is nothing to compile.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fused_resnet import cli, kernels
from fused_resnet.backends import sass
from fused_resnet.backends.config import Config
from fused_resnet.backends.problem import POOLED
from fused_resnet.backends.triton import shipped

MISSING = [name for name in ("ptxas", "cuobjdump") if not sass.tool(name)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} is missing")

# sm_90 is the one that the kernels are made for; the others are compiled in one dtype, to save time.
ARCHS = {"sm_80": ("bf16",), "sm_90": kernels.MODES, "sm_100": ("bf16",)}

# The kernels whose products are to come from wgmma, of operands that TMA brings.
TENSOR_CORES = {"conv1x1", "implicit_gemm", "stem", "stem_pool", "stem_rows", "grouped"}
HELPERS = {"split_k_reduce_kernel", "stem_pack_kernel", "norm_scale_kernel"}
MEMORY_BOUND = {"scale_act", "add_act", "max_pool2d", "batch_norm"}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    argv = [sys.executable, "-m", "fused_resnet", "kernels", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1], check=False)


@cache
def compiled(arch: str) -> list[dict]:
    """The rows of one architecture, compiled once a session."""
    done = command("--triton", "--arch", arch, "--quick", "--json", "--dtype", *ARCHS[arch])
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return json.loads(done.stdout)["kernels"]


def of_families(families: set[str], arch: str = "sm_90") -> list[dict]:
    """The rows of the families that do compile: the others are one test's concern."""
    rows = [row for row in compiled(arch) if row["family"] in families and not row["error"]]
    return [row for row in rows if row["kernel"] not in HELPERS]


def channels(row: dict) -> int:
    """Of an operator without a weight."""
    return int(re.search(r"\d+x(\d+)x\d+x\d+", row["problem"])[1])


def named(rows) -> str:
    """The rows, one a line, for the message of a failed assertion."""
    return "\n".join("{configuration}, {dtype}: {problem}: ".format(**row) + kernels.verdict(row) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_and_fits(arch):
    rows = compiled(arch)
    bad = [row for row in rows if not row["fits"]]
    assert not bad, f"{arch}: {len(bad)} of {len(rows)} do not fit:\n{named(bad)}"
    assert {row["dtype"] for row in rows} >= set(ARCHS[arch]) - {"fp16"}
    for row in rows:
        assert row["spill_bytes"] == 0, named([row])
        assert 0 < row["registers"] <= 255, named([row])
        assert row["shared_bytes"] <= row["shared_limit"], named([row])


@pytest.mark.slow
def test_tensor_cores_read_what_tma_brings():
    rows = of_families(TENSOR_CORES)
    slow = [row for row in rows if not (row["wgmma"] and row["tma"])]
    assert rows
    assert not slow, f"no wgmma or no TMA in\n{named(slow)}"


@pytest.mark.slow
def test_general_convolution_uses_tensor_cores():
    rows = of_families({"general"}, "sm_80") + of_families({"general"}, "sm_90")
    slow = [row for row in rows if row["dtype"] != "fp32" and not (row["mma"] or row["wgmma"])]
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90"}
    assert not slow, f"no tensor cores in\n{named(slow)}"


@pytest.mark.slow
def test_memory_bound_kernels_read_16_bytes_at_once():
    # Rows of other lengths do not start at multiples of 16 bytes.
    rows = [row for row in of_families(MEMORY_BOUND) if channels(row) % 8 == 0]
    slow = [row for row in rows if not row["wide_loads"]]
    assert rows
    assert not slow, f"no 16-byte loads in\n{named(slow)}"


# --- the list ---------------------------------------------------------------------------------------------------------


def many_problems():
    """Problems of all operators, of every kind that is known to change the choice of a configuration."""
    channels, images = (1, 3, 4, 8, 16, 24, 32, 64, 128, 256, 512, 1024), ((256, 56), (8, 14), (1, 7), (1, 224))
    for c, (n, size), window, stride in itertools.product(channels, images, (1, 3, 7), (1, 2)):
        x = (n, c, size, size)
        for k in channels:
            yield shipped.conv(x, k, window, stride)
            yield shipped.conv(x, k, window, stride, residual=True)
        for groups in {g for g in (2, 32, c) if g <= c and c % g == 0}:
            yield shipped.conv(x, c, 3, stride, groups)
        yield shipped.conv(x, 64, window, stride, op=POOLED)
        yield shipped.plain("scale_act", x, False)
        yield shipped.plain("add_act", x, True)


def offered(mode: str, capability) -> set[Config]:
    """The configurations that any of the families offers for any of many problems, as tiles."""
    dtype, tf32 = shipped.MODES[mode]
    found = set()
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=tf32):
        for problem in many_problems():
            problem = problem._replace(dtype=dtype)
            for family in shipped.FAMILIES.get(problem.op, ()):
                if shipped.PROBLEMS.get(family.name) and not family.unsupported(problem, capability):
                    found.update(shipped.tile(config) for config in family.configs(problem, capability))
    return found


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("mode", ["bf16", "tf32", "fp32"])
def test_every_configuration_is_compiled(mode, capability):
    modes = {"tf32", "fp32"} if mode == "tf32" else {mode}  # where nothing is rounded TF32 is not told apart
    rows = [row for row in shipped.shipped(capability, quick=True) if row.mode in modes]
    missing = offered(mode, capability) - {shipped.tile(Config.parse(row.config)) for row in rows}
    assert not missing, sorted(map(str, missing))


def test_every_family_is_compiled():
    assert set(shipped.families()) <= set(shipped.PROBLEMS)
    kept = {row.family for row in shipped.shipped((9, 0), quick=True)}
    assert kept == {row.family for row in shipped.shipped((9, 0))}


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_prints_a_table_and_a_summary():
    done = command("--family", "add_act", "--dtype", "fp16", "--arch", "sm_80", "sm_90")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["architecture", "kernel", "configuration"]
    assert [line.split()[:2] for line in lines[2:-1]] == [[arch, "add_act_fwd_kernel"] for arch in ("sm_80", "sm_90")]
    assert lines[-1].startswith("sm_80: 1 of 1 kernels fit, sm_90: 1 of 1 kernels fit; ")
    assert "compile: 100%" in done.stderr


BAD = {
    "architecture": (("--arch", "sm_91"), "unknown architecture 'sm_91', expected one of sm_80, sm_86"),
    "family": (("--family", "winograd"), "unknown family 'winograd', expected one of add_act"),
    "dtype": (("--dtype", "int8"), "invalid choice: 'int8'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_usage_exits_with_2_and_says_why(case, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_check_triton", lambda: None)
    arguments, message = BAD[case]
    try:
        code = cli.main(["kernels", *arguments])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert message in shown.err


def test_interpreter_exits_with_2():
    done = command(TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "TRITON_INTERPRET is set: kernels are interpreted then, not compiled; unset it" in done.stderr


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["kernels", "--help"])
    assert "example: fused-resnet kernels --arch sm_80 sm_90" in " ".join(capsys.readouterr().out.split())


def test_missing_triton_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["kernels"]) == 2
    assert "Triton is not installed; pip install triton" in capsys.readouterr().err


SPILLS = {"spill_bytes": 8, "shared_bytes": 1, "fits": False, "error": ""}
LARGE = {"spill_bytes": 0, "shared_bytes": 100 << 10, "fits": False, "error": ""}
ERROR = {**dict.fromkeys(kernels.COUNTS), "fits": False, "error": "ptxas fatal"}


@pytest.mark.parametrize(
    ("numbers", "text"), [(SPILLS, "SPILLS 8 bytes"), (LARGE, "of 99 KiB"), (ERROR, "ptxas fatal")]
)
def test_kernel_that_does_not_fit_exits_with_1(numbers, text, monkeypatch, capsys):
    about = dict.fromkeys(kernels.ABOUT, "") | {"architecture": "sm_86", "shared_limit": 99 << 10}
    row = dict.fromkeys(kernels.COUNTS, 0) | about | numbers
    monkeypatch.setattr(kernels, "_check_triton", lambda: None)
    monkeypatch.setattr(kernels, "compile_all", lambda wanted: [row])
    assert cli.main(["kernels", "--arch", "sm_86", "--family", "max_pool2d"]) == 1
    shown = capsys.readouterr().out
    assert text in shown
    assert "sm_86: 0 of 1 kernels fit" in shown


def test_error_of_a_kernel_is_in_its_row():
    class Broken:
        capability, kernel, family, config, mode, problem, launch = (9, 0), "k", "f", "c", "bf16", "p", None

    (row,) = kernels.compile_all([Broken])
    assert row["fits"] is False
    assert "has no attribute 'kernel'" in row["error"]
    assert row["registers"] is None
