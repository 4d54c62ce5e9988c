"""Packed weights, kept as long as what they were derived from is unchanged.

A weight is recognised by its identity, its version counter (every in-place change through PyTorch raises it: an
optimizer's step, `load_state_dict`, an EMA's `copy_`) and its address, dtype, shape and strides (`.to()`,
`.data = ...`). PyTorch does not count what is written through `.data`, by an optimizer with `fused=True`, or by the
replay of a CUDA graph: modules drop what they derived at every `train()` and `eval()`.
"""

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# A weight used at several image sizes or dtypes keeps this many packed forms.
MOST_FORMS = 4

_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Held:
    """Derived values that are used for longer than the caches keep them, as a CUDA graph reads their memory."""

    def __init__(self):
        self.values: list = []
        self.owners: dict[int, Any] = {}  # what they were derived from, by id
        self.forgotten = False  # whether the caches were told to forget one since


_holding: contextvars.ContextVar[Held | None] = contextvars.ContextVar("fused_resnet_holding", default=None)
_all_held: weakref.WeakSet[Held] = weakref.WeakSet()


@contextlib.contextmanager
def holding() -> Iterator[Held]:
    """Collect every derived value that is handed out in the block, on this thread."""
    held = Held()
    _all_held.add(held)
    token = _holding.set(held)
    try:
        yield held
    finally:
        _holding.reset(token)


def hold(value: Any, owner: Tensor | torch.nn.Module) -> Any:
    """Return `value`, which a cache hands out for `owner`."""
    held = _holding.get()
    if held is not None:
        held.values.append(value)
        held.owners[id(owner)] = owner
    return value


def forgotten(owner: Tensor | torch.nn.Module) -> None:
    """Tell whoever holds a value of `owner` that its cache has forgotten it."""
    for held in list(_all_held):
        if id(owner) in held.owners:
            held.forgotten = True


def computed_now(like: Tensor) -> bool:
    """Whether what is derived beside `like` is computed now, and not by the replays of a graph that is captured."""
    return not (like.is_cuda and torch.cuda.is_current_stream_capturing())


def version(tensor: Tensor | None) -> tuple:
    """What changes when the tensor's contents do; never equal to itself for a tensor that keeps no count."""
    if tensor is None:
        return ()
    if tensor.is_inference():
        return (object(),)
    return (tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def packed(weight: Tensor, form: Hashable, build: Callable[[], Tensor], *derived_from: Tensor) -> Tensor:
    """`build()`, or what it returned the last time when `weight` and the tensors of `derived_from` are unchanged."""
    state = (version(weight), *[(id(t), *version(t)) for t in derived_from])
    forms = _packed.get(weight)
    if forms is not None:
        kept = forms.get(form)
        if kept is not None and kept[0] == state:
            return hold(kept[1], weight)
    with torch.inference_mode(False), torch.no_grad():
        value = build()
    if not weight.is_inference() and not any(t.is_inference() for t in derived_from) and computed_now(weight):
        forms = {name: kept for name, kept in (forms or {}).items() if name != form and kept[0][0] == state[0]}
        while len(forms) >= MOST_FORMS:
            forms.pop(next(iter(forms)))
        # The tensors are held, so that their ids are not given to others, and so is their memory: freed by `.data =` or
        # `.to()`, its address could come back with other contents. The dict is replaced whole, for threads.
        forms[form] = (state, value, derived_from, [t.detach() for t in (weight, *derived_from)])
        _packed[weight] = forms
    return hold(value, weight)


def forget(weight: Tensor) -> None:
    """Drop every packed form of `weight`."""
    _packed.pop(weight, None)
    forgotten(weight)
