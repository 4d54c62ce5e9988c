"""PyTorch's own samples of conv2d and batch_norm, forward and backward, through the fused operators."""

import warnings

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("expecttest")  # op_db needs it

from problems import BACKEND_NAMES, backends, dtypes, image, require
from tolerances import assert_two_times
from torch.testing._internal.common_methods_invocations import op_db

from fused_resnet.backends.selection import BACKENDS
from fused_resnet.ops import bn_act, conv_scale_act
from fused_resnet.ops.conv_args import normalise

OP_INFO = {op.name: op for op in op_db if op.name in ("nn.functional.conv2d", "nn.functional.batch_norm")}

# torch 2.13 has 30 and 12 samples, of which two are 1-d and empty. Images without a batch, and batch_norm's 2-d and 3-d
# inputs, are given the dimensions that they lack.
LEAST_CONVOLUTIONS, LEAST_BATCH_NORMS = 30, 10
LEAST_IN_INFERENCE = 5  # batch norms; what a backend without kernels for training has to take


def samples(name: str, dtype: torch.dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(OP_INFO[name].sample_inputs("cpu", dtype, requires_grad=True))


def both(function, tensors, grad=None, dtype=None):
    """Output and gradients of `function(*tensors)` in `dtype`."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    y = function(*leaves)
    grad = torch.randn(y.shape).to(y.dtype) if grad is None else grad.to(y.dtype)
    return y.detach(), torch.autograd.grad(y, [t for t in leaves if t is not None], grad), grad


def compare(fused, eager, tensors):
    plain, plain_grads, grad = both(eager, tensors)
    truth, true_grads, _ = both(eager, tensors, grad, torch.float64)
    found, grads, _ = both(fused, tensors, grad)
    assert_two_times(found, plain, truth)
    for i, (gradient, *others) in enumerate(zip(grads, plain_grads, true_grads, strict=True)):
        assert_two_times(gradient, *others, f"gradient {i}", "floor_ulps_gradient")


@backends
@dtypes()
def test_op_db_conv2d(dtype, backend):
    require(backend, "conv_scale_act", image(1, 4, 3, 3, dtype=dtype), torch.empty(4, 4, 3, 3, dtype=dtype))
    done, left_out = 0, []
    for sample in samples("nn.functional.conv2d", dtype):
        x, (weight, bias) = sample.input, (*sample.args, None)[:2]
        x = x.unsqueeze(0) if x.dim() == 3 else x
        padded, args = normalise("op_db", x, weight, **_geometry(sample.kwargs))
        reason = BACKENDS[backend].unsupported("conv_scale_act", padded, weight, args)
        if reason or x.numel() == 0:
            left_out.append(reason or "empty")
            continue

        def fused(x, weight, bias, kwargs=sample.kwargs):
            k = weight.shape[0]
            shift = torch.zeros(k) if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32))
            return conv_scale_act(x, weight, torch.ones(k), shift, act="none", backend=backend, **_geometry(kwargs))

        def eager(x, weight, bias, kwargs=sample.kwargs):
            return F.conv2d(x, weight, bias, **kwargs)

        compare(fused, eager, (x, weight, bias))
        done += 1
    assert done >= LEAST_CONVOLUTIONS, left_out


def _geometry(kwargs: dict) -> dict:
    return {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | kwargs


@backends
@dtypes()
def test_op_db_batch_norm(dtype, backend):
    require(backend, "scale_act", image(1, 4, 3, 3, dtype=dtype))
    done, left_out = 0, []
    for sample in samples("nn.functional.batch_norm", dtype):
        x, (running_mean, running_var, weight, bias), kwargs = sample.input, sample.args, sample.kwargs
        x = x[:, :, None, None] if x.dim() == 2 else x[:, :, None] if x.dim() == 3 else x
        training = kwargs.get("training", False)
        reason = f"{x.dim()}-d input" if x.dim() != 4 else ""
        reason = reason or BACKENDS[backend].unsupported("bn_act" if training else "scale_act", x)
        reason = reason or ("no statistics" if running_mean is None and not training else "")
        if reason:
            left_out.append(reason)
            continue

        def fused(x, weight, bias, statistics=(running_mean, running_var), kwargs=kwargs):
            statistics = [None if t is None else t.detach().clone() for t in statistics]
            return bn_act(x, weight, bias, *statistics, act="none", backend=backend, **kwargs)

        def eager(x, weight, bias, statistics=(running_mean, running_var), kwargs=kwargs):
            statistics = [None if t is None else t.detach().clone().to(x.dtype) for t in statistics]
            return F.batch_norm(x, *statistics, weight, bias, **kwargs)

        compare(fused, eager, (x, weight, bias))
        done += 1
    inference_only = BACKENDS[backend].unsupported("bn_act", image(1, 4, 3, 3, dtype=dtype))
    assert done >= (LEAST_IN_INFERENCE if inference_only else LEAST_BATCH_NORMS), left_out


def test_op_db_has_both():
    assert set(OP_INFO) == {"nn.functional.conv2d", "nn.functional.batch_norm"}
    assert "reference" in BACKEND_NAMES
