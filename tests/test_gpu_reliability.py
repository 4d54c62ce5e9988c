"""Rows of reliability.md on the GPU: strides, empty, NaN, determinism, grid limits, and errors before the launch."""

import re

import pytest
import torch
from devices import devices, full_fp32, moved, on_devices, without_cudnn
from networks import largest
from problems import LAYOUTS, acts, compare_with_eager, dtypes, layouts, on_cpu, poisoned, run, smooth_gradient
from test_reliability import OPERATORS, SHAPE, WITH_STATISTICS, require_for, same_positions, tensors_of
from tolerances import assert_two_times, tolerance
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_resnet.ops import add_act, bn_act, conv_bn_act, conv_scale_act, scale_act

poison = pytest.fixture(autouse=True)(poisoned)
full_precision = pytest.fixture(autouse=True)(full_fp32)
exact_convolutions = pytest.fixture(without_cudnn)

operators = on_devices("name", tuple(OPERATORS))
few_operators = on_devices("name", tuple(OPERATORS), few=("add_act", "bn_act"))


def problem(name, device, backend, shape=SHAPE, dtype=torch.float32):
    tensors = moved(tensors_of(name, shape, dtype), device)
    require_for(backend, name, tensors)
    return OPERATORS[name][:2], tensors, torch.randn(shape).to(device, dtype)


# --- strides ---


@operators
@layouts
def test_operator_strides(device, backend, name, layout, exact_convolutions):
    (function, eager), tensors, _ = problem(name, device, backend)
    tensors |= {key: LAYOUTS[layout](t) for key, t in tensors.items() if t.dim() == 4}
    compare_with_eager(function, eager, tensors, "silu", layout, {"backend": backend})


@operators
@pytest.mark.parametrize("layout", ["nchw", "sliced"])
def test_operator_fake_strides_equal_real_ones(device, backend, name, layout):
    (function, _), tensors, grad = problem(name, device, backend)
    tensors |= {key: LAYOUTS[layout](tensors[key]) for key in ("x", "residual")}
    real = run(function, tensors, grad, act="silu", backend=backend)
    with FakeTensorMode() as mode:
        fakes = {key: mode.from_tensor(t) for key, t in tensors.items()}
        fake = run(function, fakes, mode.from_tensor(grad), act="silu", backend=backend)
    assert (fake[0].stride(), fake[0].device) == (real[0].stride(), real[0].device)
    for key, gradient in real[1].items():
        assert fake[1][key].stride() == gradient.stride(), key
        assert fake[1][key].dtype == gradient.dtype, key


# --- empty ---


@operators
def test_operator_empty(device, backend, name):
    (function, eager), tensors, grad = problem(name, device, backend, (0, *SHAPE[1:]))
    found = run(function, tensors, grad, act="relu", backend=backend)
    wanted = run(eager, tensors, grad, act="relu")
    assert found[0].shape == wanted[0].shape
    assert found[0].device == tensors["x"].device
    for key, gradient in wanted[1].items():
        assert torch.equal(found[1][key], torch.zeros_like(gradient)), key


@on_devices()
@WITH_STATISTICS
def test_operator_empty_leaves_statistics_alone(device, backend, name):
    (function, _), tensors, _ = problem(name, device, backend, (0, *SHAPE[1:]))
    running = torch.full((17,), 0.25, device=device), torch.full((17,), 4.0, device=device)
    function(**tensors, running=running, act="relu", backend=backend)
    assert (running[0] == 0.25).all()
    assert (running[1] == 4.0).all()


# --- NaN, Inf ---


@few_operators
@acts
@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("place", ["x", "residual", "grad"])
def test_operator_nan_and_inf_positions(device, backend, name, place, dtype, act, exact_convolutions):
    """As eager's on the same device; hardswish's as on the CPU, since aten's gradient on CUDA drops its input's NaN."""
    (function, eager), tensors, grad = problem(name, device, backend, (2, 32, 8, 8), dtype)
    target = grad if place == "grad" else tensors[place]
    for channel, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        target[channel % 2, 4 * channel, 2 * channel + 1, channel] = value
    native = {key: LAYOUTS["channels_last"](t) if t.dim() == 4 else t for key, t in tensors.items()}
    grad = LAYOUTS["channels_last"](grad)
    y, grads = run(function, native, grad, act=act, backend=backend)
    judge = "cpu" if act == "hardswish" else device
    wanted, wanted_grads = run(eager, moved(native, judge), grad.to(judge), act=act)
    same_positions(y.to(judge), wanted, "output")
    assert not torch.isfinite(wanted).all() or place == "grad"
    for key in grads:
        same_positions(grads[key].to(judge), wanted_grads[key], f"gradient of {key}")


# --- determinism ---


def assert_same_bits(function, tensors, grad, backend):
    y, grads = run(function, tensors, grad, act="silu", backend=backend)
    for _ in range(5):
        torch.randn(100_000, device=y.device).sum()
        again, gradients = run(function, tensors, grad, act="silu", backend=backend)
        assert torch.equal(again, y)
        assert all(torch.equal(gradients[key], grads[key]) for key in grads)


@few_operators
@dtypes()
def test_operator_determinism(device, backend, name, dtype):
    """Bitwise, under use_deterministic_algorithms (the fixture of this file) and with other work in between."""
    (function, _), tensors, grad = problem(name, device, backend, (3, 40, 9, 11), dtype)
    assert_same_bits(function, tensors, grad, backend)


@few_operators
def test_operator_determinism_without_the_switch(device, backend, name):
    """Reductions have a fixed order by construction; only cuDNN's gradients of a convolution may have another one."""
    (function, _), tensors, grad = problem(name, device, backend, (3, 40, 9, 11))
    torch.use_deterministic_algorithms(False)  # the fixture sets it back
    assert_same_bits(function, tensors, None if name.startswith("conv") else grad, backend)


# --- grid limits ---

MANY = {f"{name}-{n}": (name, n) for name in OPERATORS for n in (65536, 131072)}


@on_devices("many", MANY, few=("bn_act-65536",))
def test_operator_many_images_of_one_pixel(device, backend, many):
    """t3299, p16998: y and z of a grid end at 65535."""
    name, n = many
    (function, eager), tensors, _ = problem(name, device, backend, (n, 3, 1, 1))
    grad = smooth_gradient(eager, tensors, "relu")
    truth, true_grads = run(eager, on_cpu(tensors), grad.cpu(), torch.float64, act="relu")
    plain, plain_grads = run(eager, tensors, grad, act="relu")
    out, grads = run(function, tensors, grad, act="relu", backend=backend)
    assert_two_times(out.cpu(), plain.cpu(), truth)
    for key, found in grads.items():
        if found.shape[0] == n:
            found, eager_grad = found.cpu(), plain_grads[key].cpu()
            assert_two_times(found, eager_grad, true_grads[key], key, "floor_ulps_gradient")
        else:
            assert largest(found.cpu(), true_grads[key]) < tolerance("sum_of_many"), key


# --- errors before the launch ---

ERRORS = {
    "dimensions": lambda x, weight, one: bn_act(x[0], one, one, one, one),
    "integers": lambda x, weight, one: add_act(x.int(), x),
    "dtype_mix": lambda x, weight, one: conv_scale_act(x.bfloat16(), weight, one, one),
    "residual_dtype": lambda x, weight, one: scale_act(x, one, one, residual=x.half()),
    "device_mix": lambda x, weight, one: conv_bn_act(x, weight.to("meta"), one, one, one, one),
    "statistics_device": lambda x, weight, one: bn_act(x, one, one, one, one.to("meta")),
    "channels": lambda x, weight, one: conv_scale_act(x[:, :2], weight, one, one),
    "short_scale": lambda x, weight, one: conv_scale_act(x, weight, one[:2], one),
    "short_running_mean": lambda x, weight, one: bn_act(x, one, one, one[:2], one, training=True),  # p188958
    "no_statistics": lambda x, weight, one: conv_bn_act(x, weight, one, one, None, None),
    "residual_shape": lambda x, weight, one: conv_scale_act(x, weight, one, one, residual=x),
    "add_shapes": lambda x, weight, one: add_act(x, x[:1]),
    "act": lambda x, weight, one: add_act(x, x, act="gelu"),
    "stride": lambda x, weight, one: conv_scale_act(x, weight, one, one, stride=0),
    "padding": lambda x, weight, one: conv_scale_act(x, weight, one, one, padding=-1),
    "kernel_too_large": lambda x, weight, one: conv_scale_act(x, weight, one, one, dilation=3),
    "one_value": lambda x, weight, one: bn_act(x[:1, :, :1, :1], one, one, one, one, training=True),
    "eps": lambda x, weight, one: bn_act(x, one, one, one, one, training=True, eps=0.0),
    "backend": lambda x, weight, one: add_act(x, x, backend="cudnn"),
}


@devices
@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS.keys())
def test_operator_errors_are_those_on_the_cpu(device, call):
    tensors = torch.randn(2, 3, 5, 5), torch.randn(3, 3, 3, 3), torch.ones(3)
    with pytest.raises((TypeError, ValueError)) as wanted:
        call(*tensors)
    there = [t.to(device) for t in tensors]
    text = str(wanted.value).replace(" on cpu", f" on {there[0].device}")
    with pytest.raises(wanted.type, match=f"^{re.escape(text)}$"):
        call(*there)


@pytest.mark.gpu
def test_operator_refuses_tensors_on_two_devices():
    x = torch.randn(2, 3, 5, 5, device="cuda")
    with pytest.raises(ValueError, match=r"add_act: residual is on cpu, but x is on cuda:\d; move one of them"):
        add_act(x, x.cpu())
