"""What every test needs: torchvision beside a CPU-only torch, the CUDA kernels without a GPU, seeds, and the GPU's
absence said aloud.
"""

import os
import tempfile

import pytest
import torch

import bench.torchvision_operators  # noqa: F401

# Without a GPU Triton's kernels run in its interpreter, which has to be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No plan and no verdict of the user's is read or written.
_CACHE = tempfile.TemporaryDirectory(prefix="fused_resnet_tests")
os.environ["FUSED_RESNET_CACHE"] = _CACHE.name

# Matrix products on a GPU are refused under use_deterministic_algorithms without it; cuBLAS reads it at its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

NO_GPU = "needs an NVIDIA GPU, and torch.cuda finds none"


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


def pytest_configure(config):
    """Processes that share the tests share the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


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
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)  # first, so that no process is alone with them at the end
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
