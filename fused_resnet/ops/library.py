"""The public operator namespace `fused_resnet::` and what all its operators share.

Schemas are defined here, in Python, so that an install without a compiler has every operator. An operator is run by
the backend that `backends.select` names; nothing else owns a dispatch key.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fused_resnet.backends import ACTIVATIONS as ACTIVATIONS
from fused_resnet.backends import context_backend, reference
from fused_resnet.backends import select as select
from fused_resnet.backends import select_pooled as select_pooled
from fused_resnet.ops.direct import followed, transformed

LIBRARY = torch.library.Library("fused_resnet", "DEF")

# Activations whose gradient needs the pre-activation.
SMOOTH = ("hardswish", "silu")

# Tensors that are nothing more: a subclass may want to see operators.
ORDINARY = (Tensor, torch.nn.Parameter)

# Arguments that every convolution operator has, in the order of its schema.
CONV_SCHEMA = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"


# The implementations, with their gradients, for `call`.
_direct: dict[str, Callable] = {}


def define(schema: str, impl: Callable, fake: Callable, tags=(torch.Tag.pt2_compliant_tag,)) -> None:
    """Define `fused_resnet::<schema>` with its implementation for every device and its fake."""
    name = schema.partition("(")[0]
    _direct[name] = impl
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_resnet::{name}", fake, lib=LIBRARY)


def call(name: str, *args):
    """`torch.ops.fused_resnet.<name>(*args)`; without the dispatcher, which costs more than a small map, where nobody
    follows the operators and every tensor is an ordinary one on the CPU.
    """
    if not followed() and all(type(a) in ORDINARY and a.is_cpu for a in flat(args) if isinstance(a, Tensor)):
        return _direct[name](*args)
    return getattr(torch.ops.fused_resnet, name).default(*args)


def flat(args) -> list:
    """The arguments of an operator, with those of its lists in their places."""
    found = []
    for a in args:
        found.extend(a) if isinstance(a, (list, tuple)) else found.append(a)
    return found


def sizes(args) -> list[int | None]:
    """The length of each argument that is a list, None for the others: what `nested` needs."""
    return [len(a) if isinstance(a, (list, tuple)) else None for a in args]


def nested(found, form: list[int | None]) -> list:
    """The inverse of `flat`."""
    rest = iter(found)
    return [next(rest) if size is None else [next(rest) for _ in range(size)] for size in form]


def autograd(name: str, setup_context: Callable, backward: Callable) -> None:
    """Register the gradient of `fused_resnet::<name>`, of which only the first output has one.

    `setup_context(ctx, args, output)` sees the operator's arguments; `backward(ctx, grad)` returns the gradients
    of the tensors among the flat ones, which come first; `ctx.needs_input_grad` tells which are needed.

    As `torch.library.register_autograd`, for operators without defaults and keyword-only arguments: the general form
    looks for both at every call, does not see the tensors of a list, and has zeros made for every output without a
    gradient, a map for each convolution.
    """
    operator = getattr(torch.ops.fused_resnet, name).default
    impl = _direct[name]

    def below(keyset, *args):
        if keyset is None:
            return impl(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *everything):
            *given, form, keyset = everything
            args = nested(given, form)
            output = below(keyset, *args)
            setup_context(ctx, args, output)
            ctx.set_materialize_grads(False)
            return output

        @staticmethod
        def backward(ctx, *grads):
            if grads[0] is not None and torch._C._functorch.is_legacy_batchedtensor(grads[0]):
                raise NotImplementedError(
                    f"fused_resnet::{name} takes one gradient at a time, not several as is_grads_batched=True and "
                    "jacobian(vectorize=True) give it; they work on the network after fused_resnet.unfuse(model)"
                )
            found = () if grads[0] is None else backward(ctx, grads[0])
            return *found, *[None] * (len(ctx.needs_input_grad) - len(found))

    Differentiable.__name__ = f"{name}_autograd"

    def rule(keyset, *args):
        if keyset is not None and transformed():
            raise NotImplementedError(
                f"fused_resnet::{name} has no rule for torch.func and forward-mode derivatives. Modules that run it "
                "compute as plain PyTorch there, as a network does after fused_resnet.unfuse(model)"
            )
        given = flat(args)
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*given):
            return Differentiable.apply(*given, sizes(args), keyset)
        return below(keyset, *args)

    LIBRARY.impl(name, rule, "Autograd", with_keyset=True)
    _direct[name] = partial(rule, None)


def autocast(name: str, cast: Callable) -> None:
    """Register the autocast rule of `fused_resnet::<name>`.

    `cast(dtype, *args)` returns the arguments of the operator as they are under autocast to `dtype`. PyTorch's own
    `register_autocast` casts every tensor to one fixed dtype; here statistics and parameters stay in fp32 and the
    dtype is that of the region.
    """
    operator = getattr(torch.ops.fused_resnet, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(name, _autocast_rule(operator, cast, device, key), key)


def _autocast_rule(operator, cast: Callable, device: str, key: str) -> Callable:
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(*args):
        with torch._C._ExcludeDispatchKeyGuard(below):
            return operator(*cast(torch.get_autocast_dtype(device), *args))

    return run


def empty_channels_last(like: Tensor, size, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last tensor: the layout that every operator returns."""
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def chosen(backend: str) -> str:
    """The backend that a backward pass uses: the forward's, also where it was chosen by `use_backend`.

    Autograd may run the backward on a thread of its own, which does not see the forward's context.
    """
    return backend or context_backend()


def kept_for_act(act: str, residual: Tensor | None, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What an activation's gradient needs of (residual, output), None where it does not.

    Piecewise linear ones tell their pieces apart by the output, smooth ones need the pre-activation, which is computed
    again from the input and the residual.
    """
    if act in SMOOTH:
        return residual, None
    return None, None if act == "none" else y


def peel_act(grad: Tensor, y: Tensor | None, act: str) -> tuple[Tensor, str]:
    """Take a piecewise linear activation off: the gradient of its input, differentiable, and the act that is left."""
    return (grad, act) if y is None else (reference.act_backward(grad, y, None, act), "none")


def second_order(formula: Callable, inputs: list, grads: Tensor) -> list:
    """Gradients of `formula(*inputs)` that can be differentiated again.

    The fast backward operators have no gradient of their own; when a graph of the backward is asked for
    (`create_graph=True`), the forward formula is run again on plain PyTorch and differentiated there.
    """
    wanted = [i for i, value in enumerate(inputs) if isinstance(value, Tensor) and value.requires_grad]
    with torch.enable_grad():
        # Views, so that a tensor that is two inputs, or of which another one was made, is not counted twice.
        views = [t.view_as(t) if i in wanted else t for i, t in enumerate(inputs)]
        output = formula(*views)
        found = torch.autograd.grad(output, [views[i] for i in wanted], grads, create_graph=True, allow_unused=True)
    result = [None] * len(inputs)
    for i, value in zip(wanted, found, strict=True):
        result[i] = value
    return result
