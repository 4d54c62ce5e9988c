"""Packed weights, kept as long as what they were derived from is unchanged.

A weight is recognised by its identity, its version counter (every in-place change through PyTorch raises it: an
optimizer's step, `load_state_dict`, an EMA's `copy_`) and its address, dtype, shape and strides (`.to()`,
`.data = ...`). The one change that PyTorch does not count is writing through `.data`: modules drop what they derived at
every `train()` and `eval()`.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# A weight used at several image sizes or dtypes keeps this many packed forms.
MOST_FORMS = 4

_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
            return kept[1]
    with torch.inference_mode(False), torch.no_grad():
        value = build()
    if not weight.is_inference() and not any(t.is_inference() for t in derived_from):
        forms = {name: kept for name, kept in (forms or {}).items() if name != form and kept[0][0] == state[0]}
        while len(forms) >= MOST_FORMS:
            forms.pop(next(iter(forms)))
        # The tensors are held, so that their ids are not given to others, and so is their memory: freed by `.data =` or
        # `.to()`, its address could come back with other contents. The dict is replaced whole, for threads.
        forms[form] = (state, value, derived_from, [t.detach() for t in (weight, *derived_from)])
        _packed[weight] = forms
    return value


def forget(weight: Tensor) -> None:
    """Drop every packed form of `weight`."""
    _packed.pop(weight, None)
