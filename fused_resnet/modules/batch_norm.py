"""Batch norm that can be frozen, and what the fused modules read from one."""

import weakref

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


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or bn.running_mean is None


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


def folded(bn: nn.BatchNorm2d, conv_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """fp32 `scale` and `shift` of a batch norm in eval mode (and of the bias of the convolution before it).

    Kept against the version counters of what they were derived from; derived anew where a gradient is wanted, and
    inside `torch.compile`, where they are a few operations that fuse.
    """
    sources = (bn.weight, bn.bias, bn.running_mean, bn.running_var, conv_bias)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources)
    if torch.compiler.is_compiling() or wants_grad:
        return _fold(bn, conv_bias)
    state = (bn.eps, *[version(t) for t in sources])
    kept = _folded.get(bn)
    if kept is not None and kept[0] == state:
        return hold(kept[1], bn)
    with torch.inference_mode(False), torch.no_grad():
        value = _fold(bn, conv_bias)
    # The memory is held: freed by `.data = ...` or `.to()`, its address could come back with other contents.
    if computed_now(value[0]):
        _folded[bn] = (state, value, [None if t is None else t.detach() for t in sources])
    return hold(value, bn)


def _fold(bn: nn.BatchNorm2d, conv_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    scale, shift = fold_batch_norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
    return scale, shift if conv_bias is None else shift + conv_bias.to(scale.dtype) * scale


def forget_folded(module: nn.Module) -> None:
    """Drop the scale and shift of `module`, and the packed forms of its parameters."""
    _folded.pop(module, None)
    forgotten(module)
    for parameter in module._parameters.values():
        if parameter is not None:
            forget_packed(parameter)
