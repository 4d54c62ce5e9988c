"""Every operator on the GPU over the shared cases: exact on integers, and the two-times rule against eager there."""

import pytest
import test_add_act
import test_bn_act
import test_conv_bn_act
import test_conv_scale_act
import torch
import torch.nn.functional as F
from devices import devices, full_fp32, moved, on_devices, without_cudnn
from problems import (
    CONV_CASES,
    EXACT_ACTS,
    LAYOUTS,
    PLANES,
    acts,
    compare_with_eager,
    dtypes,
    eager_add_act,
    eager_bn_act,
    eager_conv_bn_act,
    eager_conv_scale_act,
    eager_scale_act,
    finish,
    image,
    integers,
    poisoned,
    representable,
    require,
    run,
)
from test_reliability import OPERATORS, require_for, tensors_of
from tolerances import assert_two_times

from fused_resnet.ops import add_act, bn_act, conv_bn_act, conv_scale_act, max_pool2d, scale_act

poison = pytest.fixture(autouse=True)(poisoned)
full_precision = pytest.fixture(autouse=True)(full_fp32)
exact_convolutions = pytest.fixture(without_cudnn)

FEW_CASES = ("1x1_padded", "3x3_stride2_odd", "3x3_grouped")
conv_cases = on_devices("case", CONV_CASES, FEW_CASES)
training_cases = on_devices("case", test_conv_bn_act.TRAINING_CASES, FEW_CASES)
planes = on_devices("shape", PLANES, ("seventeen",))
training_planes = on_devices("shape", {k: v for k, v in PLANES.items() if k != "two_values"}, ("seventeen",))


def native(tensors, device):
    """On the device and in channels_last, so that fused and eager convolutions are given the same."""
    return moved({k: LAYOUTS["channels_last"](t) if t.dim() == 4 else t for k, t in tensors.items()}, device)


def assert_exact(fused, eager, tensors, grad, device, backend, act, **options):
    """Output and gradients of integers: the very numbers that fp64 on the CPU gives."""
    truth, true_grads = run(eager, tensors, grad, torch.float64, act=act, **options)
    grad = None if grad is None else grad.to(device)
    out, grads = run(fused, native(tensors, device), grad, act=act, backend=backend, **options)
    assert out.device.type == device
    assert torch.equal(out.cpu(), representable(truth, tensors["x"].dtype)), act
    for name, found in grads.items():
        assert torch.equal(found.cpu(), representable(true_grads[name], tensors[name].dtype)), (act, name)


@conv_cases
@dtypes()
def test_conv_scale_act_exact(device, backend, case, dtype, exact_convolutions):
    tensors = test_conv_scale_act.integer_problem(case, dtype)
    require(backend, "conv_scale_act", *(tensors[name].to(device) for name in ("x", "weight")), **case.geometry)
    pre, _ = run(eager_conv_scale_act, tensors, None, torch.float64, act="none", **case.geometry)
    grad = integers(*pre.shape, dtype=dtype) * (pre != 0) * (pre != 6)
    # Weight gradients sum over every pixel: keep few enough of them for bf16's 8 bits.
    grad = grad * (torch.rand(pre.shape) < 32 / pre.numel())
    for act in EXACT_ACTS:
        assert_exact(conv_scale_act, eager_conv_scale_act, tensors, grad, device, backend, act, **case.geometry)


@conv_cases
@dtypes()
def test_conv_scale_act_two_times(device, backend, case, dtype):
    tensors = native(test_conv_scale_act.problem(case, dtype), device)
    require(backend, "conv_scale_act", tensors["x"], tensors["weight"], **case.geometry)
    options = {"fused_options": {"backend": backend}, **case.geometry}
    compare_with_eager(conv_scale_act, eager_conv_scale_act, tensors, case.act, "channels_last", **options)


@training_cases
@dtypes()
def test_conv_bn_act_training_two_times(device, backend, case, dtype):
    tensors = native(test_conv_bn_act.problem(case, dtype), device)
    require(backend, "conv_bn_act", tensors["x"], tensors["weight"], **case.geometry)
    options = {"fused_options": {"backend": backend}, **case.geometry}
    compare_with_eager(test_conv_bn_act.training, eager_conv_bn_act, tensors, case.act, "channels_last", **options)


@conv_cases
@dtypes()
def test_conv_bn_act_inference_two_times(device, backend, case, dtype):
    """Folded, against convolution and batch norm one after the other."""
    tensors = native(test_conv_bn_act.problem(case, dtype, conv_bias=True), device)
    require(backend, "conv_scale_act", tensors["x"], tensors["weight"], **case.geometry)
    mean, var = torch.randn(case.out_channels), torch.rand(case.out_channels) * 4 + 0.1

    def fused(x, weight, bn_weight, bn_bias, *, conv_bias, residual=None, **options):
        running = mean.to(device), var.to(device)
        return conv_bn_act(x, weight, bn_weight, bn_bias, *running, conv_bias=conv_bias, residual=residual, **options)

    def eager(x, weight, bn_weight, bn_bias, *, conv_bias, residual=None, act, **geometry):
        z = F.conv2d(x, weight, conv_bias, **geometry)
        return finish(F.batch_norm(z, mean.to(bn_bias), var.to(bn_bias), bn_weight, bn_bias), residual, act)

    options = {"fused_options": {"backend": backend}, **case.geometry}
    compare_with_eager(fused, eager, tensors, case.act, "channels_last", **options)


@on_devices("shape", test_bn_act.EXACT_PLANES)
@dtypes()
def test_bn_act_exact(device, backend, shape, dtype):
    tensors = test_bn_act.exact_problem(shape, dtype)
    require(backend, "bn_act", tensors["x"].to(device))
    if (device, backend) == ("cuda", "reference") and shape != test_bn_act.EXACT_PLANES["two_values"]:
        pytest.skip("reference: on CUDA aten's var_mean divides after every value, which is exact for two of them")
    pre, _ = run(eager_bn_act, tensors, None, torch.float64, act="none", eps=3.0)
    grad = integers(*shape, low=-2, high=2, dtype=dtype) * (pre != 0) * (pre != 6)
    # In fp32 the gradients, too, are exact; in bf16 and fp16 sums of them have more bits than the dtype.
    grad = grad if dtype == torch.float32 else None
    for act in EXACT_ACTS:
        assert_exact(test_bn_act.training, eager_bn_act, tensors, grad, device, backend, act, eps=3.0)


@training_planes
@dtypes()
def test_bn_act_two_times(device, backend, shape, dtype):
    tensors = native(test_bn_act.problem(shape, dtype), device)
    require(backend, "bn_act", tensors["x"])
    options = {"backend": backend}
    compare_with_eager(test_bn_act.training, eager_bn_act, tensors, "relu", "channels_last", options)


@training_planes
@dtypes()
def test_bn_act_running_statistics_two_times(device, backend, shape, dtype):
    x = LAYOUTS["channels_last"]((torch.randn(shape) * 3 - 2).to(dtype))
    require(backend, "bn_act", x.to(device))
    c = shape[1]
    found, eager = (tuple(moved({"mean": torch.zeros(c), "var": torch.ones(c)}, device).values()) for _ in range(2))
    truth = torch.zeros(c).double(), torch.ones(c).double()
    bn_act(x.to(device), None, None, *found, training=True, momentum=0.3, backend=backend)
    eager_bn_act(x.to(device), act="relu", running=eager, momentum=0.3)
    eager_bn_act(x.double(), act="relu", running=truth, momentum=0.3)
    for name, *values in zip(("running_mean", "running_var"), found, eager, truth, strict=True):
        assert_two_times(*(value.cpu() for value in values), name)


@planes
@dtypes()
def test_bn_act_inference_two_times(device, backend, shape, dtype):
    tensors = native(test_bn_act.problem(shape, dtype), device)
    require(backend, "scale_act", tensors["x"])
    mean, var = torch.randn(shape[1]), torch.rand(shape[1]) * 4 + 0.1

    def fused(x, weight, bias, residual, *, act):
        return bn_act(x, weight, bias, mean.to(device), var.to(device), residual=residual, act=act, backend=backend)

    def eager(x, weight, bias, residual, *, act):
        return finish(F.batch_norm(x, mean.to(bias), var.to(bias), weight, bias), residual, act)

    compare_with_eager(fused, eager, tensors, "relu", "channels_last")


@planes
@dtypes()
def test_scale_act_exact(device, backend, shape, dtype):
    tensors = {
        "x": integers(*shape, low=-8, high=8, dtype=dtype),
        "scale": 2.0 ** integers(shape[1]),
        "shift": integers(shape[1], low=-4, high=4),
        "residual": integers(*shape, low=-4, high=4, dtype=dtype),
    }
    require(backend, "scale_act", tensors["x"].to(device))
    for act in EXACT_ACTS:
        assert_exact(scale_act, eager_scale_act, tensors, None, device, backend, act)


@planes
@dtypes()
def test_scale_act_two_times(device, backend, shape, dtype):
    tensors = native(test_bn_act.as_scale(test_bn_act.problem(shape, dtype)), device)
    require(backend, "scale_act", tensors["x"])
    compare_with_eager(scale_act, eager_scale_act, tensors, "relu6", "channels_last", {"backend": backend})


@planes
@dtypes()
def test_add_act_exact(device, backend, shape, dtype):
    tensors = {name: integers(*shape, low=-8, high=8, dtype=dtype) for name in ("x", "residual")}
    require(backend, "add_act", tensors["x"].to(device))
    grad = integers(*shape, low=-8, high=8, dtype=dtype)  # also at the kinks: aten's own choice there
    for act in EXACT_ACTS:
        assert_exact(add_act, eager_add_act, tensors, grad, device, backend, act)


@planes
@dtypes()
def test_add_act_two_times(device, backend, shape, dtype):
    tensors = native(test_add_act.problem(shape, dtype), device)
    require(backend, "add_act", tensors["x"])
    compare_with_eager(add_act, eager_add_act, tensors, "relu", "channels_last", {"backend": backend})


@on_devices("name", tuple(OPERATORS))
@dtypes()
@acts
def test_operator_two_times_every_act(device, backend, name, act, dtype):
    function, eager, _ = OPERATORS[name]
    tensors = native(tensors_of(name, (2, 17, 5, 4), dtype), device)
    require_for(backend, name, tensors)
    compare_with_eager(function, eager, tensors, act, "channels_last", {"backend": backend})


@devices
@dtypes()
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), ((3, 5), (2, 1), (1, 2))])
def test_max_pool2d(device, kernel, stride, padding, dtype):
    """Values, NaN, layout and gradients are torch's on that device."""
    x = image(3, 33, 9, 8, dtype=dtype)
    x[0, 0, 1, 1], x[0, 1], x[-1, -1, 0, 0] = float("nan"), -float("inf"), float("inf")
    x = x.to(device)
    truth = F.max_pool2d(x, kernel, stride, padding)
    with torch.no_grad():
        y = max_pool2d(x, kernel, stride, padding)
    assert torch.equal(y.nan_to_num(7), truth.nan_to_num(7))
    assert torch.equal(y.isnan(), truth.isnan())
    assert y.stride() == truth.stride()
    torch.use_deterministic_algorithms(False)  # aten has no other gradient of it on CUDA; the fixture sets it back
    grads, x = [], integers(2, 8, 9, 9, low=-8, high=8, dtype=dtype).to(device)
    for function in (max_pool2d, F.max_pool2d):
        leaf = x.clone().requires_grad_()
        function(leaf, kernel, stride, padding).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
