"""Tests that run on a GPU where there is one: their bodies run on the CPU too, which proves them everywhere.

`-m gpu` selects what needs the GPU. There every backend is tested that is available and takes its tensors; on the CPU
the reference will do, since the operators' own tests have all backends there.
"""

import pytest
import torch
from problems import BACKEND_NAMES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_resnet.backends.selection import BACKENDS


def _takes_cuda(backend: str) -> bool:
    with FakeTensorMode():  # asks without a GPU
        x = torch.empty(1, 1, 1, 1, device="cuda")
    return not BACKENDS[backend].unsupported("add_act", x)


BACKENDS_OF = {"cpu": ["reference"], "cuda": [name for name in BACKEND_NAMES if _takes_cuda(name)]}
MARKS = {"cpu": (), "cuda": (pytest.mark.gpu,)}

devices = pytest.mark.parametrize("device", [pytest.param(device, marks=marks) for device, marks in MARKS.items()])
gpu_backends = pytest.mark.parametrize("backend", BACKENDS_OF["cuda"])


def on_devices(name: str = "", table=(), few=None):
    """Parametrise `device`, `backend` and, from the dict or the sequence `table`, `name`.

    On the CPU only the entries whose names are in `few`.
    """
    table = table if isinstance(table, dict) else {getattr(value, "id", str(value)): value for value in table}
    rows = []
    for device, marks in MARKS.items():
        for backend in BACKENDS_OF[device]:
            where = f"{device}-{backend}"
            if not name:
                rows.append(pytest.param(device, backend, marks=marks, id=where))
            for key, value in table.items():
                if device != "cpu" or few is None or key in few:
                    rows.append(pytest.param(device, backend, value, marks=marks, id=f"{where}-{key}"))
    return pytest.mark.parametrize(("device", "backend", name) if name else ("device", "backend"), rows)


def moved(tensors, device: str):
    """A tensor, or a dict of tensors, on the device; strides are kept where they leave no gaps."""
    if isinstance(tensors, dict):
        return {name: moved(t, device) for name, t in tensors.items()}
    return tensors.to(device) if isinstance(tensors, Tensor) else tensors


def full_fp32():
    """Body of a fixture: fp32 on the GPU is fp32, not TF32 with its ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    # A context, because PyTorch's own samples (test_op_db.py), once imported, forbid to set the flag itself.
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


def without_cudnn():
    """Body of a fixture: convolutions on the GPU are plain sums of products.

    For fp32 cuDNN may take Winograd's or an FFT, which round integers too, spread a NaN over its neighbours, and have
    other errors in another layout; aten's own is a matrix product.
    """
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        yield


def skip_without(bytes_needed: int) -> None:
    """Skip where the GPU has less memory free than the problem takes."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < bytes_needed:
        pytest.skip(f"needs {bytes_needed / 2**30:.0f} GiB of GPU memory, and {free / 2**30:.0f} are free")
