"""cuDNN's own fusion: convolution, scale, shift, residual and activation as one operation graph."""

from functools import partial

import torch
import torch.nn.functional as F

from bench.networks import Layer
from bench.systems.base import System
from bench.systems.cudnn_graphs import Planned, operation_graph, statistics_graph
from bench.systems.units import every_unit
from bench.timing import graphed
from fused_resnet.modules.batch_norm import folded


class CuDNNFrontend(System):
    """The cuDNN frontend's graph API, each layer with the fastest of the plans that cuDNN proposes."""

    name = "cudnn-frontend"
    devices = ("cuda",)
    tasks = ("layer", "network", "statistics")
    packages = {"cudnn": "nvidia-cudnn-frontend"}

    def layer(self, layer, tensors):
        run = FusedConvolution(layer, tensors)
        x, residual = tensors[0], tensors[-1]
        return lambda: run(x, residual)

    def statistics(self, layer, tensors, eps):
        return TrainingConvolution(layer, tensors, eps)

    def network(self, model, x):
        """Every convolution with its batch norm (folded in fp32) in a graph, the rest by torch, all in a CUDA graph."""
        runs = {}

        def run(conv, bn, x, residual, act):
            x, residual = (t if t is None else t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
            if (conv, x.shape) not in runs:
                geometry = (tuple(conv.stride), tuple(conv.padding), tuple(conv.dilation), conv.groups)
                layer = Layer(tuple(x.shape), tuple(conv.weight.shape), *geometry, residual is not None, act)
                runs[conv, x.shape] = FusedConvolution(layer, (x, conv.weight, *folded(bn, conv), residual))
            return runs[conv, x.shape](x, residual)

        def call():
            with torch.no_grad(), every_unit(run):
                return model(x)

        call()  # plans are built and chosen outside of the capture
        return graphed(call)


def _empty(layer: Layer, x):
    return torch.empty(layer.output, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _channels_last(weight):
    return weight.detach().contiguous(memory_format=torch.channels_last)


class FusedConvolution:
    """One layer with its weight, scale and shift: `run(x, residual)` -> a fresh output, channels_last."""

    def __init__(self, layer: Layer, tensors):
        x, weight, scale, shift, residual = tensors
        self.layer = layer
        self.held = {
            "weight": _channels_last(weight),
            "scale": scale.detach().float().contiguous(),
            "shift": shift.detach().float().contiguous(),
        }
        given = {"x": x, "residual": residual, "output": _empty(layer, x), **self.held}
        self.planned = Planned(layer.label, partial(operation_graph, layer, x.dtype), given)

    def __call__(self, x, residual):
        output = _empty(self.layer, x)
        self.planned({"x": x, "residual": residual, "output": output, **self.held})
        return output


class TrainingConvolution:
    """relu(bn(conv(x))) with the batch's statistics, forward: the convolution's kernel sums its output and its square,
    as variance by E[x^2] - E[x]^2 needs it, and aten normalises.
    """

    def __init__(self, layer: Layer, tensors, eps: float):
        x, weight, self.bn_weight, self.bn_bias = tensors
        self.layer, self.x, self.eps = layer, x, eps
        self.weight = _channels_last(weight)
        self.planned = Planned(
            f"{layer.label} with statistics", partial(statistics_graph, layer, x.dtype), self._operands()
        )

    def _operands(self):
        channel = (1, self.layer.weight[0], 1, 1)
        sums = {name: torch.empty(channel, device=self.x.device) for name in ("sum", "square_sum")}
        return {"x": self.x, "weight": self.weight, "output": _empty(self.layer, self.x), **sums}

    def __call__(self):
        given = self._operands()
        self.planned(given)
        y = given["output"]
        count = y.numel() / y.shape[1]
        mean = given["sum"].flatten() / count
        var = given["square_sum"].flatten() / count - mean * mean
        return F.relu_(F.batch_norm(y, mean, var, self.bn_weight, self.bn_bias, eps=self.eps))
