"""What every test needs: torchvision beside a CPU-only torch, the CUDA kernels without a GPU, seeds, and the GPU's
absence said aloud.
"""

import contextlib
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter, which has to be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No plan and no verdict of the user's is read or written.
_CACHE = tempfile.TemporaryDirectory(prefix="fused_resnet_tests")
os.environ["FUSED_RESNET_CACHE"] = _CACHE.name

# Matrix products on a GPU are refused under use_deterministic_algorithms without it; cuBLAS reads it at its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

NO_GPU = "needs an NVIDIA GPU, and torch.cuda finds none"


def _load_torchvision_operators() -> None:
    """Beside a CPU-only torch, torchvision's compiled part does not load; its import registers fakes for two of its
    operators, which are then made here. Where it loads it has them, and no operator can be defined twice.
    """
    found = importlib.util.find_spec("torchvision")
    for library in Path(found.origin).parent.glob("_C*") if found else ():
        with contextlib.suppress(OSError):
            torch.ops.load_library(library)


def _load_emulator() -> None:
    """Without a GPU the CUDA kernels are built for the CPU, so that every test of all backends runs them too.

    Kernels that do not compile end the run. FUSED_RESNET_EMULATOR=0 does without, where the time counts.
    """
    if torch.cuda.is_available() or os.environ.get("FUSED_RESNET_EMULATOR", "1") == "0":
        return
    from emulator import build

    from fused_resnet.backends.cpu import extension_missing

    if not extension_missing():  # which defines the operators
        build.load()


_load_emulator()
_load_torchvision_operators()
_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _TORCHVISION.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=NO_GPU)
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    """One line about the tests marked gpu: a run without a GPU must not look like one that has tested it."""

    def count(*outcomes: str) -> int:
        reports = [report for outcome in outcomes for report in terminalreporter.stats.get(outcome, ())]
        return sum("gpu" in getattr(report, "keywords", ()) for report in reports)

    ran, skipped = count("passed", "failed"), count("skipped")
    if ran:
        also = f", {skipped} skipped" if skipped else ""
        terminalreporter.write_line(f"gpu: {ran} tests ran on {torch.cuda.get_device_name()}{also}")
    elif skipped:
        reason = "" if torch.cuda.is_available() else " for want of a GPU"
        terminalreporter.write_line(f"gpu: {skipped} tests skipped{reason}")
