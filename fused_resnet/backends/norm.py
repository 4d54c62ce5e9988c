"""Batch norm with its statistics, as a value that goes with the tensor it normalises."""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """(x - mean) / sqrt(var + eps) * weight + bias.

    Shapes:
        mean, var: [C], fp32 (fp64 for fp64 input), var biased; weight, bias: [C] of any floating dtype, or None (1, 0).
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
