"""How a convolution and a batch norm that stand side by side in a module run as one operator.

The children stay ordinary `nn.Conv2d` and `nn.BatchNorm2d` under their own names, so state dicts are torchvision's. A
child that is not what it seems to be (a subclass with its own forward, another norm, a hook, reflected padding) is
called as it is, and only what follows it is fused.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import ops
from fused_resnet.modules.batch_norm import (
    BatchNorm2d,
    count_batch,
    folded,
    foreign_norm,
    forget_folded,
    running_arguments,
    sync_group,
    uses_batch_statistics,
)
from fused_resnet.modules.prepared import forget_prepared, prepared

ACT_FUNCTIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
}


def plain_activation(x: Tensor, act: str) -> Tensor:
    """`act(x)` as a plain network computes it, in place where torchvision's networks do so."""
    return ACT_FUNCTIONS[act](x, inplace=True) if act in ("relu", "relu6") else ACT_FUNCTIONS[act](x)


_unfused: contextvars.ContextVar[bool] = contextvars.ContextVar("fused_resnet_unfused", default=False)


@contextlib.contextmanager
def unfused(wanted: bool = True) -> Iterator[None]:
    """Run every module as plain PyTorch would: its children one by one, and aten for the sum and the activation.

    This is the network that the fused one is verified against and timed beside. It holds for the current thread;
    `wanted=False` ends it within.
    """
    token = _unfused.set(wanted)
    try:
        yield
    finally:
        _unfused.reset(token)


def is_unfused() -> bool:
    """Whether modules run as plain PyTorch: it was asked for, or what follows them knows no other operators, as
    torch.func, forward-mode derivatives, TorchScript and ONNX do not.
    """
    if _unfused.get() or ops.transformed() or torch._C._get_tracing_state() is not None:
        return True
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()  # the last costs more than all the others


# torch.compile cannot trace a context variable. It is what torch.compiler.assume_constant_result does, without the two
# seconds in which that imports all of torch._dynamo.
is_unfused._dynamo_marked_constant = True


def forget(module: nn.Module) -> None:
    """Drop what was derived from the parameters of `module` itself: they may have been written through `.data`."""
    forget_prepared(module)
    forget_folded(module)


def forget_sharded(*modules: nn.Module) -> None:
    """`forget` those that FSDP manages: it gathers their parameters anew for each forward pass, to memory that may be
    the same, and hides that from the version counters.
    """
    if torch.compiler.is_compiling():
        return
    for module in modules:
        if "_is_fsdp_managed_module" in vars(module):
            forget(module)


class FusedModule(nn.Module):
    """Base of the modules that run their children fused: drops derived values whenever the mode is set."""

    def _layer(self) -> "Layer | None":
        """What the module is, where it is one layer and nothing more."""
        return None

    def train(self, mode: bool = True):
        for module in self.modules():
            forget(module)
        return super().train(mode)


def below(module: nn.Module) -> Iterator[nn.Module]:
    """The modules within a module."""
    return islice(module.modules(), 1, None)


def hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooked_everywhere() -> bool:
    """Whether hooks are registered that every module runs."""
    module = torch.nn.modules.module
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    )


def plain_convolution(conv: nn.Module) -> bool:
    own = "forward" in vars(conv) or type(conv)._conv_forward is not nn.Conv2d._conv_forward
    return type(conv).forward is nn.Conv2d.forward and not own and conv.padding_mode == "zeros" and not hooked(conv)


def plain_batch_norm(bn: nn.Module) -> bool:
    """Whether it does what batch norm does and no more. Of a "norm+act" that `fuse` has taken apart, its norm does."""
    plain = type(bn) in (BatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)
    plain = plain or foreign_norm(type(bn)) == "frozen" or getattr(type(bn), "taken_apart", False)
    return plain and "forward" not in vars(bn) and not hooked(bn)


def fusible(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether the two run as one operator."""
    return not is_unfused() and plain_convolution(conv) and plain_batch_norm(bn)


def conv_bn_act(
    conv: nn.Module,
    bn: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    act: str = "relu",
    *,
    overwrite: bool = False,
) -> Tensor:
    """Return `act(bn(conv(x)) + residual)`.

    `overwrite`: nobody else sees the residual, so that its memory may become the output's.
    """
    if not fusible(conv, bn):
        return bn_act(bn, conv(x), residual, act)
    if uses_batch_statistics(bn):
        return train([Layer(conv, bn, act)], x, residual=residual)
    return _scaled(conv, bn, x, residual, act, overwrite)


def conv_act(conv: nn.Conv2d, x: Tensor, residual: Tensor | None = None, act: str = "relu") -> Tensor:
    """Return `act(conv(x) + residual)` of a plain convolution, in inference."""
    return _scaled(conv, None, x, residual, act, overwrite=False)


def _scaled(
    conv: nn.Conv2d, bn: nn.Module | None, x: Tensor, residual: Tensor | None, act: str, overwrite: bool
) -> Tensor:
    forget_sharded(conv, *([] if bn is None else [bn]))
    run = prepared(conv, bn, x, residual, act)
    if run is not None:
        return run(x, residual, residual if overwrite else None)
    geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    return ops.conv_scale_act(x, conv.weight, *folded(bn, conv), residual=residual, act=act, **geometry)


def bn_act(bn: nn.Module, x: Tensor, residual: Tensor | None = None, act: str = "relu") -> Tensor:
    """Return `act(bn(x) + residual)`."""
    if plain_batch_norm(bn):
        return fused_bn_act(bn, x, residual, act)
    y = bn(x)  # not written over: a hook may have seen it
    if residual is None or is_unfused():
        return ACT_FUNCTIONS[act](y if residual is None else y + residual)
    return ops.add_act(y, residual, act=act)


def fused_bn_act(bn: nn.Module, x: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """`bn_act` where the batch norm is known to be a plain one."""
    if is_unfused():
        plain = nn.SyncBatchNorm if isinstance(bn, nn.SyncBatchNorm) else nn.BatchNorm2d
        y = plain.forward(bn, x)
        if residual is not None:
            y += residual
        return plain_activation(y, act)
    if uses_batch_statistics(bn):
        return train([Layer(None, bn, act)], x, residual=residual)
    forget_sharded(bn)
    scale, shift = folded(bn)
    return ops.scale_act(x, scale, shift, residual=residual, act=act)


# --- training: several layers as one operator -------------------------------------------------------------------------


class Layer(NamedTuple):
    """A convolution, or None, its batch norm and activation."""

    conv: nn.Conv2d | None
    bn: nn.Module
    act: str = "relu"


def sole_layer(module: nn.Module) -> Layer | None:
    """The layer that a module of this package is and nothing more; None: it is another, or somebody looks at it."""
    if not isinstance(module, FusedModule) or "forward" in vars(module) or hooked(module):
        return None
    for cls in type(module).__mro__:  # a subclass may have another forward
        if "forward" in vars(cls) or "_layer" in vars(cls):
            return module._layer() if "_layer" in vars(cls) else None
    return None


def trainable(layers: Sequence[Layer | None]) -> bool:
    """Whether they can run as one operator: all are fusible, and normalise with the statistics of the same batch."""
    if None in layers:
        return False
    for layer in layers:  # in inference the first one ends it, at every call
        if not (fusible(layer.conv, layer.bn) and uses_batch_statistics(layer.bn)):
            return False
        if isinstance(layer.conv.padding, str):
            return False
    return len({sync_group(layer.bn) for layer in layers}) == 1 and len({layer.bn for layer in layers}) == len(layers)


def train(
    layers: Sequence[Layer], x: Tensor, *, residual: Tensor | None = None, projection: Layer | None = None, **options
) -> Tensor:
    """The layers on x with batch statistics, which become running ones; `options` are those of `ops.residual_block`."""
    everything = [*layers, projection] if projection is not None else layers
    units = [_unit(layer) for layer in everything]
    group, norms = sync_group(layers[0].bn), [layer.bn for layer in everything]
    last = units.pop() if projection is not None else None
    y = ops.residual_block(x, units, residual=residual, projection=last, group=group, **options)
    count_batch(norms, x)
    return y


def _unit(layer: Layer) -> ops.Unit:
    conv, bn, act = layer
    options = {**running_arguments(bn), "eps": bn.eps, "act": act}
    if conv is None:
        return ops.Unit(None, bn.weight, bn.bias, **options)
    geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    return ops.Unit(conv.weight, bn.weight, bn.bias, conv_bias=conv.bias, **geometry, **options)
