"""The forward passes of `fused_resnet::block` over its tensors, each by the backend of its problem.

A batch of no images passes no kernel, but takes part in what processes exchange.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.backends.norm import Norm
from fused_resnet.backends.problem import ConvArgs, windows
from fused_resnet.ops import synchronise
from fused_resnet.ops.library import empty_channels_last, select


class Inputs(NamedTuple):
    """The tensors of a block: its convolutions' in a row, the projection's last; `residual` is what is given to add."""

    x: Tensor
    residual: Tensor | None
    weights: list[Tensor]
    conv_biases: list[Tensor | None]
    bn_weights: list[Tensor | None]
    bn_biases: list[Tensor | None]


class Form(NamedTuple):
    """A block without its tensors."""

    convs: list[ConvArgs]
    eps: list[float]
    acts: list[str]
    shortcut: str  # what is added: "", "input", "given" or "projected"
    pool: tuple  # kernel, stride and padding, or ()
    lean: bool
    masked: bool  # whether a backend may keep a bit for each output, whose memory nobody knows the size of
    group: str
    backend: str

    @property
    def depth(self) -> int:
        """Convolutions in a row; of a batch norm alone, none."""
        return len(self.convs) - (self.shortcut == "projected")


class Kept(NamedTuple):
    """What the forward pass leaves for the backward one. Lists are in the order of `Inputs`.

    z: the convolutions' outputs; where the form is lean, without the last one's and the projection's.
    told: of a max pooling, the tap of each output; else a mask of the last activation's slope, or nothing.
    totals: the values a channel of each batch norm over all processes, where there are several.
    """

    z: list[Tensor]
    mean: list[Tensor]
    var: list[Tensor]
    told: Tensor
    totals: Tensor


def values(x: Tensor) -> int:
    """Values a channel."""
    return x.shape[0] * x.shape[2] * x.shape[3]


class Passes:
    """What both directions share."""

    def __init__(self, inputs: Inputs, form: Form):
        residual = None if inputs.residual is None else reference.channels_last(inputs.residual)
        self.inputs, self.form = inputs._replace(x=reference.channels_last(inputs.x), residual=residual), form
        self.norms: list[Norm] = []
        self.totals: list[Tensor] = []

    def norm_backend(self, x: Tensor):
        return select("bn_act", self.form.backend, x)

    def convolution(self, i: int, x: Tensor, norm: Norm | None, act: str, *, moments: bool) -> tuple[Tensor, ...]:
        """The output of convolution i for act(norm(x)), and its moments where they are asked for."""
        inputs, args = self.inputs, self.form.convs[i]
        weight, bias = inputs.weights[i], inputs.conv_biases[i]
        if x.numel() == 0:
            return _of_nothing(empty_channels_last(x, args.output_size(x, weight)))
        backend = select("conv_bn_act", self.form.backend, x, weight, args)
        given = (x, norm, act, weight, bias, args)
        return backend.conv_moments(*given) if moments else (backend.convolve(*given),)

    def before(self, i: int, x: Tensor, z: list[Tensor]) -> tuple[Tensor, Norm | None, str]:
        """What convolution i of the row reads: a tensor, its norm and its activation."""
        return (x, None, "none") if i == 0 else (z[i - 1], self.norms[i - 1], self.form.acts[i - 1])

    def add_norm(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Take the moments of this process's values, and over the group, for the next batch norm."""
        i = len(self.norms)
        if self.form.group:
            mean, var, total = synchronise.merged_moments(mean, var, count, self.form.group)
            self.totals.append(total)
        self.norms.append(Norm(mean, var, self.inputs.bn_weights[i], self.inputs.bn_biases[i], self.form.eps[i]))


def _of_nothing(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zeros = z.new_zeros(z.shape[1], dtype=reference.wide(z))
    return z, zeros, zeros.clone()


def forward(inputs: Inputs, form: Form) -> tuple:
    """The output, and all of `Kept`."""
    passes, z = Passes(inputs, form), []
    last = x = passes.inputs.x
    residual = passes.inputs.residual
    for i in range(form.depth):
        last, *moments = passes.convolution(i, *passes.before(i, x, z), moments=True)
        z.append(last)
        passes.add_norm(*moments, values(last))
    if form.depth == 0:
        passes.add_norm(*(passes.norm_backend(x).moments(x) if x.numel() else _of_nothing(x)[1:]), values(x))
    norm, residual_norm, act = passes.norms[-1], None, form.acts[-1]
    if form.shortcut == "projected":
        residual, *moments = passes.convolution(form.depth, x, None, "none", moments=True)
        z.append(residual)
        passes.add_norm(*moments, values(residual))
        residual_norm = passes.norms[-1]
    elif form.shortcut == "input":
        residual = x
    y, told = _end(passes, last, norm, residual, residual_norm, act)
    kept = z[: form.depth - 1] if form.lean else z
    totals = torch.stack(passes.totals) if form.group else x.new_empty(0, dtype=torch.float64)
    return y, kept, [n.mean for n in passes.norms], [n.var for n in passes.norms], told, totals


def _end(passes: Passes, x, norm, residual, residual_norm, act) -> tuple[Tensor, Tensor]:
    form = passes.form
    told = x.new_empty(0, dtype=torch.uint8)
    if form.pool:
        size = windows(x.shape[2:], *form.pool)
        if x.numel() == 0:
            y = empty_channels_last(x, (*x.shape[:2], *size))
            return y, empty_channels_last(x, y.shape, torch.uint8)
        return passes.norm_backend(x).norm_act_max_pool2d(x, norm, act, *form.pool, size)
    if x.numel() == 0:
        return empty_channels_last(x, x.shape), told
    y, mask = passes.norm_backend(x).norm_act(x, norm, residual, residual_norm, act)
    return y, mask if mask is not None and form.masked and form.shortcut == "input" else told
