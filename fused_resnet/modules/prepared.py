"""Convolutions with batch norm in eval mode, prepared once for the inputs that come again and again.

The way through checks, dispatcher and selection to the kernel costs more than a small convolution at batch 1, and ends
at the same kernel, the same packed weights and the same scale and shift as long as nothing has changed. What could
change is compared at every call.
"""

import weakref
from collections.abc import Callable

from torch import Tensor, nn

from fused_resnet import ops
from fused_resnet.backends import surroundings
from fused_resnet.backends.packing import computed_now, forgotten, hold
from fused_resnet.modules.batch_norm import folded

# A convolution is kept ready for this many shapes of input.
MOST_SHAPES = 16

_UNKNOWN = object()

# For each convolution: the state of what its kernel is derived from, a kernel, or None, for each input, and those
# tensors' memory (freed by `.data =` or `.to()`, its address could come back with other contents).
_prepared: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def prepared(
    conv: nn.Conv2d, bn: nn.Module | None, x: Tensor, residual: Tensor | None, act: str, *, max_pool: bool = False
) -> Callable | None:
    """Return `run(x, residual, out)` with the result of `act(bn(conv(x)) + residual)`, written to `out` or, for None,
    to a fresh tensor; None where the operator has to be called. `bn` may be None.

    `max_pool`: with a 3x3 max-pool of stride 2 and padding 1 behind it, without a residual.
    """
    if not ops.may_call_directly(x, residual):
        return None
    like_residual = None if residual is None else (residual.shape, residual.dtype, residual.device)
    parameters = conv._parameters
    try:
        sources = (parameters["weight"], parameters["bias"])
        if bn is not None:
            bn_parameters, buffers = bn._parameters, bn._buffers
            sources += (
                bn_parameters["weight"], bn_parameters["bias"], buffers["running_mean"], buffers["running_var"]
            )  # fmt: skip
        # As backends.packing.version, written out: it is asked for six tensors at every call.
        state = [None if t is None else (t._version, t.data_ptr(), t.dtype) for t in sources]
        state += [None if bn is None else bn.eps, sources[0].shape, sources[0].stride()]
    except (KeyError, RuntimeError):  # a parametrized convolution; inference tensors, whose changes are not counted
        return None
    key = (
        max_pool, x.shape, x.dtype, x.device, like_residual, act, conv.stride, conv.padding, conv.dilation, conv.groups,
        *surroundings(),
    )  # fmt: skip
    kept_state, runs, _ = _prepared.get(conv, (None, {}, None))
    if kept_state != state or len(runs) > MOST_SHAPES:
        runs = {}
        _prepared[conv] = (state, runs, [None if t is None else t.detach() for t in sources])
    run = runs.get(key, _UNKNOWN)
    if run is _UNKNOWN:
        prepare, options = ops.prepare_conv_scale_act, {"residual": residual}
        if max_pool:
            prepare, options = ops.prepare_conv_scale_act_max_pool2d, {}
        run = prepare(
            x, conv.weight, *folded(bn, conv), act=act,
            stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups, **options,
        )  # fmt: skip
        if computed_now(x):
            runs[key] = run
    return hold(run, conv)


def forget_prepared(conv: nn.Module) -> None:
    """Drop what was prepared for `conv`."""
    _prepared.pop(conv, None)
    forgotten(conv)
