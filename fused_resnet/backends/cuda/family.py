"""What a file of convolution kernels offers the selection."""

from collections.abc import Callable
from typing import NamedTuple


class Family(NamedTuple):
    """One form of convolution.

    unsupported(problem, capability): why it cannot run the problem; "": it can.
    configs(problem, capability): the configurations that fit, the likeliest first.
    pack(weight, problem, config): the weight as the kernel reads it; equal for equal `packed_by(config)`.
    run(problem, config, x, weights, scale, shift, residual, out): computes `out`; tensors are channels_last and not
        empty; `out` may be the residual.
    """

    name: str
    unsupported: Callable
    configs: Callable
    pack: Callable
    run: Callable
    packed_by: Callable = lambda config: ()
