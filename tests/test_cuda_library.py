"""The compiled library, without a GPU: what is in it, where it loads, and what its operators refuse."""

import ctypes
import os
import re
import subprocess
import sys

import pytest
import torch

from fused_resnet.backends import cuda, sass
from fused_resnet.backends.cpu.extension import INTERFACE, extension_missing
from fused_resnet.backends.cuda import compiled

MISSING = extension_missing() or ("" if cuda.architectures() else "the extension was built without CUDA kernels")
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "it is there")

# What multiplies has to do it by tensor cores; what only moves has to do it 16 bytes at a time, where it may.
CONVOLUTIONS = ("implicit_gemm_kernel", "stem_kernel")
STREAMS = (
    "add_act_fwd_kernel",
    "add_act_bwd_kernel",
    "bn_apply_kernel",
    "bn_reduce_kernel",
    "bn_input_grad_kernel",
    "bn_stats_kernel",
    "max_pool_kernel",
    "max_pool_bwd_kernel",
    "depthwise_any_kernel",
    "depthwise_dgrad_kernel",
    "depthwise_fwd_kernel",
    "depthwise_wgrad_any_kernel",
    "depthwise_wgrad_kernel",
)
WIDE = {"bf16": "8", "fp16": "8", "fp32": "4"}  # elements in 16 bytes
OPERATORS = sorted(
    name
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fused_resnet_C::cuda_") and not name.endswith(("_architectures", "_driver_lacking"))
)


@pytest.fixture(scope="module")
def rows():
    if not sass.tool("cuobjdump"):
        pytest.skip("neither Triton nor a CUDA toolkit has cuobjdump")
    return compiled.kernels(cuda.library())


def test_library_has_code_for_each_architecture(rows):
    """And PTX, for GPUs that come later, of one whose PTX they all take."""
    found = {row["architecture"] for row in rows}
    wanted = {f"sm_{arch.replace('.', '').removesuffix('+PTX')}" for arch in cuda.architectures().split(";")}
    assert found == wanted
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert found == {"sm_80", "sm_90a"}
        assert ".sm_80.ptx" in sass.cuobjdump("--list-ptx", cuda.library())
        counts = [sum(row["architecture"] == arch for row in rows) for arch in found]
        assert len(set(counts)) == 1


def test_library_spills_nothing(rows):
    assert [row["kernel"] for row in rows if row["spill_bytes"]] == []


def test_library_convolves_by_tensor_cores(rows):
    found = [row for row in rows if row["kernel"].startswith(CONVOLUTIONS)]
    assert {row["kernel"].partition("<")[0] for row in found} == set(CONVOLUTIONS)
    assert [row["kernel"] for row in found if row["mma"] == 0 or row["wide_stores"] == 0] == []
    gemm = [row for row in found if row["kernel"].startswith("implicit_gemm_kernel")]
    assert [row["kernel"] for row in gemm if row["cp_async"] == 0] == []


@pytest.mark.parametrize("stream", STREAMS)
def test_library_streams_16_bytes_at_a_time(rows, stream):
    """Each form that is for whole vectors of channels; it has one for the other numbers of channels beside it. Weight
    gradients write few sums only."""
    named = [(row, re.fullmatch(r"(\w+)<(\w+), (\d+).*>", row["kernel"])) for row in rows]
    found = [(row, name[2], name[3]) for row, name in named if name and name[1] == stream]
    assert {dtype for _, dtype, _ in found} == set(WIDE)
    wide = [row for row, dtype, width in found if width == WIDE[dtype]]
    assert len(wide) >= len(WIDE) * len({row["architecture"] for row in rows})
    assert [row["kernel"] for row in wide if not row["wide_loads"]] == []
    if not stream.startswith("depthwise_wgrad"):
        assert [row["kernel"] for row in wide if not row["wide_stores"]] == []


def test_library_streams_are_all_named(rows):
    """A kernel whose second parameter is its width is one of those that only move data."""
    named = {name[1] for row in rows if (name := re.fullmatch(r"(\w+)<(?:bf16|fp16|fp32), \d+.*>", row["kernel"]))}
    assert named - set(CONVOLUTIONS) == {*STREAMS, "implicit_gemm_sum_kernel"}


def test_operators_are_there():
    assert len(OPERATORS) > 10
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def test_driver_is_asked_for():
    """The library loads, and answers, where there is no driver."""
    lacking = torch.ops.fused_resnet_C.cuda_driver_lacking()
    assert re.fullmatch("(no NVIDIA driver is here|the NVIDIA driver is older than CUDA .*)?", lacking)
    if torch.cuda.is_available() and not cuda.unavailable():
        assert not lacking
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert lacking == "no NVIDIA driver is here"


def test_operators_refuse_cpu_tensors():
    """Without the tests' emulator, which takes them."""
    script = f"""
import torch, fused_resnet as fr
import fused_resnet._C
from fused_resnet.backends import cpu
assert not cpu.extension_missing() and torch.ops.fused_resnet_C.interface_number() == {INTERFACE}
x = torch.zeros(1, 8, 2, 2)
try:
    torch.ops.fused_resnet_C.cuda_add_act_fwd(x, x, 0, x)
except NotImplementedError as error:
    print("op:", str(error).splitlines()[0])
try:
    fr.ops.add_act(x, x, backend="cuda")
except RuntimeError as error:
    print("backend:", error)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    operator, backend = found.stdout.splitlines()
    assert "fused_resnet_C::cuda_add_act_fwd" in operator
    assert "'CPU' backend" in operator
    assert backend.startswith("backend: add_act: backend 'cuda' ")


def test_operators_on_fake_tensors():
    """The public operators have fakes that need no GPU; a fake CUDA tensor finds its backend."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    import fused_resnet as fr

    with FakeTensorMode():
        x = torch.empty((2, 8, 6, 6), device="cuda", memory_format=torch.channels_last)
        weight, vector = torch.empty(16, 8, 3, 3, device="cuda"), torch.empty(16, device="cuda")
        y = fr.ops.conv_scale_act(x, weight, vector, vector, padding=1, stride=2)
        assert (y.shape, y.device.type) == ((2, 16, 3, 3), "cuda")
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert fr.ops.add_act(x, x).shape == x.shape
        few = torch.empty(8, device="cuda")
        z = fr.ops.bn_act(x, few, few, few, few, training=True)
        assert z.stride() == x.stride()


OTHER = os.environ.get("FUSED_RESNET_OTHER_PYTHON", "")


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="FUSED_RESNET_OTHER_PYTHON names no interpreter with another torch")
def test_library_loads_beside_another_torch():
    """Such as a Python with torch 2.11.0 for CUDA 13.0, on a machine without a driver."""
    script = f"""
import torch
torch.ops.load_library({str(cuda.library())!r})
ops = torch.ops.fused_resnet_C
assert ops.interface_number() == {INTERFACE}
x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
y = torch.empty_like(x)
ops.add_act_fwd(x, x, 1, y)
assert torch.equal(y, torch.relu(x + x))
for name in {OPERATORS!r}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
print(torch.__version__, ops.cuda_architectures())
"""
    found = subprocess.run([OTHER, "-c", script], capture_output=True, text=True, check=False, cwd="/")
    assert found.returncode == 0, found.stderr
    version, architectures = found.stdout.split()
    assert version != torch.__version__
    assert architectures == cuda.architectures()
