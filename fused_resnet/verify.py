"""Parity of a fused network with plain PyTorch, block by block.

Three networks with the same weights: the fused one and the plain ("eager") one in the dtype asked for, and the plain
one in fp64, the truth. Each block gets the same input in all three, so that errors are the block's own; all are in
channels_last. The fused error may be twice the eager one at most.

A pre-activation near 0 may be rounded to either side, and then whole gradients change, rightly. Gradients are therefore
compared with the truth on the same side: the pieces of the activations that a network took are noted, and the fp64
network takes them too.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.backends import available_backends
from fused_resnet.fusion import FusedForward
from fused_resnet.modes import Settled, in_order_of
from fused_resnet.modules import unit
from fused_resnet.modules.bn_act import BNAct2d
from fused_resnet.parity import LIMIT, Row, VerifyReport
from fused_resnet.twins import (
    Arguments,
    Run,
    gradient_rows,
    map_tensors,
    output_rows,
    run_fused,
    run_plain,
    state_kept,
    tensors,
    without_checkpointing,
)

NETWORK = "(network)"
STEM = "(stem)"

# The eager error is one sample of rounding noise, and where little is summed (batch norm over a few values) a small one
# may be luck. A block that fails is therefore compared with this many more eager runs, on inputs whose last bit is
# changed, and with the largest of their errors; a wrong kernel fails there too.
OPINIONS = 5
HOPELESS = 10 * LIMIT  # no luck explains that


def verify(
    model: nn.Module,
    example: Any,
    *,
    reference: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    train: bool = True,
    backend: str | None = None,
    progress: Callable[[list], Any] | None = None,
) -> VerifyReport:
    """Compare `model` with the plain network it stands for: outputs, gradients and running statistics.

    Every fused block is run by itself on the input that it has in the fp64 network, with a random gradient of its
    output, in eval and in train mode; then the whole network. Dropout, stochastic depth and the checkpointing of other
    libraries are switched off. Neither `model` nor `reference` is changed.

    Args:
        example: an input, or a tuple of inputs, as `model(*example)` takes them. For train mode it should leave some
            8 values a channel or more in the deepest layer: batch norm over 2 or 3 values is at the mercy of rounding.
        reference: the plain network, which takes `model`'s state dict and has its blocks under the same names (a
            torchvision model); by default `model` itself with every block run child by child, without fused operators.
        dtype: what both networks are cast to; by default that of the model's first parameter.
        train: False leaves out train mode.
        backend: as `use_backend`, for the fused network.
        progress: wraps the list of blocks, as tqdm does.

    Raises:
        ValueError: a dtype that is not fp32, bf16, fp16 or fp64, or a reference without the model's keys or blocks.
    """
    dtype = dtype or next((p.dtype for p in model.parameters()), torch.float32)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"verify: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    fused = _prepared(model, dtype)
    eager = _prepared(_reference(model, reference), dtype).to(memory_format=torch.channels_last)
    networks = _Networks(fused, eager, dtype, backend)
    inputs = map_tensors(example if isinstance(example, tuple) else (example,), lambda t: _native(t, dtype))
    report = VerifyReport(about=_about(model, dtype, backend, inputs))
    parts = block_names(model)
    for name in parts[:-1]:
        networks.blocks(name)  # an error about a block that the reference lacks comes before the long part
    jobs = []
    for mode in ("eval", "train") if train else ("eval",):
        jobs += [(mode, name, arguments) for name, arguments in networks.inputs_of(parts, inputs, mode).items()]
    for mode, name, arguments in progress(jobs) if progress else jobs:
        report.rows += networks.rows(name, mode, arguments)
    return report


def block_names(model: nn.Module) -> list[str]:
    """Names of what is verified by itself: the stem, every fused module, outermost first, and the network."""
    names = [STEM] if _stem(model) is not None else []
    names += [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, (unit.FusedModule, BNAct2d, FusedForward))
    ]
    return [*names, NETWORK]


class _Stem(nn.Module):
    """The `conv1` and `bn1` of a ResNet, which are not a module of their own."""

    def __init__(self, conv1: nn.Module, bn1: nn.Module):
        super().__init__()
        self.conv1, self.bn1 = conv1, bn1

    def forward(self, x: Tensor) -> Tensor:
        return unit.conv_bn_act(self.conv1, self.bn1, x)


def _stem(network: nn.Module) -> _Stem | None:
    conv, bn = getattr(network, "conv1", None), getattr(network, "bn1", None)
    if not (isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d) and conv.out_channels == bn.num_features):
        return None
    return _Stem(conv, bn).train(network.training)


def _reference(model: nn.Module, reference: nn.Module | None) -> nn.Module:
    if reference is None:
        return model
    reference = copy.deepcopy(reference)
    try:
        reference.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise ValueError(f"verify: the reference does not take the model's state dict: {error}") from None
    return reference


def _prepared(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    network = copy.deepcopy(network).to(dtype)
    without_checkpointing(network)
    return network


def _native(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the dtype and in the layout of both networks: rounding depends on the layout that PyTorch computes in."""
    x = x.detach().to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _about(model, dtype, backend, inputs) -> dict[str, str]:
    first = next(tensors(inputs))
    return {
        "model": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend or f"auto of {'/'.join(available_backends())}",
        "device": str(first.device),
        "input": "x".join(map(str, first.shape)),
        "torch": torch.__version__,
    }


class _Networks:
    """The three networks, and how a block of each is run."""

    def __init__(self, fused: nn.Module, eager: nn.Module, dtype: torch.dtype, backend: str | None):
        self.all = (fused, eager, copy.deepcopy(eager).double())
        self.dtype, self.backend = dtype, backend
        for network in self.all[1:]:
            for module in network.modules():
                if hasattr(module, "lean"):  # a forward that is computed again would take its pieces again
                    module.lean = False

    def blocks(self, name: str) -> list[nn.Module]:
        return [_find(network, name) for network in self.all]

    def inputs_of(self, names: list[str], inputs: tuple, mode: str) -> dict[str, Arguments]:
        """Positional and keyword arguments of every block in one pass of the fp64 network, in the dtype asked for."""
        truth = self.all[2].train(mode == "train")
        found: dict[str, Arguments] = {}

        def keep(name):
            def hook(_, args, kwargs):
                found.setdefault(name, map_tensors((args, kwargs), lambda t: _native(t, self.dtype).clone()))

            return hook

        hooks = [
            _find(truth, "conv1" if name == STEM else name).register_forward_pre_hook(keep(name), with_kwargs=True)
            for name in names
            if name != NETWORK
        ]
        try:
            with torch.no_grad(), state_kept(truth), unit.unfused(), Settled():
                truth(*map_tensors(inputs, lambda t: t.double()))
        finally:
            for hook in hooks:
                hook.remove()
        found[NETWORK] = (inputs, {})
        return {name: found[name] for name in names if name in found}

    def rows(self, name: str, mode: str, arguments: Arguments) -> list[Row]:
        """Every comparison of one block in one mode."""
        for network in self.all:
            network.train(mode == "train")
        fused_block, eager_block, truth_block = self.blocks(name)
        exact = map_tensors(arguments, lambda t: t.double())
        fused = run_fused(fused_block, arguments, self.dtype, self.backend)
        truth = run_plain(truth_block, exact, self.dtype)
        fused_truth = self._same_pieces(fused, truth, truth_block, exact).gradients

        def against(given: Arguments) -> list[Row]:
            eager = run_plain(eager_block, given, self.dtype)
            eager_truth = self._same_pieces(eager, truth, truth_block, exact).gradients
            rows = output_rows((name, mode), fused, eager, truth, self.dtype)
            return rows + gradient_rows((name, mode), fused, eager, fused_truth, eager_truth, self.dtype)

        rows = against(arguments)
        for seed in range(OPINIONS):
            if not LIMIT < max(row.ratio for row in rows) < HOPELESS:
                break
            for row, other in zip(rows, against(_last_bits_changed(arguments, seed)), strict=True):
                row.eager_error = max(row.eager_error, other.eager_error)
        return rows

    def _same_pieces(self, run: Run, truth: Run, block: nn.Module, exact: Arguments) -> Run:
        """The fp64 run whose activations take the pieces that they took in `run`."""
        pieces = in_order_of(truth.pieces, run.pieces)
        if pieces is None:  # an activation that could not be followed
            return truth
        if all(map(torch.equal, pieces, truth.pieces)):
            return truth
        return run_plain(block, exact, self.dtype, given=pieces)


def _last_bits_changed(arguments: Arguments, seed: int) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def change(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator).to(x) * 2 - 1
        return x + x * noise * torch.finfo(x.dtype).eps

    return map_tensors(arguments, change)


def _find(network: nn.Module, name: str) -> nn.Module:
    if name == NETWORK:
        return network
    if name == STEM:
        stem = _stem(network)
        if stem is None:
            raise ValueError("verify: the reference has no conv1 and bn1, which the model begins with")
        return stem
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise ValueError(f"verify: the reference has no module {name!r}, which is a block of the model") from None
