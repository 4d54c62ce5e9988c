"""A batch norm with its statistics, as the backends' functions of training take it."""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """Batch norm with its statistics: (x - mean) / sqrt(var + eps) * weight + bias."""

    mean: Tensor  # [C] fp32
    var: Tensor  # [C] fp32, biased
    weight: Tensor | None  # [C] any floating dtype, None: 1
    bias: Tensor | None  # None: 0
    eps: float
