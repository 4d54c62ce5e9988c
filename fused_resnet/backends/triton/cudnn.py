"""PyTorch's own convolution (cuDNN on a GPU), and one launch for all that follows it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.backends.triton import elementwise
from fused_resnet.backends.triton.launch import Config, Family

NAME = "cudnn"
BLOCKS = elementwise.SCALE_BLOCKS


class ConvolveAndLaunch(NamedTuple):
    """In place of a `Launch`: the convolution makes the tensor that the launch reads."""

    convolve: object  # () -> Tensor
    launch: object  # (Tensor) -> Launch

    def run(self) -> None:
        self.launch(self.convolve()).run()


def unsupported(problem, capability) -> str:
    return "" if capability >= (8, 0) else "it needs compute capability 8.0"


def configs(problem, capability) -> list[Config]:
    after = elementwise.scale_configs(_after(problem), capability)
    return [config._replace(family=NAME) for config in after]


def _after(problem):
    """The problem that the convolution's output poses."""
    return problem._replace(op="scale_act", x=problem.output, weight=())


def pack(weight, problem, config) -> Tensor:
    return weight.detach().to(problem.dtype, memory_format=torch.channels_last)


def launches(problem, config, x, weights, scale, shift, residual, out) -> tuple[ConvolveAndLaunch]:
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)

    def convolve() -> Tensor:
        z = F.conv2d(x, weights, None, *geometry)
        return z.contiguous(memory_format=torch.channels_last)

    def launch(z: Tensor):
        return elementwise.scale_launches(_after(problem), config, z, None, scale, shift, residual, out)[0]

    return (ConvolveAndLaunch(convolve, launch),)


FAMILY = Family(NAME, unsupported, configs, pack, launches)
