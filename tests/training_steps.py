"""Blocks, and one training step of them, fused and plain; in fp64, where no sign depends on rounding."""

import copy

import pytest
import torch
from networks import relative, seeded
from problems import randomised
from tolerances import tolerance
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet as fr
from fused_resnet.modules import unit

C = 16


def projected(make, *args):
    return make(C, *args, downsample=nn.Sequential(nn.Conv2d(C, 32, 1, 2, bias=False), nn.BatchNorm2d(32)))


BLOCKS = {
    "basic": lambda: fr.BasicBlock(C, C),
    "basic_projected": lambda: projected(fr.BasicBlock, 32, 2),
    "bottleneck": lambda: fr.Bottleneck(C, 4),
    "bottleneck_projected": lambda: projected(fr.Bottleneck, 8, 2),
}
blocks = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())


def block_of(make, dtype=torch.double):
    return randomised(seeded(make)).to(dtype).train()


def images(n=4, dtype=torch.double):
    return torch.randn(n, C, 9, 7, dtype=dtype)


def loss_of(y):
    """A sum in which every value has a weight of its own."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()


def results(module, x, run=None):
    """Output, gradients of x and of the parameters, and the buffers as fp64, of one step; None without a gradient."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = (run or module)(x)
    loss_of(y).backward()
    return [y.detach(), x.grad, *[p.grad for p in module.parameters()], *[b.double() for b in module.buffers()]]


def eager(module, x):
    """The same of a copy, run as plain PyTorch."""
    with unit.unfused():
        return results(copy.deepcopy(module), x)


def assert_close(found, wanted):
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a is None) == (b is None), i
        assert a is None or torch.equal(a, b) or relative(a, b) < tolerance("model_fp64"), i


def assert_identical(found, wanted):
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    def blocks(self) -> int:
        return self.names.count("fused_resnet::block")
