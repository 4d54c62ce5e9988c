"""The running statistics of batch norms."""

from collections.abc import Sequence

import torch
from torch import Tensor


def update_running_statistics(units: Sequence, mean: list[Tensor], var: list[Tensor], counts: list) -> None:
    """running = (1 - momentum) * running + momentum * batch, with the variance unbiased; nothing for an empty batch.

    Nothing either while a checkpointed block is computed again inside a backward pass: it was counted in its forward.

    Args:
        units: of each batch norm, `running_mean`, `running_var` (or None) and `momentum`.
        mean, var: of the batch, var biased; counts: the values a channel that they are of, int or [] tensors.
    """
    if recomputing():
        return
    running, found, weights = [], [], []
    for unit, batch_mean, batch_var, count in zip(units, mean, var, counts, strict=True):
        if isinstance(count, Tensor):  # of several processes, and maybe on a GPU: it is not looked at
            weight, unbiased = unit.momentum * count.sign(), (count / (count - 1).clamp(min=1)).to(batch_var.dtype)
        elif count:
            weight, unbiased = unit.momentum, count / (count - 1)
        else:
            continue
        if unit.running_mean is not None:
            running += [unit.running_mean, unit.running_var]
            found += [batch_mean.to(unit.running_mean.dtype), (batch_var * unbiased).to(unit.running_var.dtype)]
            weights += [weight, weight]
    with torch.no_grad():
        if weights and all(isinstance(weight, float) and weight == weights[0] for weight in weights):
            torch._foreach_lerp_(running, found, weights[0])
            return
        for kept, batch, weight in zip(running, found, weights, strict=True):
            kept.lerp_(batch, weight.to(kept.dtype) if isinstance(weight, Tensor) else weight)


def recomputing() -> bool:
    """Whether this forward is a checkpointed block's second one, inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
