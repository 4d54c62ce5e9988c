"""Batch norm that can be frozen, and what the fused modules read from one."""

import weakref
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_resnet.backends.packing import computed_now, forgotten, hold, version
from fused_resnet.backends.packing import forget as forget_packed
from fused_resnet.ops.bn_act import fold_batch_norm
from fused_resnet.ops.running import recomputing


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with a `frozen` flag that survives `.train()`.

    Frozen, it normalises with its running statistics and leaves them alone whatever the mode, and its weight and bias
    take no gradient. State dict, arguments and behaviour are otherwise those of `torch.nn.BatchNorm2d`.
    """

    frozen: bool = False

    def freeze(self, frozen: bool = True) -> "BatchNorm2d":
        self.frozen = frozen
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(not frozen)
        return self.train(not frozen)

    def train(self, mode: bool = True) -> "BatchNorm2d":
        return super().train(mode and not self.frozen)


def freeze_batch_norm(module: nn.Module, frozen: bool = True) -> nn.Module:
    """Freeze (or thaw) every batch norm of `module` that has the flag, in place; return `module`.

    Raises:
        TypeError: a batch norm without the flag, which the next `.train()` would thaw in silence.
    """
    found = [
        (name, child) for name, child in module.named_modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)
    ]
    for name, child in found:
        if not isinstance(child, BatchNorm2d):
            raise TypeError(
                f"freeze_batch_norm: {name or 'module'} is a {type(child).__name__}, which has no frozen flag"
            )
    for _, child in found:
        child.freeze(frozen)
    return module


# Norms of other libraries that normalise as torch's, by where they are defined. A "norm+act" has an activation behind
# it, its child `act`, after `drop`.
_FOREIGN = {
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): "frozen",
    ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"): "frozen",
    ("timm.layers.norm_act", "BatchNormAct2d"): "norm+act",
    ("timm.layers.norm_act", "SyncBatchNormAct"): "norm+act",
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"): "norm+act",
}


def foreign_norm(cls: type) -> str | None:
    """What a class of torchvision, timm or detectron2 is: "frozen" or "norm+act"; None: something else."""
    return _FOREIGN.get((cls.__module__, cls.__name__))


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Whether it normalises with the batch's own mean and variance: a frozen one of another library never does."""
    return (bn.training and isinstance(bn, nn.modules.batchnorm._BatchNorm)) or bn.running_mean is None


def running_arguments(bn: nn.Module) -> dict:
    """Arguments of the training operators: the running statistics, if they are to be updated, and by how much."""
    tracked = bn.training and bn.track_running_stats and bn.running_mean is not None
    momentum = bn.momentum
    if momentum is None:  # the cumulative average over all batches so far
        momentum = 1.0 / (float(bn.num_batches_tracked) + 1.0) if tracked else 0.0
    return {
        "running_mean": bn.running_mean if tracked else None,
        "running_var": bn.running_var if tracked else None,
        "momentum": momentum,
    }


def count_batch(norms: list[nn.Module], x: Tensor) -> None:
    """Count one batch, after the operator has succeeded; not one that was counted before, or that has no images."""
    if recomputing():
        return
    counts = [
        bn.num_batches_tracked
        for bn in norms
        if bn.training
        and bn.track_running_stats
        and bn.num_batches_tracked is not None
        and (x.numel() or sync_group(bn))
    ]
    if counts:
        torch._foreach_add_(counts, 1)


def sync_group(bn: nn.Module) -> str:
    """Name of the process group over which a `torch.nn.SyncBatchNorm` takes statistics; "": this process alone."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return ""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group = bn.process_group or dist.group.WORLD
    return group.group_name if group.size() > 1 else ""


_folded: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def folded(bn: nn.Module | None, conv: nn.Conv2d | None = None) -> tuple[Tensor, Tensor]:
    """fp32 `scale` and `shift` of a batch norm in eval mode, or of none, and of the bias of the convolution before it.

    Kept against the version counters of what they were derived from; derived anew where a gradient is wanted, and
    inside `torch.compile`, where they are a few operations that fuse.
    """
    bias = None if conv is None else conv.bias
    sources = (conv.weight, bias) if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var, bias)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources)
    fold = partial(_unscaled, conv) if bn is None else partial(_fold, bn, bias)
    if torch.compiler.is_compiling() or wants_grad:
        return fold()
    owner = conv if bn is None else bn
    state = (None if bn is None else bn.eps, *[version(t) for t in sources])
    kept = _folded.get(owner)
    if kept is not None and kept[0] == state:
        return hold(kept[1], owner)
    with torch.inference_mode(False), torch.no_grad():
        value = fold()
    # The memory is held: freed by `.data = ...` or `.to()`, its address could come back with other contents.
    if computed_now(value[0]):
        _folded[owner] = (state, value, [None if t is None else t.detach() for t in sources])
    return hold(value, owner)


def _fold(bn: nn.Module, conv_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    scale, shift = fold_batch_norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
    return scale, shift if conv_bias is None else shift + conv_bias.to(scale.dtype) * scale


def _unscaled(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = torch.ones(conv.out_channels, dtype=wide, device=conv.weight.device)
    return scale, torch.zeros_like(scale) if conv.bias is None else conv.bias.to(wide)


def forget_folded(module: nn.Module) -> None:
    """Drop the scale and shift of `module`, and the packed forms of its parameters."""
    _folded.pop(module, None)
    forgotten(module)
    for parameter in module._parameters.values():
        if parameter is not None:
            forget_packed(parameter)
