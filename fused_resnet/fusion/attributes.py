"""What a forward may read of its module besides parameters, buffers and children."""

import copy
from typing import Any

import torch
from torch import nn

STATE = "_fused_resnet"  # the attribute by which `convert` marks a module

# What every module has, or is given by torch.compile or FSDP2, and no forward reads.
_GIVEN = ("_is_torch_compile", "_compiled_call_impl", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
_INTERNAL = frozenset((*vars(nn.Module()), *_GIVEN))


def _is_internal(name: str) -> bool:
    return name in _INTERNAL or name == STATE or name.startswith("__composable_api")  # the last is FSDP2's, too


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a forward may read of a module besides its parameters, buffers and children, and their names.

    Lists and dicts by the identity of what they hold. Equal where nothing was assigned.
    """
    found = {name: _frozen(value) for name, value in vars(module).items() if not _is_internal(name)}
    return {**found, "children": tuple(module._modules), "training": module.training}


class _Same:
    """An object that is equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None


def _frozen(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return _Same(value)


class Kept:
    """What a module holds, to be put back: a forward on symbols leaves symbols where it assigns."""

    def __init__(self, module: nn.Module):
        holders = [vars(module), module._parameters, module._buffers, module._modules]
        holders += [value for value in vars(module).values() if type(value) in (list, dict)]
        self.copies = [(holder, copy.copy(holder)) for holder in holders]

    def restore(self) -> bool:
        """Put everything back; whether something was changed."""
        changed = False
        for holder, before in self.copies:
            now, then = (list(h.items()) if type(h) is not list else list(enumerate(h)) for h in (holder, before))
            if len(now) == len(then) and all(a[0] == b[0] and a[1] is b[1] for a, b in zip(now, then, strict=True)):
                continue
            changed = True
            holder.clear()
            holder.extend(before) if type(holder) is list else holder.update(before)
        return changed
