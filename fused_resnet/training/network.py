"""The network that the options of `fused-resnet train` name, and what they do to it."""

import argparse
from functools import partial

from torch import nn

from fused_resnet.models import create_model
from fused_resnet.models.weights import check_state_dict, find_weights, last_linear, read_state_dict
from fused_resnet.modules import freeze_batch_norm
from fused_resnet.modules.again import checkpointed
from fused_resnet.options import UsageError, loading_errors
from fused_resnet.training.data import Data

TRUNK = "trunk"  # of --freeze: everything but the last linear layer


def model_options(data: Data) -> dict:
    """What `create_model` has to be given to build the network that a checkpoint belongs to."""
    return {"num_classes": len(data.classes), "in_channels": data.in_channels}


def make_network(args: argparse.Namespace, data: Data, *, weights: bool = True) -> tuple[nn.Module, list[str]]:
    """The network, with `weights` those of --pretrained, and lines that say what was done to it.

    Raises:
        UsageError: weights that do not fit, or a name of --freeze that the network does not have.
    """
    model = create_model(args.model, **model_options(data), lean=args.lean)
    said = []
    if weights and args.pretrained is not None:
        said.append(_load_trunk(model, args))
    if args.freeze:
        said.append(_freeze(model, args.freeze))
    return model, said


def _load_trunk(model: nn.Module, args: argparse.Namespace) -> str:
    """Load --pretrained; a head of other classes stays as it was made."""
    with loading_errors(args.pretrained, "--pretrained"):
        path = find_weights(args.pretrained, name=args.model)
        state = read_state_dict(path)
        head, own = last_linear(model), model.state_dict()
        names = [f"{head}.{kind}" for kind in ("weight", "bias") if f"{head}.{kind}" in own]
        other = any(name in state and state[name].shape != own[name].shape for name in names)
        if other:
            state.update({name: own[name] for name in names})
        check_state_dict(model, state, path)
        model.load_state_dict(state)
    classes = own[f"{head}.weight"].shape[0]
    return f"weights of {path}" + (f"; its layer {head} is new, for {classes} classes" if other else "")


def _freeze(model: nn.Module, names: list[str]) -> str:
    """Fix the parameters, and the running statistics, of the modules `names`."""
    head = last_linear(model)
    children = {name for name, _ in model.named_children()}
    for name in names:
        if name == TRUNK:
            chosen = [child for child in children if child != head.partition(".")[0]]
        else:
            chosen = [name]
        for path in chosen:
            try:
                module = model.get_submodule(path)
            except AttributeError as error:
                raise UsageError(
                    f"--freeze {name}: the network has no module of that name; it has {', '.join(sorted(children))} "
                    f"and those inside them, or '{TRUNK}' for all but {head}"
                ) from error
            freeze_batch_norm(module.requires_grad_(False))
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"frozen: {' '.join(names)}; {left:,} parameters are left to train"


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that a network is a row of: the children of its outermost Sequentials."""
    found = []
    for child in model.children():
        if isinstance(child, nn.Sequential):
            found += [part for part in child if next(part.parameters(), None) is not None]
        elif isinstance(child, nn.ModuleList):
            found += blocks(child)
    return found


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep the blocks' inputs alone for the backward pass, and compute the blocks again there."""
    for block in blocks(model):
        block.forward = partial(checkpointed, block.forward)
