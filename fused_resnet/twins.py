"""Running one block of a network, fused or plain, and comparing what came of it."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.backends import use_backend
from fused_resnet.modes import FusedPieces, Pieces, Settled
from fused_resnet.modules import unit
from fused_resnet.parity import Row, compare

Arguments = tuple[tuple, dict]

LABELS = ("output without gradients", "output")

# A gradient that is smaller than this part of the block's largest is 0 in exact arithmetic (a convolution's bias before
# batch norm): all that any network has there is the rounding of the terms that cancel.
CANCELLED = 1e-11

# Attributes of timm and transformers that have parts of a network run again in the backward pass, where batch norm then
# counts the batch twice.
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")


@dataclass
class Run:
    """What one network made of one block; gradients are keyed by quantity and tensor, None where there is none."""

    outputs: list[Tensor]
    gradients: dict[tuple[str, str], Tensor | None]
    buffers: dict[str, Tensor]
    pieces: list[Tensor]


def run_fused(block: nn.Module, arguments: Arguments, dtype: torch.dtype, backend: str | None) -> Run:
    """One forward and backward of a fused block; a block in eval mode also runs without gradients, as in inference.

    The output without gradients comes first, the one with gradients after it.
    """
    with use_backend(backend) if backend else contextlib.nullcontext():
        inference = []
        if not block.training:
            with torch.no_grad():
                inference = list(tensors(block(*arguments[0], **arguments[1])))
        run = _run(block, arguments, dtype, FusedPieces())
    run.outputs = inference + run.outputs
    return run


def run_plain(block: nn.Module, arguments: Arguments, dtype: torch.dtype, given: list[Tensor] | None = None) -> Run:
    """One forward and backward of a plain block; `given`: the pieces that its activations are to take."""
    with unit.unfused():
        return _run(block, arguments, dtype, Pieces(given))


def _run(block, arguments, dtype, noted: Pieces | FusedPieces) -> Run:
    leaves: dict[tuple[str, str], Tensor] = {}

    def leaf(tensor: Tensor) -> Tensor:
        name = f"#{len(leaves)}" if leaves else "input"
        leaves["input gradient", name] = tensor.detach().clone().requires_grad_()
        return leaves["input gradient", name].clone()  # no leaf: a block may change its input in place

    with state_kept(block):
        args, kwargs = map_tensors(arguments, leaf)
        with Settled(), noted:
            outputs = list(tensors(block(*args, **kwargs)))
        for name, parameter in block.named_parameters():
            if parameter.requires_grad:
                leaves["parameter gradient", name] = parameter
        ends = [output for output in outputs if output.requires_grad]
        grads = random_gradients(ends, dtype)
        found = torch.autograd.grad(ends, list(leaves.values()), grads, allow_unused=True)
        buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    gradients = dict(zip(leaves, found, strict=True))
    return Run([output.detach() for output in outputs], gradients, buffers, noted.taken)


def output_rows(where, fused: Run, eager: Run, truth: Run, dtype) -> list[Row]:
    """Rows of the outputs, and in train mode of the running statistics; `where`: block and mode."""
    repeats = len(fused.outputs) // len(truth.outputs)
    labels = [label + (f"#{i}" if i else "") for label in LABELS[-repeats:] for i in range(len(truth.outputs))]
    found = zip(labels, fused.outputs, eager.outputs * repeats, truth.outputs * repeats, strict=True)
    rows = [compare((*where, "output", label), f, e, t, dtype) for label, f, e, t in found]
    if where[1] == "train":
        rows += [
            compare((*where, "running statistics", key), fused.buffers[key], eager.buffers[key], value, dtype)
            for key, value in truth.buffers.items()
        ]
    return rows


def gradient_rows(where, fused: Run, eager: Run, fused_truth: dict, eager_truth: dict, dtype) -> list[Row]:
    """Rows of the gradients, each network's against the truth that took the same pieces."""
    found = {key: value for key, value in fused_truth.items() if value is not None}
    sizes = {key: float(value.abs().max()) if value.numel() else 0.0 for key, value in found.items()}
    rows = []
    for key, value in found.items():
        largest = max(size for (kind, _), size in sizes.items() if kind == key[0])
        cancelled = sizes[key] < CANCELLED * largest
        zeros = torch.zeros_like(value)
        mine, plain = (zeros if run.gradients[key] is None else run.gradients[key] for run in (fused, eager))
        # The eager error is against its own truth; moved over, both are against the same.
        plain = plain.to(value) + (value - eager_truth[key])
        rows.append(compare((*where, *key), mine, plain, value, dtype, largest if cancelled else 0.0))
    return rows


def random_gradients(outputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same random gradients for every network: drawn in `dtype`, and then in each output's own."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(output.shape, generator=generator).to(dtype).to(output) for output in outputs]


def without_checkpointing(network: nn.Module) -> None:
    """Have nothing of a network run again in the backward pass, as far as other libraries do that."""
    for module in network.modules():
        for name in _CHECKPOINTING:
            if getattr(module, name, False):
                setattr(module, name, False)


@contextlib.contextmanager
def state_kept(network: nn.Module) -> Iterator[None]:
    """Buffers are afterwards what they were before."""
    kept = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a nest of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` applied to the floating-point tensors of a nest of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        changed = copy.copy(value)  # of the same class: the outputs of transformers are dicts with attributes
        for key, item in value.items():
            changed[key] = map_tensors(item, change)
        return changed
    return value
