"""The operator `fused_resnet::block`: convolutions with batch norm and activation in a row, in training, and what is
added before the last activation.

    y = act_n(bn_n(conv_n(... act_1(bn_1(conv_1(x))) ...)) + shortcut), the shortcut nothing, x, another tensor, or
    bn(conv(x)); or, without a shortcut, max_pool2d of that.

For the backward pass it keeps the convolutions' outputs z_i, and their moments; act_i(bn_i(z_i)) is computed again
where it is read. With `lean` the last convolution's output (and the shortcut's) is not kept either: that convolution is
computed again. Batch norm: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1; residual block: He et al. 2015,
arXiv:1512.03385.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.backends.norm import Norm
from fused_resnet.backends.problem import ConvArgs, windows
from fused_resnet.ops.block_backward import Backward, Needs
from fused_resnet.ops.block_passes import Form, Inputs, Kept, forward
from fused_resnet.ops.library import (
    SMOOTH,
    autocast,
    autograd,
    call,
    chosen,
    define,
    empty_channels_last,
    flat,
    nested,
    peel_act,
    second_order,
    sizes,
)

FORM_SCHEMA = (
    "SymInt[] geometry, float[] eps, str[] acts, str shortcut, SymInt[] pool, bool lean, bool masked, str group, "
    "str backend"
)


def run_block(inputs: Inputs, form: Form) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """The output, mean and variance of each batch norm, and with a group the values a channel of each."""
    y, _, mean, var, _, totals = call("block", *inputs, *_arguments(form))
    return y, mean, var, totals


def _parsed(geometry, eps, acts, shortcut, pool, lean, masked, group, backend) -> Form:
    convs = [
        ConvArgs.of(geometry[i : i + 2], geometry[i + 2 : i + 4], geometry[i + 4 : i + 6], geometry[i + 6])
        for i in range(0, len(geometry), 7)
    ]
    return Form(convs, list(eps), list(acts), shortcut, _pairs(pool), lean, masked, group, backend)


def _pairs(flat) -> tuple:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _impl(*args):
    return forward(Inputs(*args[:6]), _parsed(*args[6:]))


def _fake(*args):
    inputs, form = Inputs(*args[:6]), _parsed(*args[6:])
    x, shapes, shape = inputs.x, [], inputs.x.shape
    for i in range(form.depth):
        shape = form.convs[i].output_shape(shape, inputs.weights[i])
        shapes.append(shape)
    if form.shortcut == "projected":
        shapes.append(shape)
    y, told = empty_channels_last(x, shape), x.new_empty(0, dtype=torch.uint8)
    if form.pool:
        y = empty_channels_last(x, (*shape[:2], *windows(shape[2:], *form.pool)))
        told = empty_channels_last(x, y.shape, torch.uint8)
    channels = [s[1] for s in shapes or [shape]]
    mean, var = ([x.new_empty(c, dtype=reference.wide(x)) for c in channels] for _ in range(2))
    kept = shapes[: max(form.depth - 1, 0)] if form.lean else shapes
    totals = x.new_empty(len(form.eps) if form.group else 0, dtype=torch.float64)
    return y, [empty_channels_last(x, s) for s in kept], mean, var, told, totals


def _setup_context(ctx, args, output):
    inputs, form = Inputs(*args[:6]), _parsed(*args[6:])
    y, *kept = output
    kept = Kept(*kept)
    ctx.mark_non_differentiable(kept.told, kept.totals)
    ctx.form, act = form._replace(backend=chosen(form.backend)), form.acts[-1]
    by_output = form.shortcut in ("input", "given") and act in ("relu", "relu6") and not kept.told.numel()
    saved = (*inputs._replace(residual=inputs.residual if act in SMOOTH else None), y if by_output else None, *kept)
    ctx.sizes = sizes(saved)
    ctx.save_for_backward(*flat(saved))


def _backward(ctx, grad):
    *inputs, y, z, mean, var, told, totals = nested(ctx.saved_tensors, ctx.sizes)
    inputs, form = Inputs(*inputs), ctx.form
    needs = list(ctx.needs_input_grad[: len(flat(inputs))])
    if torch.is_grad_enabled():
        return _second_order(inputs, form, y, grad, needs)
    found = call(
        "block_backward", grad, y, told, totals, *inputs, z, mean, var, *_arguments(form), needs
    )  # fmt: skip
    found = [g if need else None for g, need in zip(found, needs, strict=True)]
    if needs[1] and form.acts[-1] == "none":
        found[1] = grad
    return found


def _arguments(form: Form) -> tuple:
    """The form as the schema has it."""
    return (flat(flat(form.convs)), form.eps, form.acts, form.shortcut, flat(form.pool), *form[5:])


def _second_order(inputs: Inputs, form: Form, y: Tensor | None, grad: Tensor, needs: list[bool]) -> list:
    """Gradients that can be differentiated again: the formula is run on plain PyTorch."""
    if form.group:
        raise RuntimeError("block: batch norm over several processes has no second derivative")
    grad, act = peel_act(grad, y, form.acts[-1])
    form = form._replace(acts=[*form.acts[:-1], act])
    form_of = sizes(inputs)
    found = second_order(lambda *tensors: formula(Inputs(*nested(tensors, form_of)), form), flat(inputs), grad)
    if form.shortcut == "given" and inputs.residual is None and needs[1]:
        found[1] = grad
    return found


def formula(inputs: Inputs, form: Form) -> Tensor:
    """The output of a block in plain PyTorch."""

    def unit(i, x):
        z = reference.convolution(x, inputs.weights[i], inputs.conv_biases[i], form.convs[i]) if form.convs else x
        return z, Norm(*reference.moments(z), inputs.bn_weights[i], inputs.bn_biases[i], form.eps[i])

    z, norm = unit(0, inputs.x)
    for i in range(1, form.depth):
        z, norm = unit(i, reference.activation(z, norm, form.acts[i - 1]))
    residual, residual_norm = inputs.x if form.shortcut == "input" else inputs.residual, None
    if form.shortcut == "projected":
        residual, residual_norm = unit(form.depth, inputs.x)
    y = reference.norm_act(z, norm, residual, residual_norm, form.acts[-1])[0]
    return torch.nn.functional.max_pool2d(y, *form.pool) if form.pool else y


def activations(args: Sequence, output: Sequence) -> Iterator[tuple[Tensor, str]]:
    """What the activations of a call of the operator gave, computed again within it, each with its name."""
    inputs, form = Inputs(*args[:6]), _parsed(*args[6:])
    y, z, mean, var, *_ = output
    norms = [Norm(*values) for values in zip(mean, var, inputs.bn_weights, inputs.bn_biases, form.eps, strict=True)]
    last = len(form.acts) - 1
    if form.pool and form.lean:  # the last convolution was not kept
        x = reference.activation(z[-1], norms[last - 1], form.acts[last - 1]) if z else inputs.x
        z = [*z, reference.convolution(x, inputs.weights[last], inputs.conv_biases[last], form.convs[last])]
    for i, act in enumerate(form.acts):
        yield y if i == last and not form.pool else reference.activation(z[i], norms[i], act), act


def pooled(args: Sequence, output: Sequence) -> Tensor | None:
    """Where in its map each output of the pooling at the end was taken, as PyTorch's indices; None: there is none."""
    inputs, form, told = Inputs(*args[:6]), _parsed(*args[6:]), output[4]
    if not form.pool:
        return None
    shape = inputs.x.shape
    for conv, weight in zip(form.convs, inputs.weights, strict=True):
        shape = conv.output_shape(shape, weight)
    return reference.index_of_taps(told, shape[3], *form.pool)


def _backward_impl(grad, y, told, totals, *rest):
    inputs, (z, mean, var), form, needs = Inputs(*rest[:6]), rest[6:9], _parsed(*rest[9:-1]), rest[-1]
    needs = Needs(*nested(needs, sizes(inputs)))
    found = Backward(inputs, form, Kept(z, mean, var, told, totals), y, needs).run(grad)
    maps, parameters = flat(found[:2]), zip(flat(found[2:]), flat(inputs[2:]), strict=True)
    laid_out = [*maps, *(g if g is None else _laid_out(g, t) for g, t in parameters)]
    return [inputs.x.new_empty(0) if g is None else g for g in laid_out]


def _laid_out(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of a parameter in its own layout, as compiled code, and the fake, have it."""
    return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


def _backward_fake(grad, y, told, totals, *rest):
    needs, inputs, form = rest[-1], flat(rest[:6]), _parsed(*rest[9:-1])
    x = inputs[0]

    def like(t, index):
        if not needs[index] or (index == 1 and form.acts[-1] == "none"):
            return x.new_empty(0)
        if index < 2:
            return empty_channels_last(x, grad.shape if t is None else t.shape)
        return torch.empty_like(t)

    return [like(t, index) for index, t in enumerate(inputs)]


def _cast(dtype, x, residual, weights, *rest):
    # As aten's convolution under autocast; as its batch norm, where there is no convolution: x decides.
    x = x.to(dtype) if weights and x.dtype != torch.float64 else x
    return x, None if residual is None else residual.to(x.dtype), weights, *rest


_INPUTS = (
    "Tensor x, Tensor? residual, Tensor[] weights, Tensor?[] conv_biases, Tensor?[] bn_weights, Tensor?[] bn_biases"
)

define(
    f"block({_INPUTS}, {FORM_SCHEMA}) "
    "-> (Tensor y, Tensor[] z, Tensor[] mean, Tensor[] var, Tensor told, Tensor totals)",
    _impl,
    _fake,
)
define(
    f"block_backward(Tensor grad, Tensor? y, Tensor told, Tensor totals, {_INPUTS}, Tensor[] z, Tensor[] mean, "
    f"Tensor[] var, {FORM_SCHEMA}, bool[] needs) -> Tensor[]",
    _backward_impl,
    _backward_fake,
)
autograd("block", _setup_context, _backward)
autocast("block", _cast)
