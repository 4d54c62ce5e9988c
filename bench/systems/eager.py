"""Plain PyTorch: cuDNN or oneDNN for the convolution, aten for batch norm, residual and activation."""

import torch
import torch.nn.functional as F

from bench.systems.base import Graphed, System
from fused_resnet.modules.unit import plain_activation, unfused

EPS = 1e-5  # a batch norm's usual one


class Eager(System):
    """The modules of torch, one after the other, channels_last."""

    name = "eager"
    tasks = ("network", "layer", "op", "statistics", "training")

    def forward(self, model):
        def run(x):
            with unfused():
                return model(x)

        return run

    def layer(self, layer, tensors):
        """Batch norm with mean 0 and variance 1 is the scale and the shift; the rest works in place, as a network's."""
        x, weight, scale, shift, residual = tensors
        mean, var = torch.zeros_like(scale), torch.ones_like(scale) - EPS

        def call():
            y = F.batch_norm(F.conv2d(x, weight, **layer.geometry), mean, var, scale, shift, eps=EPS)
            if residual is not None:
                y += residual
            return plain_activation(y, layer.act)

        return call


class EagerNCHW(Eager):
    """The same in PyTorch's default layout."""

    name = "eager-nchw"
    tasks = ("network",)

    def forward(self, model):
        run = super().forward(model.to(memory_format=torch.contiguous_format))
        return lambda x: run(x.contiguous())

    def network(self, model, x):
        return super().network(model, x.contiguous())


class EagerGraph(Graphed, Eager):
    """Eager, captured in a CUDA graph."""

    name = "eager-graph"
