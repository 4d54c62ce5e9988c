"""What the programs of fused forwards call. Each computes what the operations that it stands for would, fused where the
tensors allow it: sums that broadcast or change the dtype, and images without a batch, run as plain PyTorch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fused_resnet import ops
from fused_resnet.backends.problem import windows
from fused_resnet.fusion.programs import program_of
from fused_resnet.modules import blocks, unit
from fused_resnet.modules.blocks import is_given
from fused_resnet.modules.chain import chain
from fused_resnet.modules.max_pool import max_pool
from fused_resnet.modules.unit import ACT_FUNCTIONS, Layer
from fused_resnet.ops.checks import FLOATING, under_autocast

# Over which of its two sides the network writes a sum; None: over neither.
Into = Literal["y", "added"] | None


def block(
    layers: Sequence[tuple],
    x: Tensor,
    *,
    residual: Tensor | None = None,
    projection: tuple | None = None,
    add_input: bool = False,
    pool: nn.Module | None = None,
    lean: bool = False,
    into: Into = None,
) -> Tensor:
    """Convolutions with batch norm in a row, as `modules.chain.chain`; a layer: convolution, batch norm, activation."""
    layers = [Layer(*layer) for layer in layers]
    other = None if projection is None else Layer(*projection)
    added = x if add_input else residual
    if _ordinary(x) and (added is None or _may_add(layers, x, added)) and (other is None or _alike(layers, other, x)):
        return chain(
            layers,
            x,
            residual=residual,
            projection=other,
            add_input=add_input,
            pool=pool,
            lean=lean and _training(layers),
            given=is_given(x),
        )
    act = layers[-1].act
    y = _each([*layers[:-1], layers[-1]._replace(act="none")], x)
    if other is not None:
        y = _sum(y, _each([other], x), into)
    elif added is not None:
        y = _sum(y, added, into)
    y = ACT_FUNCTIONS[act](y)
    return y if pool is None else max_pool(pool, y)


def in_turn(stage: nn.Sequential, x: Tensor) -> Tensor:
    """The blocks of a stage, each of which is one call of `block`."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return nn.Sequential.forward(stage, x)
    return blocks.in_turn(stage, x, _alone)


def _alone(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    program = program_of(module)
    fits = program is not None and program.alone and program.tensors == 1 and program.holds(module)
    return partial(program.function, module) if fits else None


def _training(layers: list[Layer]) -> bool:
    return all(layer.bn.training for layer in layers)


def _each(layers: list[Layer], x: Tensor) -> Tensor:
    """One by one, the fused ones where the images have a batch."""
    for conv, bn, act in layers:
        x = unit.conv_bn_act(conv, bn, x, act=act) if _ordinary(x) else ACT_FUNCTIONS[act](norm(bn, conv(x)))
    return x


def norm(bn: nn.Module, x: Tensor) -> Tensor:
    """Return `bn(x)`; of a "norm+act" the norm alone."""
    return unit.fused_bn_act(bn, x, None, "none") if _ordinary(x) and unit.plain_batch_norm(bn) else bn(x)


def conv_act(conv: nn.Module, x: Tensor, residual: Tensor | None, act: str, into: Into = None) -> Tensor:
    """Return `act(conv(x) + residual)`; where gradients are wanted, the convolution is PyTorch's own."""
    fused = _ordinary(x) and not torch.is_grad_enabled() and unit.plain_convolution(conv)
    if fused and (residual is None or _may_add([Layer(conv, None, act)], x, residual)):
        return unit.conv_act(conv, x, residual, act)
    y = conv(x)
    return ACT_FUNCTIONS[act](y) if residual is None else add_act(y, residual, act, into)


def bn_act(bn: nn.Module, x: Tensor, residual: Tensor | None, act: str, into: Into = None) -> Tensor:
    """Return `act(bn(x) + residual)`."""
    if _ordinary(x) and (residual is None or _same(x.shape, x.dtype, residual)):
        return unit.bn_act(bn, x, residual, act)
    y = norm(bn, x)
    return ACT_FUNCTIONS[act](y if residual is None else _sum(y, residual, into))


def add_act(x: Tensor, residual: Tensor, act: str, into: Into = None) -> Tensor:
    """Return `act(x + residual)`."""
    if _ordinary(x) and isinstance(residual, Tensor) and (x.shape, x.dtype) == (residual.shape, residual.dtype):
        return ops.add_act(x, residual, act=act)
    return ACT_FUNCTIONS[act](_sum(x, residual, into))


def view(x: Tensor, *shape) -> Tensor:
    """Return `x.view(*shape)`."""
    return viewable(x).view(*shape)


def viewable(x: Tensor) -> Tensor:
    """Return x, of which a map in channels_last is copied: its network may have made it for another layout."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.is_contiguous():
        return x
    return x.contiguous() if x.is_contiguous(memory_format=torch.channels_last) else x


def laid_out(y: Tensor, x: Tensor) -> Tensor:
    """Return y, laid out in memory as x: who reads it may rely on that."""
    maps = isinstance(y, Tensor) and isinstance(x, Tensor) and y.dim() == x.dim() == 4
    return y.contiguous() if maps and x.is_contiguous() else y


def _sum(y: Tensor, added: Tensor, into: Into) -> Tensor:
    """The sum, of which dtype and shape are those of what it is written over."""
    if into == "added":
        added += y
        return added
    if into == "y":
        y += added
        return y
    return y + added


# --- what tensors must be like ----------------------------------------------------------------------------------------


def _ordinary(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4 and x.dtype in FLOATING


def _may_add(layers: list[Layer], x: Tensor, residual: Tensor) -> bool:
    """Whether `residual` is like what the layers make of x."""
    return _same(_size_behind(layers, x), x.dtype, residual)


def _same(size: Sequence[int], dtype: torch.dtype, residual: Tensor) -> bool:
    if not isinstance(residual, Tensor):  # a number, as the size of a tensor
        return False
    if under_autocast(residual):
        dtype = torch.get_autocast_dtype(residual.device.type)
    return tuple(residual.shape) == tuple(size) and residual.dtype == dtype


def _alike(layers: list[Layer], other: Layer, x: Tensor) -> bool:
    return _size_behind(layers, x) == _size_behind([other], x)


def _size_behind(layers: list[Layer], x: Tensor) -> tuple:
    n, _, *size = x.shape
    for layer in layers:
        size = _map_behind(layer.conv, size)
    return (n, layers[-1].conv.weight.shape[0], *size)


def _map_behind(conv: nn.Conv2d, size: Sequence[int]) -> Sequence[int]:
    if conv.padding == "same":
        return size
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    return windows(size, conv.kernel_size, conv.stride, padding, conv.dilation)
