"""What a checkpoint keeps of modules and optimizers that may be divided over processes, and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_divided(tensor: Tensor) -> bool:
    """Whether it is a DTensor, which FSDP alone makes; not by its class, which takes a second to import."""
    return hasattr(tensor, "full_tensor")


def whole(tree: Any) -> Any:
    """`tree` with its tensors on the CPU, those that are divided over processes put together.

    All processes must ask for it, as each has a part.
    """
    if isinstance(tree, Tensor):
        tensor = tree.full_tensor() if is_divided(tree) else tree
        return tensor.detach().cpu()
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole(value) for value in tree)
    return tree


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if is_divided(tensor) else tensor


def _divided(value: Tensor, like: Tensor) -> Tensor:
    """`value` divided as `like` is, each process taking its part of what all have."""
    if not is_divided(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def load_module(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module that may be divided."""
    own = module.state_dict()
    module.load_state_dict({key: _divided(value, own[key]) for key, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load whole tensors into an optimizer whose parameters may be divided."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    divided = {}
    for index, entries in state["state"].items():
        like = parameters[index]
        divided[index] = {
            name: _divided(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value
            for name, value in entries.items()
        }
    optimizer.load_state_dict({**state, "state": divided})


def broadcast_buffers(*modules: nn.Module) -> None:
    """Give all processes the first one's running statistics: each has taken them of its own images."""
    for module in modules:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
