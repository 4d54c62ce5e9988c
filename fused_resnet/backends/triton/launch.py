"""One launch of a kernel as a value: it runs, and it is compiled without a GPU."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet.backends.config import SHARED_MEMORY as SHARED_MEMORY
from fused_resnet.backends.config import Config as Config
from fused_resnet.backends.config import shared_memory as shared_memory
from fused_resnet.backends.plan import tf32


class Launch(NamedTuple):
    """A kernel with everything that it is launched with. `args` are in the kernel's order, before its constants."""

    kernel: Any
    grid: int
    args: tuple
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        self.kernel[(self.grid,)](*self.args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)


class Family(NamedTuple):
    """What a file of kernels offers the selection.

    unsupported(problem, capability): why it cannot run the problem; "": it can.
    configs(problem, capability): the configurations that fit, the likeliest first.
    pack(weight, problem, config): the weight as the kernel reads it; equal for equal `packed_by(config)`.
    launches(problem, config, x, weights, scale, shift, residual, out): the launches, in order, of channels_last
        tensors that are not empty; `out` may be the residual. In training also with `partials` and `on_load`, below.
    tiles(problem, config): how many tiles of pixels leave the moments of what they store in `partials` (statistics.py);
        0: none do.
    normalises(problem): whether it takes `on_load`, by which the convolution reads act((x - mean) * scale + shift):
        three vectors, and the name of the activation.
    """

    name: str
    unsupported: Callable
    configs: Callable
    pack: Callable
    launches: Callable
    packed_by: Callable = lambda config: ()
    tiles: Callable = lambda problem, config: 0
    normalises: Callable = lambda problem: False


def no_tma(problem, capability: tuple[int, int]) -> str:
    """Why a convolution cannot be read by TMA and multiplied by tensor cores; "": it can."""
    if not aligned(problem, problem.x[1], problem.weight[0]):
        return "its channels are not multiples of 16 bytes"
    if not tensor_cores(problem):
        return "fp32 without TF32 has no tensor cores"
    if is_wide(max(pixels(problem.x), pixels(problem.output))):
        return "more than 2^31 pixels"
    return "" if capability >= (9, 0) else "it needs TMA, of compute capability 9.0"


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(value: int, least: int, most: int) -> int:
    """The smallest power of two that is at least `value`, within bounds that are powers of two."""
    return min(max(1 << max(value - 1, 0).bit_length(), least), most)


def aligned(problem, *channels: int) -> bool:
    """Whether rows of so many channels can be read by TMA, whose strides are multiples of 16 bytes."""
    return all(c * problem.dtype.itemsize % 16 == 0 for c in channels)


def nhwc(x: Tensor, *block: int) -> TensorDescriptor:
    """A channels_last tensor as [N, H, W, C], read in tiles of `block`."""
    n, c, h, w = x.shape
    return TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], list(block))


def rows(x: Tensor, *block: int) -> TensorDescriptor:
    """A dense tensor as [rows, C], C being its last dimension (of a channels_last image: its channels)."""
    c = x.shape[1] if x.dim() == 4 else x.shape[-1]
    return TensorDescriptor(x, [x.numel() // c, c], [c, 1], list(block))


def precision(problem) -> str:
    """How `tl.dot` multiplies; without a meaning for 16-bit inputs."""
    return "tf32" if problem.dtype == torch.float32 and tf32() else "ieee"


def tensor_cores(problem) -> bool:
    """Whether the products may be taken by tensor cores: 16-bit, or fp32 where TF32 is allowed."""
    return problem.dtype != torch.float32 or tf32()


def takes_large_tiles(capability: tuple[int, int]) -> bool:
    """Whether tiles of 256 pixels with their stages fit into a block's shared memory."""
    return shared_memory(capability) >= 160 << 10


def is_wide(count: int) -> bool:
    """Whether indices up to `count`, plus a tile, leave 32 bits."""
    return count + (1 << 16) >= 1 << 31


def pixels(shape) -> int:
    """N * H * W of [N, C, H, W]."""
    return shape[0] * math.prod(shape[2:])
