"""The units of a network, a convolution with its batch norm and what follows, as a peer computes them."""

import contextlib
import copy

import torch
from torch import nn

from fused_resnet.modules import unit
from fused_resnet.modules.batch_norm import folded


@contextlib.contextmanager
def every_unit(run):
    """The plain network, but every unit is `run(conv, bn, x, residual, act)`."""
    before = unit.conv_bn_act

    def conv_bn_act(conv, bn, x, residual=None, act="relu", *, overwrite=False):
        if not (unit.plain_convolution(conv) and unit.plain_batch_norm(bn)):
            raise RuntimeError(f"not a plain convolution and batch norm: {conv}, {bn}")
        return run(conv, bn, x, residual, act)

    unit.conv_bn_act = conv_bn_act  # the modules call it by this name
    try:
        with unit.unfused():
            yield
    finally:
        unit.conv_bn_act = before


def without_batch_norm(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """A copy of `model` with every batch norm folded into the convolution before it, in fp32 and rounded once.

    `x`: an input, by which the pairs are found.
    """
    model = copy.deepcopy(model)
    norms = set()

    def run(conv, bn, x, residual, act):
        if bn not in norms:
            norms.add(bn)
            scale, shift = folded(bn, conv)
            weight = conv.weight.float() * scale[:, None, None, None]
            conv.weight = nn.Parameter(weight.to(x.dtype), requires_grad=False)
            conv.bias = nn.Parameter(shift.to(x.dtype), requires_grad=False)
        y = conv(x)
        return unit.plain_activation(y if residual is None else y + residual, act)

    with torch.no_grad(), every_unit(run):
        model(x)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in norms:
                setattr(parent, name, nn.Identity())
    return model
