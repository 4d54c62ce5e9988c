"""act(batch_norm(conv(x)) + residual): one unit of a residual network, in training and in inference."""

from torch import Tensor

from fused_resnet.ops import checks
from fused_resnet.ops.bn_act import fold_batch_norm
from fused_resnet.ops.conv_args import normalise
from fused_resnet.ops.library import call
from fused_resnet.ops.residual_block import Unit, train


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    conv_bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    act: str = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Return `act(batch_norm(conv2d(x, weight, conv_bias)) + residual)`.

    In training the batch's statistics normalise, and the running ones are updated in place. In inference batch norm is
    folded into a per-channel scale and shift, and the whole is `conv_scale_act`.

    Shapes:
        x: [N, C, H, W], fp32, bf16, fp16 or fp64; channels_last is the native layout, others are converted.
        weight: [K, C / groups, R, S], of x's dtype; conv_bias: [K] or None.
        bn_weight, bn_bias: [K] or None (1 and 0); running_mean, running_var: [K], may be None in training.
        residual: [N, K, P, Q], of x's dtype, added before the activation.
        returns: [N, K, P, Q] in channels_last.

    Args:
        stride, dilation: int or (height, width); padding: the same, or "same" (stride 1 only) or "valid".
        act: "none", "relu", "relu6", "hardswish" or "silu".
        momentum: weight of the batch in the running statistics; running_var takes the unbiased variance.
        backend: a name of `available_backends()`; by default the selection decides.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, before anything is launched; one value a
        channel in training, as `torch.nn.functional.batch_norm`.
    """
    op = "conv_bn_act"
    vectors = {"bn_weight": bn_weight, "bn_bias": bn_bias, "running_mean": running_mean, "running_var": running_var}
    checks.check_input(op, x)
    checks.check_act(op, act)
    checks.check_same_device(op, x, weight=weight, conv_bias=conv_bias, residual=residual, **vectors)
    if not checks.under_autocast(x):
        checks.check_same_dtype(op, x, weight=weight, conv_bias=conv_bias, residual=residual)
    checks.check_statistics(op, running_mean, running_var, training=training)
    checks.check_eps(eps, training=training)
    x, args = normalise(op, x, weight, stride, padding, dilation, groups)
    checks.check_channels(op, weight.shape[0], conv_bias=conv_bias, **vectors)
    size = args.output_size(x, weight)
    checks.check_residual(op, residual, size)
    if not training:
        scale, shift = fold_batch_norm(bn_weight, bn_bias, running_mean, running_var, eps)
        if conv_bias is not None:
            shift = shift + conv_bias.to(scale.dtype) * scale
        return call("conv_scale_act", x, weight, scale, shift, residual, *args, act, backend or "")
    checks.check_more_than_one_value(size)
    options = {"conv_bias": conv_bias, "momentum": momentum, "eps": eps, "act": act}
    unit = Unit(weight, bn_weight, bn_bias, running_mean, running_var, **options)
    return train(x, [unit], [args], residual, backend=backend)
