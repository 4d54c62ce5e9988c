"""Running one block of a network, fused or plain, and noting which pieces its activations take."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.backends import use_backend
from fused_resnet.modules import unit
from fused_resnet.ops.block import activations
from fused_resnet.parity import Row, compare

Arguments = tuple[tuple, dict]

LABELS = ("output without gradients", "output")

# A gradient that is smaller than this part of the block's largest is 0 in exact arithmetic (a convolution's bias before
# batch norm): all that any network has there is the rounding of the terms that cancel.
CANCELLED = 1e-11

# Attributes by which networks name the probability of what they leave out at random, where no dropout module has it
# (stochastic depth of timm and transformers, dropout as a function).
_PROBABILITIES = ("drop_prob", "drop_rate", "dropout")

# Attributes of timm and transformers that have parts of a network run again in the backward pass, where batch norm then
# counts the batch twice.
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")

# Functions that are ReLU or ReLU6, by the names that they have in PyTorch's Python and in aten.
_ACTS = {"relu": "relu", "relu_": "relu", "relu6": "relu6", "relu6_": "relu6"}


def _act(name: str, args: tuple, kwargs: dict) -> str:
    """Which activation with pieces the call of a PyTorch function is, or "none"."""
    if name not in ("hardtanh", "hardtanh_"):
        return _ACTS.get(name, "none")
    lowest, highest = [*args[1:3], *(-1.0, 1.0)[len(args[1:3]) :]]
    return "relu6" if (kwargs.get("min_val", lowest), kwargs.get("max_val", highest)) == (0, 6) else "none"


def _pieces(x: Tensor, act: str) -> Tensor:
    """Which piece of ReLU or ReLU6 every element is on, from the pre-activation or the output: 0, 1, or 2 above 6."""
    inside = ~(x <= 0)  # NaN is inside: it stays NaN
    return inside.to(torch.int8) + (x >= 6) if act == "relu6" else inside.to(torch.int8)


class Pieces(TorchFunctionMode):
    """Has plain activations note the pieces that they take, in the order of the calls, or take those that are given."""

    def __init__(self, given: list[Tensor] | None = None):
        super().__init__()
        self.given = None if given is None else iter(given)
        self.taken: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        act = _act(name, args, kwargs)
        if act == "none":
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        pieces = _pieces(x.detach(), act) if self.given is None else next(self.given)
        self.taken.append(pieces)
        if self.given is None:
            return func(*args, **kwargs)
        y = x if name.endswith("_") or kwargs.get("inplace") else x.clone()
        return y.masked_fill_(pieces == 0, 0).masked_fill_(pieces == 2, 6)


class FusedPieces(TorchDispatchMode):
    """Notes the pieces that the activations of fused (and plain) operators take, from their outputs."""

    def __init__(self):
        super().__init__()
        self.taken: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.fused_resnet.block.default:
            found = list(activations(args, result))
        elif func.namespace == "fused_resnet":
            names = [argument.name for argument in func._schema.arguments]
            found = [(result, args[names.index("act")])] if "act" in names else []
        else:
            found = [(result, _act(func._schema.name.removeprefix("aten::"), args, kwargs))]
        self.taken += [_pieces(y, act) for y, act in found if act in ("relu", "relu6")]
        return result


def in_order_of(wanted: list[Tensor], pieces: list[Tensor]) -> list[Tensor] | None:
    """`pieces` in the order of `wanted`, those of the same activations; None: they are others.

    A fused forward computes a branch where its sum stands, and so perhaps after another branch.
    """
    left, ordered = list(pieces), []
    for want in wanted:
        differences = {i: int((p != want).sum()) for i, p in enumerate(left) if p.shape == want.shape}
        if not differences:
            return None
        ordered.append(left.pop(min(differences, key=differences.get)))
    return None if left else ordered


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
        with noted:
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


def settle(network: nn.Module) -> None:
    """Switch off what is random in a network, and what runs twice."""
    for module in network.modules():
        # torchvision's is told by its name: it need not be installed
        if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        for name in _PROBABILITIES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        for name in _CHECKPOINTING:
            if hasattr(module, name):
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
