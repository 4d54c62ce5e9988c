"""Training a block of a residual network: any number of convolutions, each with batch norm and activation, a shortcut,
and the running statistics. He et al. 2015, arXiv:1512.03385, section 3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends.problem import windows
from fused_resnet.ops import checks
from fused_resnet.ops.block import run_block
from fused_resnet.ops.block_passes import Form, Inputs
from fused_resnet.ops.conv_args import geometry, normalise, pair
from fused_resnet.ops.running import update_running_statistics

MOST_TAPS = 256  # of a max pooling: the number of one is kept in a byte


class Unit(NamedTuple):
    """A convolution with its batch norm and activation; without a weight, the batch norm and activation alone.

    Shapes:
        weight: [K, C / groups, R, S]; conv_bias, bn_weight, bn_bias, running_mean, running_var: [K] or None.

    `momentum` is the weight of the batch in the running statistics; the geometry is as in `conv_bn_act`.
    """

    weight: Tensor | None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    conv_bias: Tensor | None = None
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    momentum: float = 0.1
    eps: float = 1e-5
    act: str = "relu"


def residual_block(
    x: Tensor,
    units: Sequence[Unit],
    *,
    residual: Tensor | None = None,
    projection: Unit | None = None,
    add_input: bool = False,
    max_pool: tuple = (),
    lean: bool = False,
    group: str = "",
    backend: str | None = None,
) -> Tensor:
    """Return `units[-1](... units[0](x))` in training, with something added before the last activation.

    For the backward pass the outputs of the convolutions are kept, and nothing of what batch norm and activations make
    of them: that is computed again where it is read. The running statistics are updated in place.

    Shapes:
        x: [N, C, H, W], fp32, bf16, fp16 or fp64; channels_last is the native layout, others are converted.
        returns: [N, K, P, Q] in channels_last.

    Args:
        units: one without a weight, or any number with weights.
        residual: a tensor of the output's shape to add; add_input: x is added; projection: a unit on x is added, whose
            activation is left out. At most one of the three.
        max_pool: kernel, stride and padding, each (height, width), of a max pooling at the end, without a shortcut.
        lean: the output of the last convolution and of the projection are not kept either, but computed again.
        group: name of the process group over which the batch's statistics are taken (SyncBatchNorm); "": this process.
        backend: a name of `available_backends()`; by default the selection decides.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, before anything is launched; one value a
        channel, as `torch.nn.functional.batch_norm`.
    """
    op = "residual_block"
    checks.check_input(op, x)
    if not units or (len(units) > 1 and any(unit.weight is None for unit in units)):
        raise ValueError(f"{op}: units must be one batch norm, or convolutions with theirs, got {len(units)} units")
    if (residual is not None) + (projection is not None) + add_input + bool(max_pool) > 1:
        raise ValueError(f"{op}: give one of residual, projection, add_input and max_pool")
    if units[0].weight is None and (projection is not None or add_input):
        raise ValueError(f"{op}: a batch norm without a convolution takes no projection and no add_input")
    if units[0].padding == "same" and units[0].weight is not None and projection is None and not add_input:
        x, units = _padded(op, x, units)
    size, convs = tuple(x.shape), []
    for unit in units:
        size, args = _checked(op, x, size, unit, group)
        convs += args
    if projection is not None:
        found, args = _checked(op, x, tuple(x.shape), projection, group)
        convs += args
        if found != size:
            raise ValueError(f"{op}: the projection gives {found}, but the units give {size}")
    if max_pool:
        _check_pool(op, max_pool, size)
    if add_input and size != x.shape:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, which cannot be added to {size}")
    checks.check_same_device(op, x, residual=residual)
    if not checks.under_autocast(x):
        checks.check_same_dtype(op, x, residual=residual)
    checks.check_residual(op, residual, size)
    return train(x, units, convs, residual, projection, add_input, max_pool, lean, group, backend)


def _check_pool(op: str, pool: tuple, size: tuple) -> None:
    names = ("kernel", "stride", "padding")
    if len(pool) != 3:
        raise ValueError(f"{op}: max_pool must be kernel, stride and padding, got {pool!r}")
    kernel, stride, padding = (
        pair(op, f"max_pool's {name}", v, name != "padding") for name, v in zip(names, pool, strict=True)
    )
    if kernel[0] * kernel[1] > MOST_TAPS or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(f"{op}: max_pool's padding may be half its kernel, of {MOST_TAPS} taps at most, got {pool}")
    if min(windows(size[2:], kernel, stride, padding)) < 1:
        raise ValueError(f"{op}: a map of {size[2:]} is too small for a max_pool of {pool}")


def _padded(op: str, x: Tensor, units: Sequence[Unit]) -> tuple[Tensor, list[Unit]]:
    """x and the units, the first's padding "same" worked out: lopsided, it is in part x's."""
    first = units[0]
    x, args = normalise(op, x, first.weight, first.stride, first.padding, first.dilation, first.groups)
    return x, [first._replace(padding=args.padding), *units[1:]]


def _checked(op: str, x: Tensor, size: tuple, unit: Unit, group: str) -> tuple[tuple, list]:
    """Check a unit for an input of shape `size`; return its output's shape, and its convolution's arguments if any."""
    checks.check_act(op, unit.act)
    vectors = {name: getattr(unit, name) for name in ("bn_weight", "bn_bias", "running_mean", "running_var")}
    checks.check_same_device(op, x, weight=unit.weight, conv_bias=unit.conv_bias, **vectors)
    checks.check_statistics(op, unit.running_mean, unit.running_var, training=True)
    checks.check_eps(unit.eps, training=True)
    convs = []
    if unit.weight is not None:
        if not checks.under_autocast(x):
            checks.check_same_dtype(op, x, weight=unit.weight, conv_bias=unit.conv_bias)
        args, more = geometry(op, size, unit.weight, unit.stride, unit.padding, unit.dilation, unit.groups)
        if any(more):
            raise ValueError(f"{op}: padding='same' of an even kernel {tuple(unit.weight.shape[2:])} is not supported")
        size, convs = tuple(args.output_shape(size, unit.weight)), [args]
        checks.check_channels(op, size[1], conv_bias=unit.conv_bias)
    checks.check_channels(op, size[1], **vectors)
    if not group:
        checks.check_more_than_one_value(size)
    return size, convs


def train(
    x, units, convs, residual=None, projection=None, add_input=False, max_pool=(), lean=False, group="", backend=None
) -> Tensor:
    """`residual_block` of what has been checked; `convs`: the normal forms of the convolutions' arguments."""
    everything = [*units, projection] if projection is not None else list(units)
    weights = [unit.weight for unit in everything if unit.weight is not None]
    biases = [unit.conv_bias for unit in everything if unit.weight is not None]
    inputs = Inputs(x, residual, weights, biases, [u.bn_weight for u in everything], [u.bn_bias for u in everything])
    shortcut = "projected" if projection is not None else "input" if add_input else "" if residual is None else "given"
    masked = not torch.compiler.is_compiling()
    acts, eps = [unit.act for unit in units], [unit.eps for unit in everything]
    form = Form(convs, eps, acts, shortcut, max_pool, lean, masked, group, backend or "")
    y, mean, var, totals = run_block(inputs, form)
    counts = list(totals) if group else _counts(tuple(x.shape), inputs, form)
    update_running_statistics(everything, mean, var, counts)
    return y


def _counts(size: tuple, inputs: Inputs, form: Form) -> list[int]:
    """Values a channel of each batch norm."""
    found = []
    for i in range(max(form.depth, 1)):
        size = form.convs[i].output_shape(size, inputs.weights[i]) if form.convs else size
        found.append(size[0] * size[2] * size[3])
    return [*found, found[-1]] if form.shortcut == "projected" else found
