"""Layers that are computed a second time in the backward pass, where that keeps less."""

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_resnet import ops
from fused_resnet.backends import context_backend, use_backend
from fused_resnet.modules import unit


def _repeatable(modules: Iterable[nn.Module]) -> bool:
    """Whether they may run a second time in the backward pass: no hook sees it, and no norm counts the batch again."""
    for module in modules:
        counts = isinstance(module, nn.modules.batchnorm._BatchNorm) and not unit.plain_batch_norm(module)
        if unit.hooked(module) or (counts and not getattr(module, "counts_once", False)):
            return False
    return True


def again(run: Callable[[Tensor], Tensor], x: Tensor, lean: bool, modules: Iterable[nn.Module]) -> Tensor:
    """Return `run(x)`, which runs `modules`; `lean`: in training keep x alone of it, and run it again for gradients.

    For layers that do not run as one operator, which keeps less by itself.
    """
    lean = lean and _repeatable(modules)
    if not (lean and torch.is_grad_enabled()):
        return run(x)
    if ops.transformed() and not torch.compiler.is_compiling():  # of which checkpoints know nothing
        return run(x)
    return checkpointed(run, x)


def checkpointed(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`run(x)`, run again in the backward pass with what holds now."""
    around = {} if torch.compiler.is_compiling() else {"context_fn": _surroundings}
    return checkpoint(run, x, use_reentrant=False, **around)


def _surroundings() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """What holds now, and must when a backward pass runs a block again."""
    plain, backend = unit.is_unfused(), context_backend()

    @contextlib.contextmanager
    def restored():
        with unit.unfused(plain), use_backend(backend or None):
            yield

    return contextlib.nullcontext(), restored()
