"""The least time that a problem can take: its operations and its bytes over what the machine was measured to do.

A floor is max(FLOPs / peak, bytes / bandwidth); bandwidth counts reads plus writes. Bytes are those of a layer whose
batch norm, residual and activation cost no pass of their own: every operand is read once and every result is written
once. A map that stays in a cache moves no bytes, so that a small problem can be faster than its floor: the fraction
reached is then above 1.
"""

from dataclasses import dataclass

from bench.networks import Layer, Network, numel
from fused_resnet.options import DTYPES

ELEMENT = {name: dtype.itemsize for name, dtype in DTYPES.items()}  # bytes


@dataclass(frozen=True)
class Cost:
    """Operations (a multiply-add is two) and bytes, of one part or of several that run one after the other.

    `parts` holds (FLOPs, bytes) of each: a sum of floors, not the floor of a sum.
    """

    parts: tuple[tuple[float, float], ...]

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.parts)

    @property
    def bytes(self) -> float:
        return sum(moved for _, moved in self.parts)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parts + other.parts)

    def floor_s(self, peak: float, bandwidth: float) -> float:
        """Seconds at `peak` FLOP/s and `bandwidth` bytes/s."""
        return sum(max(flops / peak, moved / bandwidth) for flops, moved in self.parts)


def _macs(layer: Layer) -> int:
    return numel(layer.output) * numel(layer.weight[1:])


def conv_forward(layer: Layer, dtype: str) -> Cost:
    """act(conv(x) * scale + shift + residual): x, weight and residual are read, the output is written."""
    elements = numel(layer.x) + numel(layer.weight) + numel(layer.output) * (2 if layer.residual else 1)
    return Cost(((2.0 * _macs(layer), float(elements * ELEMENT[dtype])),))


def conv_backward(layer: Layer, dtype: str, *, input_gradient: bool = True) -> Cost:
    """The weight's gradient (x and the output's are read) and the input's (the output's is read, it is written)."""
    size, flops = ELEMENT[dtype], 2.0 * _macs(layer)
    weight = (flops, float(size * (numel(layer.x) + numel(layer.output) + numel(layer.weight))))
    return Cost((weight, weight) if input_gradient else (weight,))


def network_forward(found: Network, dtype: str) -> Cost:
    """Every convolution fused, max pooling and the classifier."""
    size = ELEMENT[dtype]
    cost = Cost(())
    for _, layer in found.layers:
        cost += conv_forward(layer, dtype)
    for read, written in found.pools:
        cost += Cost(((0.0, float(size * (read + written))),))
    for rows, inputs, outputs in found.linears:
        moved = rows * inputs + inputs * outputs + rows * outputs
        cost += Cost(((2.0 * rows * inputs * outputs, float(size * moved)),))
    return cost


def network_training(found: Network, dtype: str) -> Cost:
    """Forward and both gradients of every convolution, with everything else free: no way of fusing moves less as long
    as every convolution is a kernel of its own. The first layer needs no gradient of its input.
    """
    cost = network_forward(found, dtype)
    for i, (_, layer) in enumerate(found.layers):
        cost += conv_backward(layer, dtype, input_gradient=i > 0)
    for read, written in found.pools:
        cost += Cost(((0.0, float(ELEMENT[dtype] * (read + written))),))
    return cost


def conv_bn_act_forward(layer: Layer, dtype: str) -> Cost:
    """Convolution + batch norm in training + activation: the convolution sums its output, one more pass normalises."""
    return conv_forward(layer, dtype) + Cost(((0.0, 2.0 * ELEMENT[dtype] * numel(layer.output)),))


def conv_bn_act_backward(layer: Layer, dtype: str) -> Cost:
    """Of batch norm and activation, then of the convolution."""
    return bn_act_backward(layer.output, dtype, residual=False) + conv_backward(layer, dtype)


def bn_act_forward(shape: tuple, dtype: str, *, residual: bool) -> Cost:
    """Batch norm in training, (+ residual), activation: x counts twice, as no output can be written before all of x was
    read once for the statistics.
    """
    return Cost(((0.0, float(ELEMENT[dtype] * numel(shape) * (4 if residual else 3))),))


def bn_act_backward(shape: tuple, dtype: str, *, residual: bool) -> Cost:
    """x and the output's gradient count twice, for the sums and for the gradient of x, which is written; so is the
    residual's.
    """
    return Cost(((0.0, float(ELEMENT[dtype] * numel(shape) * (6 if residual else 5))),))


def add_act_forward(shape: tuple, dtype: str) -> Cost:
    """Two maps are read, one is written."""
    return Cost(((0.0, float(3 * ELEMENT[dtype] * numel(shape))),))


def add_act_backward(shape: tuple, dtype: str) -> Cost:
    """The output and its gradient are read; both maps share the gradient that is written."""
    return Cost(((0.0, float(3 * ELEMENT[dtype] * numel(shape))),))


def max_pool_forward(shape: tuple, out: tuple, dtype: str) -> Cost:
    """One map is read and one is written; indices are no part of it."""
    return Cost(((0.0, float(ELEMENT[dtype] * (numel(shape) + numel(out)))),))
