"""What a file of kernels offers the selection, and what the host code of the kernels shares."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fused_resnet.backends import plan

# Of an H100 and H200; kernels are cut for it, and for others well enough.
MULTIPROCESSORS = 132

# Warps that a GPU should have to hide its latencies.
WARPS = MULTIPROCESSORS * 16


class Family(NamedTuple):
    """What a file of kernels offers the selection.

    unsupported(problem, capability): why it cannot run the problem; "": it can.
    configs(problem, capability): the configurations that fit, the likeliest first.
    pack(weight, problem, config): the weight as the kernel reads it; equal for equal `packed_by(config)`.
    run(problem, config, x, weights, scale, shift, residual, out): launches the kernels on channels_last tensors that
        are not empty; `out` may be the residual.
    """

    name: str
    unsupported: Callable
    configs: Callable
    pack: Callable
    run: Callable
    packed_by: Callable = lambda config: ()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tf32_allowed(x: Tensor) -> bool:
    """Whether the products of x may be rounded to TF32. The switch is cuDNN's: CPU tensors do not follow it."""
    return x.is_cuda and plan.tf32()


def geometry(problem) -> tuple[int, ...]:
    """Window, stride, padding and dilation of a `Problem` with a weight, as the kernels take them."""
    return *problem.weight[2:], *problem.stride, *problem.padding, *problem.dilation
