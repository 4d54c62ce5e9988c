"""What a forward may read of its module besides parameters, buffers and children."""

import contextlib
import copy
import dataclasses
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

STATE = "_fused_resnet"  # the attribute by which `convert` marks a module

MOST_ITEMS = 64  # of a list or dict, up to which what it holds is compared

# What every module has, or is given by torch.compile or FSDP2, and no forward reads.
_GIVEN = ("_is_torch_compile", "_compiled_call_impl", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
_INTERNAL = frozenset((*vars(nn.Module()), *_GIVEN))


def _is_internal(name: str) -> bool:
    return name in _INTERNAL or name == STATE or name.startswith("__composable_api")  # the last is FSDP2's, too


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a forward may read of a module besides the contents of its parameters, buffers and children.

    Their names, and which of them are None; everything else that was assigned, by value where it is plain, and by
    identity otherwise. Equal where nothing was assigned.
    """
    found = {name: _frozen(value) for name, value in vars(module).items() if not _is_internal(name)}
    return {**found, "registered": registered(module), "training": module.training}


def registered(module: nn.Module) -> tuple:
    """Names of parameters, buffers and children, and whether each is None."""
    holders = (module._modules, module._parameters, module._buffers)
    return tuple([(name, value is None) for holder in holders if holder for name, value in holder.items()])


class _Same:
    """An object that is equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None


def _frozen(value: Any) -> Any:
    if is_plain(value):
        return value
    if isinstance(value, (tuple, list, set, frozenset)) and len(value) <= MOST_ITEMS:
        return type(value).__name__, tuple(_frozen(item) for item in value)
    if isinstance(value, dict) and len(value) <= MOST_ITEMS:
        return tuple((_frozen(key), _frozen(item)) for key, item in value.items())
    if isinstance(value, SimpleNamespace) or dataclasses.is_dataclass(value):
        return _Same(value), tuple((name, _frozen(item)) for name, item in getattr(value, "__dict__", {}).items())
    return _Same(value)


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def never_changes(value: Any) -> bool:
    """Whether the same object is always the same value, or is told from others by its identity alone."""
    if isinstance(value, tuple):
        return all(map(never_changes, value))
    holds = isinstance(value, (list, dict, set, SimpleNamespace)) or dataclasses.is_dataclass(value)
    return not holds


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module in one mode. `train()` of some modules does more than that."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            vars(module)["training"] = training
        yield
    finally:
        for module, mode in modes:
            vars(module)["training"] = mode


class Kept:
    """What a module and those within it hold, to be put back: a forward leaves symbols where it assigns."""

    def __init__(self, module: nn.Module):
        self.modes = [(m, m.training) for m in module.modules()]
        self.copies: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        for m, _ in self.modes:
            for holder in (m._parameters, m._buffers, m._modules):
                self.copies.append((holder, copy.copy(holder)))
            self._keep(vars(m), seen, 0)

    def _keep(self, holder: Any, seen: set[int], depth: int) -> None:
        """Copy a container, and those that it holds, also as attributes of objects."""
        if id(holder) in seen or depth > 4 or len(holder) > 10 * MOST_ITEMS:
            return
        seen.add(id(holder))
        self.copies.append((holder, copy.copy(holder)))
        for value in holder.values() if isinstance(holder, dict) else holder:
            if isinstance(value, (list, dict, deque)):
                self._keep(value, seen, depth + 1)
            elif not (is_plain(value) or isinstance(value, (nn.Module, torch.Tensor, type))):
                self._keep(getattr(value, "__dict__", {}), seen, depth + 1)

    def restore(self) -> bool:
        """Put everything back; whether something was changed."""
        changed = False
        for holder, before in self.copies:
            now, then = (list(h.items()) if isinstance(h, dict) else list(enumerate(h)) for h in (holder, before))
            if len(now) == len(then) and all(a[0] == b[0] and a[1] is b[1] for a, b in zip(now, then, strict=True)):
                continue
            changed = True
            holder.clear()
            holder.update(before) if isinstance(holder, dict) else holder.extend(before)
        for module, mode in self.modes:
            if module.training is not mode:
                changed = True
                vars(module)["training"] = mode
        return changed
