"""Rows of reliability.md that hold for every operator: each test is named after its row."""

import re
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from problems import (
    BACKEND_NAMES,
    LAYOUTS,
    acts,
    backends,
    eager_add_act,
    eager_bn_act,
    eager_conv_bn_act,
    eager_conv_scale_act,
    eager_scale_act,
    layouts,
    poisoned,
    require,
    run,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_resnet.backends.cpu import engine_takes
from fused_resnet.ops import add_act, bn_act, conv_bn_act, conv_scale_act, scale_act
from fused_resnet.ops.conv_args import ConvArgs

poison = pytest.fixture(autouse=True)(poisoned)

SHAPE = (2, 17, 6, 7)


def _bn_act(x, weight, bias, residual, *, running=(None, None), **options):
    return bn_act(x, weight, bias, *running, residual=residual, training=True, **options)


def _conv_bn_act(x, conv_weight, weight, bias, residual, *, running=(None, None), **options):
    return conv_bn_act(x, conv_weight, weight, bias, *running, residual=residual, training=True, padding=1, **options)


def _eager_conv_bn_act(x, conv_weight, weight, bias, residual, *, act):
    return eager_conv_bn_act(x, conv_weight, weight, bias, None, residual, act=act, padding=1)


def _conv_scale_act(x, conv_weight, weight, bias, residual, **options):
    return conv_scale_act(x, conv_weight, weight, bias, residual=residual, padding=1, **options)


def _eager_conv_scale_act(x, conv_weight, weight, bias, residual, *, act):
    return eager_conv_scale_act(x, conv_weight, weight, bias, residual, act=act, padding=1)


# The operator, the same in eager, and the names of its tensors.
OPERATORS = {
    "add_act": (add_act, eager_add_act, ("x", "residual")),
    "bn_act": (_bn_act, eager_bn_act, ("x", "weight", "bias", "residual")),
    "scale_act": (
        lambda x, weight, bias, residual, **o: scale_act(x, weight, bias, residual=residual, **o),
        lambda x, weight, bias, residual, *, act: eager_scale_act(x, weight, bias, residual, act=act),
        ("x", "weight", "bias", "residual"),
    ),
    "conv_scale_act": (_conv_scale_act, _eager_conv_scale_act, ("x", "conv_weight", "weight", "bias", "residual")),
    "conv_bn_act": (_conv_bn_act, _eager_conv_bn_act, ("x", "conv_weight", "weight", "bias", "residual")),
}
operators = pytest.mark.parametrize("name", OPERATORS)
WITH_STATISTICS = pytest.mark.parametrize("name", ["bn_act", "conv_bn_act"])


def tensors_of(name, shape=SHAPE, dtype=torch.float32):
    c = shape[1]
    made = {
        "x": torch.randn(shape).to(dtype),
        "conv_weight": (torch.randn(c, c, 3, 3) / 12).to(dtype),
        "weight": torch.rand(c) + 0.5,
        "bias": torch.randn(c),
        "residual": torch.randn(shape).to(dtype),
    }
    return {key: made[key] for key in OPERATORS[name][2]}


def require_for(backend, name, tensors):
    weight = tensors.get("conv_weight")
    geometry = {} if weight is None else {"padding": 1}
    require(backend, name, tensors["x"], weight, **geometry)


# --- strides ---


@backends
@operators
@layouts
def test_fake_strides_equal_real_ones(layout, name, backend):
    """p169778: outputs and gradients."""
    function, _, _ = OPERATORS[name]
    tensors = tensors_of(name)
    require_for(backend, name, tensors)
    tensors |= {key: LAYOUTS[layout](tensors[key]) for key in ("x", "residual")}
    grad = LAYOUTS[layout](torch.randn(SHAPE))
    real = run(function, tensors, grad, act="silu", backend=backend)
    with FakeTensorMode() as mode:
        fakes = {key: mode.from_tensor(t) for key, t in tensors.items()}
        fake = run(function, fakes, mode.from_tensor(grad), act="silu", backend=backend)
    assert fake[0].stride() == real[0].stride()
    for key, gradient in real[1].items():
        assert fake[1][key].stride() == gradient.stride(), key
        assert fake[1][key].dtype == gradient.dtype, key


# --- empty ---


@backends
@operators
def test_empty(name, backend):
    """N = 0 (p12013, p29578): shapes and gradients as eager's."""
    function, eager, _ = OPERATORS[name]
    tensors = tensors_of(name, (0, *SHAPE[1:]))
    require_for(backend, name, tensors)
    found = run(function, tensors, torch.zeros(0, *SHAPE[1:]), act="relu", backend=backend)
    wanted = run(eager, tensors, torch.zeros(0, *SHAPE[1:]), act="relu")
    assert found[0].shape == wanted[0].shape
    for key, gradient in wanted[1].items():
        assert found[1][key].shape == gradient.shape
        assert torch.equal(found[1][key], torch.zeros_like(gradient)), key


@backends
@WITH_STATISTICS
def test_empty_leaves_statistics_alone(name, backend):
    function, _, _ = OPERATORS[name]
    tensors = tensors_of(name, (0, *SHAPE[1:]))
    require_for(backend, name, tensors)
    running = torch.full((17,), 0.25), torch.full((17,), 4.0)
    function(**tensors, running=running, act="relu", backend=backend)
    assert (running[0] == 0.25).all()
    assert (running[1] == 4.0).all()


# --- NaN, Inf ---


def same_positions(found, wanted, what):
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(found), kind(wanted)), f"{what}: {kind.__name__}"


@backends
@operators
@acts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["x", "residual", "grad"])
def test_nan_and_inf_positions(where, dtype, act, name, backend):
    """p78601: one NaN, one Inf and one -Inf, each in a channel and an image row of its own."""
    function, eager, _ = OPERATORS[name]
    tensors = tensors_of(name, (2, 32, 8, 8), dtype)
    require_for(backend, name, tensors)
    grad = torch.randn(2, 32, 8, 8).to(dtype)
    target = grad if where == "grad" else tensors[where]
    for channel, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        target[channel % 2, 4 * channel, 2 * channel + 1, channel] = value
    native = {key: LAYOUTS["channels_last"](t) if t.dim() == 4 else t for key, t in tensors.items()}
    y, grads = run(function, native, LAYOUTS["channels_last"](grad), act=act, backend=backend)
    wanted, wanted_grads = run(eager, native, LAYOUTS["channels_last"](grad), act=act)
    same_positions(y, wanted, "output")
    assert not torch.isfinite(wanted).all() or where == "grad"
    for key in grads:
        same_positions(grads[key], wanted_grads[key], f"gradient of {key}")


# --- threads ---


@operators
def test_threads(name):
    """t11494: eight threads, cold caches, the same results."""
    function, _, _ = OPERATORS[name]
    tensors, grad = tensors_of(name), torch.randn(SHAPE)
    start, results = threading.Barrier(8), [None] * 8

    def work(i):
        start.wait()
        results[i] = [run(function, tensors, grad, act="silu") for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    y, grads = run(function, tensors, grad, act="silu")
    for found in results:
        assert found is not None, "a thread failed"
        for out, gradients in found:
            assert torch.equal(out, y)
            assert all(torch.equal(gradients[key], grads[key]) for key in grads)


# --- determinism ---


@backends
@operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_determinism(dtype, name, backend):
    """Bitwise, under use_deterministic_algorithms (the fixture of this file) and with other work in between."""
    function, _, _ = OPERATORS[name]
    tensors, grad = tensors_of(name, (3, 40, 9, 11), dtype), torch.randn(3, 40, 9, 11).to(dtype)
    require_for(backend, name, tensors)
    y, grads = run(function, tensors, grad, act="silu", backend=backend)
    for _ in range(5):
        torch.randn(100_000).sum()
        again, gradients = run(function, tensors, grad, act="silu", backend=backend)
        assert torch.equal(again, y)
        assert all(torch.equal(gradients[key], grads[key]) for key in grads)


@operators
def test_determinism_does_not_depend_on_threads(name):
    """Reductions have a fixed order: one and two threads give the same bits."""
    convolves = name.startswith("conv")
    if convolves and not engine_takes(torch.float32, ConvArgs((1, 1), (1, 1), (1, 1), 1)):
        pytest.skip("the convolution is oneDNN's here, which promises nothing about other numbers of threads")
    function, _, _ = OPERATORS[name]
    tensors, grad = tensors_of(name, (4, 40, 19, 11)), torch.randn(4, 40, 19, 11)
    before, found = torch.get_num_threads(), []
    if "cpu" not in BACKEND_NAMES:
        pytest.skip("aten's sums depend on the number of threads, and the reference backend is aten")
    require_for("cpu", name, tensors)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(run(function, tensors, grad, act="silu", backend="cpu"))
    finally:
        torch.set_num_threads(before)
    (y, grads), (again, gradients) = found
    assert torch.equal(again, y)
    if not (convolves or name == "scale_act"):  # their backward is in part aten, where a sum's order is the threads'
        assert all(torch.equal(gradients[key], grads[key]) for key in grads)


# --- double backward ---


@backends
@operators
@acts
def test_double_backward_starts_from_the_same_gradients(act, name, backend):
    """p186256: with create_graph=True the gradients are those of the fast backward, and differentiable."""
    function, _, _ = OPERATORS[name]
    tensors, grad = tensors_of(name), torch.randn(SHAPE)
    require_for(backend, name, tensors)
    _, fast = run(function, tensors, grad, act=act, backend=backend)
    leaves = {key: t.detach().requires_grad_() for key, t in tensors.items()}
    y = function(**leaves, act=act, backend=backend)
    slow = torch.autograd.grad(y, list(leaves.values()), grad.requires_grad_(), create_graph=True)
    for key, gradient in zip(leaves, slow, strict=True):
        torch.testing.assert_close(gradient, fast[key], msg=lambda text, key=key: f"{key}: {text}")
    assert torch.autograd.grad(slow[0].square().sum(), grad)[0].isfinite().all()


# --- BN: one value a channel in training ---


@backends
@WITH_STATISTICS
def test_bn_one_value_per_channel(name, backend):
    """p7716: the same ValueError as torch, same text; the statistics stay."""
    function, _, _ = OPERATORS[name]
    tensors = tensors_of(name, (1, 17, 1, 1))
    running = torch.zeros(17), torch.ones(17)
    with pytest.raises(ValueError) as torch_error:
        F.batch_norm(tensors["x"], *running, training=True)
    with pytest.raises(ValueError, match=re.escape(str(torch_error.value))):
        function(**tensors, running=running, act="relu", backend=backend)
    assert not running[0].any()


@WITH_STATISTICS
@pytest.mark.parametrize(("eps", "training"), [(0.0, True), (-1e-5, True), (-1e-5, False)])
def test_bn_eps_out_of_range(name, eps, training):
    """The same ValueError as torch, same text."""
    x, weight = torch.randn(2, 17, 3, 3), torch.randn(17, 17, 3, 3)
    running = torch.zeros(17), torch.ones(17)
    with pytest.raises(ValueError) as torch_error:
        F.batch_norm(x, *running, training=training, eps=eps)
    run = partial(bn_act, x) if name == "bn_act" else partial(conv_bn_act, x, weight)
    with pytest.raises(ValueError, match=re.escape(str(torch_error.value))):
        run(None, None, *running, training=training, eps=eps)
