"""What the tests of csrc/cuda share: the kernels on a GPU, or on the CPU, and memory that shows what they touch."""

import ctypes
import mmap
import os
from functools import cache

import pytest
import torch
from emulator import build
from problems import PLANES
from torch import Tensor

from fused_resnet.backends.cpu import extension_missing

IN_EMULATOR = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if IN_EMULATOR else "cuda")


# Beside those of every operator: several tiles of rows, several of channels, and batches without a map.
SHAPES = PLANES | {
    "tiles": (3, 40, 31, 29),
    "channel_tiles": (2, 528, 5, 3),
    "odd_channel_tiles": (2, 37, 7, 5),
    "many_images": (1500, 8, 1, 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@cache
def library() -> str:
    """Why the kernels cannot run here; empty: they can."""
    if extension_missing():
        return extension_missing()
    if IN_EMULATOR and os.environ.get("FUSED_RESNET_EMULATOR", "1") == "0":
        return "FUSED_RESNET_EMULATOR=0 does without the emulator, and there is no GPU"
    if IN_EMULATOR:
        return build.load()
    return "" if torch.ops.fused_resnet_C.cuda_architectures() else "the extension was built without CUDA kernels"


def in_order(order: str):
    """Call a function with the emulator's warps and blocks in this order."""

    def call(function):
        before = os.environ.get("FUSED_RESNET_EMULATOR_ORDER")
        os.environ["FUSED_RESNET_EMULATOR_ORDER"] = order
        try:
            return function()
        finally:
            if before is None:
                del os.environ["FUSED_RESNET_EMULATOR_ORDER"]
            else:
                os.environ["FUSED_RESNET_EMULATOR_ORDER"] = before

    return call


both_orders = pytest.mark.parametrize("order", [(in_order("0"), in_order("1"))], ids=["both"])

MAP_NORESERVE = 0x4000  # Linux; Python 3.10 has no name for it

_fences: list = []  # the memory of fenced tensors


def fenced(t: Tensor, at: str = "end") -> Tensor:
    """A copy of a dense CPU tensor beside a page that cannot be read or written: it ends there, but for less than 16
    bytes, or begins right behind it (at = "start")."""
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    space = -(-size // page) * page
    memory = mmap.mmap(-1, space + page)
    _fences.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden, offset = {"end": (space, (space - size) // 16 * 16), "start": (0, page)}[at]
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + forbidden), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    return flat.as_strided(t.shape, t.stride()).copy_(t)


# Where a test that nothing outside of a tensor is touched puts its tensors; a GPU's memory has no such pages.
FENCES = ("start", "end") if IN_EMULATOR else ("",)


def placed(t: Tensor | None, at: str) -> Tensor | None:
    """The tensor, or its copy at a fence."""
    return t if t is None or not at else fenced(t, at)


def sparse(size, dtype: torch.dtype) -> Tensor:
    """A channels_last tensor of zeros, of which only those pages are there that somebody writes to."""
    n, c, h, w = size
    count = n * c * h * w
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=count).as_strided(size, (h * w * c, 1, w * c, c))
