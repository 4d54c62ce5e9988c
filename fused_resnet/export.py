"""`export`: a network as a program of `torch.export`, with the operators of this package or without."""

import contextlib
from typing import Any

import torch
from torch import nn

from fused_resnet.modules import unit


def export(
    model: nn.Module, example: Any, *, decompose: bool = False, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """Return what `torch.export.export` makes of a network, in the mode that it is in.

    A program with the operators of this package is for AOTInductor, `torch.export.save` and the like; whoever loads or
    runs it imports `fused_resnet` first. One with `decompose=True` needs nothing but PyTorch.

    Args:
        example: an input, or a tuple of inputs.
        decompose: leave none of this package's operators: every module is exported as plain PyTorch computes it.
        dynamic_shapes: as of `torch.export.export`; `({0: torch.export.Dim("n")},)`: any number of images.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: `decompose`, and the network calls the operators themselves, not modules.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"export: expected a torch.nn.Module, got {type(model).__name__}")
    inputs = example if isinstance(example, tuple) else (example,)
    # In inference a convolution without batch norm is fused where no gradient is wanted.
    grad = contextlib.nullcontext() if model.training else torch.no_grad()
    with grad, unit.unfused() if decompose else contextlib.nullcontext():
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)
    left = sorted({str(node.target) for node in program.graph.nodes if _is_ours(node.target)})
    if decompose and left:
        raise RuntimeError(f"export: the network calls {', '.join(left)} by itself, which has no plain form")
    return program


def _is_ours(target: Any) -> bool:
    return getattr(target, "namespace", None) == "fused_resnet"
