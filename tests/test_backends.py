"""The selection of a backend, and the errors that come before any launch."""

import re
import threading

import pytest
import torch
from problems import ACTS, BACKEND_NAMES

import fused_resnet as fr
from fused_resnet.backends import backend_report
from fused_resnet.backends.selection import BACKENDS
from fused_resnet.ops import add_act, bn_act, conv_bn_act, conv_scale_act, scale_act

X, WEIGHT, ONE = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.ones(4)

OPERATORS = {"add_act", "add_act_backward", "block", "block_backward", "conv_scale_act", "scale_act"}


def convolve(x=X, **options):
    return conv_scale_act(x, WEIGHT, ONE, ONE, **options)


@pytest.fixture(autouse=True)
def _automatic(monkeypatch):
    monkeypatch.delenv("FUSED_RESNET_BACKEND", raising=False)
    yield
    fr.use_backend(None)


@pytest.fixture
def calls(monkeypatch):
    """Names of the backends that ran conv_scale_act or a backward of add_act, in order."""
    found = []
    for name in BACKEND_NAMES:
        for op in ("conv_scale_act", "add_act_backward"):
            original = getattr(BACKENDS[name], op)

            def record(*args, name=name, original=original):
                found.append(name)
                return original(*args)

            monkeypatch.setattr(BACKENDS[name], op, record)
    return found


needs_cpu = pytest.mark.skipif("cpu" not in BACKEND_NAMES, reason=backend_report()["cpu"] or "available")


def test_every_operator_is_known():
    """Each of these has its opcheck in the file of its operator; a new one must be added to both."""
    names = torch._C._dispatch_get_all_op_names()
    assert {name.removeprefix("fused_resnet::") for name in names if name.startswith("fused_resnet::")} == OPERATORS


def test_reference_is_always_available():
    assert "reference" in fr.available_backends()
    report = backend_report()
    assert [name for name in report if not report[name]] == fr.available_backends()


@needs_cpu
def test_backend_automatic_choice(calls):
    convolve()
    convolve(X.double()[:, :3].float())
    conv_scale_act(X.double(), WEIGHT.double(), ONE, ONE)
    assert calls == ["cpu", "cpu", "reference"]


@needs_cpu
def test_use_backend_context_nests(calls):
    with fr.use_backend("reference"):
        convolve()
        with fr.use_backend("cpu"):
            convolve()
            with fr.use_backend(None):
                convolve()
        convolve()
        convolve(backend="cpu")
    convolve()
    assert calls == ["reference", "cpu", "cpu", "reference", "cpu", "cpu"]


@needs_cpu
def test_use_backend_context_ends_with_an_error(calls):
    with pytest.raises(ZeroDivisionError), fr.use_backend("reference"):
        raise ZeroDivisionError
    convolve()
    assert calls == ["cpu"]


@needs_cpu
def test_use_backend_is_a_setter(calls):
    fr.use_backend("reference")
    convolve()
    fr.use_backend(None)
    convolve()
    assert calls == ["reference", "cpu"]


@needs_cpu
def test_use_backend_holds_for_its_thread_only(calls):
    def run():
        convolve()

    with fr.use_backend("reference"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        convolve()
    assert calls == ["cpu", "reference"]


def test_backward_uses_the_backend_of_its_forward(calls):
    x = X.clone().requires_grad_()
    with fr.use_backend("reference"):
        y = add_act(x, X)
    y.sum().backward()
    assert calls == ["reference"]


@needs_cpu
def test_environment_variable(calls, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "reference")
    convolve()
    with fr.use_backend("cpu"):
        convolve()
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "auto")
    convolve()
    assert calls == ["reference", "cpu", "cpu"]


def test_environment_variable_with_an_unknown_name(monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="FUSED_RESNET_BACKEND: unknown backend 'cudnn', expected one of 'reference'"):
        convolve()


def test_unknown_backend():
    with pytest.raises(ValueError, match="conv_scale_act: unknown backend 'cudnn', expected one of 'reference', 'cpu'"):
        convolve(backend="cudnn")
    with pytest.raises(ValueError, match="use_backend: unknown backend 'cudnn'"):
        fr.use_backend("cudnn")


@needs_cpu
def test_backend_that_cannot_run_the_problem_says_the_way_out():
    expected = "backend 'cpu' cannot run this: torch.float64 input; it takes float32 and bfloat16; use backend="
    with pytest.raises(RuntimeError, match=expected + "'reference'"):
        conv_scale_act(X.double(), WEIGHT.double(), ONE, ONE, backend="cpu")
    with fr.use_backend("cpu"), pytest.raises(RuntimeError, match="add_act: " + expected):
        add_act(X.double(), X.double())


def test_backend_that_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(BACKENDS["cpu"], "unavailable", lambda: "no compiler; pip install it")
    expected = "backend 'cpu' is not available: no compiler; pip install it"
    with pytest.raises(RuntimeError, match="use_backend: " + expected):
        fr.use_backend("cpu")
    with pytest.raises(RuntimeError, match="conv_scale_act: " + expected):
        convolve(backend="cpu")
    assert "cpu" not in fr.available_backends()


# --- arguments ---

UNIT = (WEIGHT, ONE, ONE)
STATS = (ONE, ONE, ONE, ONE)
C3 = torch.ones(3)

ERRORS = {
    "not_a_tensor": (lambda: add_act([1.0], X), TypeError, "add_act: x must be a Tensor, got list"),
    "integers": (
        lambda: conv_scale_act(X.int(), *UNIT),
        TypeError,
        "conv_scale_act: x must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "three_dimensions": (
        lambda: bn_act(X[0], C3, C3, C3, C3),
        ValueError,
        "bn_act: x must be 4-d [N, C, H, W], got 3-d (3, 5, 5)",
    ),
    "weight_dimensions": (
        lambda: conv_scale_act(X, WEIGHT[0], ONE, ONE),
        ValueError,
        "conv_scale_act: weight must be 4-d [K, C / groups, R, S], got 3-d (3, 3, 3)",
    ),
    "dtype_mix": (
        lambda: conv_scale_act(X.bfloat16(), *UNIT),
        TypeError,
        "conv_scale_act: weight is torch.float32, but x is torch.bfloat16; cast one of them, or use autocast",
    ),
    "residual_dtype": (
        lambda: scale_act(X, C3, C3, residual=X.half()),
        TypeError,
        "scale_act: residual is torch.float16, but x is torch.float32",
    ),
    "device_mix": (
        lambda: conv_bn_act(X, WEIGHT.to("meta"), *STATS),
        ValueError,
        "conv_bn_act: weight is on meta, but x is on cpu; move one of them",
    ),
    "statistics_device": (
        lambda: bn_act(X, C3, C3, C3, C3.to("meta")),
        ValueError,
        "bn_act: running_var is on meta, but x is on cpu",
    ),
    "channels": (
        lambda: conv_scale_act(X[:, :2], *UNIT),
        ValueError,
        "conv_scale_act: x has 2 channels, but weight (4, 3, 3, 3) with groups=1 expects 3",
    ),
    "short_scale": (
        lambda: conv_scale_act(X, WEIGHT, ONE[:3], ONE),
        ValueError,
        "conv_scale_act: scale must have shape (4,), one value a channel, got (3,)",
    ),
    "integer_scale": (
        lambda: scale_act(X, C3.int(), C3),
        TypeError,
        "scale_act: scale must be floating point, got torch.int32",
    ),
    "short_running_mean": (  # p188958: read past its end
        lambda: bn_act(X, C3, C3, C3[:2], C3, training=True),
        ValueError,
        "bn_act: running_mean must have shape (3,), one value a channel, got (2,)",
    ),
    "conv_bn_statistics": (
        lambda: conv_bn_act(X, WEIGHT, ONE, ONE, ONE, C3, training=True),
        ValueError,
        "conv_bn_act: running_var must have shape (4,), one value a channel, got (3,)",
    ),
    "only_one_statistic": (
        lambda: bn_act(X, C3, C3, C3, None, training=True),
        ValueError,
        "bn_act: give running_mean and running_var together, got only running_mean",
    ),
    "no_statistics": (
        lambda: conv_bn_act(X, WEIGHT, ONE, ONE, None, None),
        ValueError,
        "conv_bn_act: running_mean and running_var are needed when training=False",
    ),
    "residual_shape": (
        lambda: convolve(residual=torch.ones(2, 4, 1, 1)),
        ValueError,
        "conv_scale_act: residual must have the output's shape (2, 4, 3, 3), got (2, 4, 1, 1)",
    ),
    "add_shapes": (
        lambda: add_act(X, X[:1]),
        ValueError,
        "add_act: residual must have the output's shape (2, 3, 5, 5), got (1, 3, 5, 5)",
    ),
    "act": (
        lambda: add_act(X, X, act="gelu"),
        ValueError,
        f"add_act: unknown act 'gelu', expected one of {', '.join(map(repr, ACTS))}",
    ),
    "groups": (lambda: convolve(groups=3), ValueError, "groups must divide the 4 output channels, got 3"),
    "groups_zero": (lambda: convolve(groups=0), ValueError, "groups must divide the 4 output channels, got 0"),
    "stride": (lambda: convolve(stride=0), ValueError, "stride must be an int or a pair of ints of at least 1, got 0"),
    "stride_of_three": (
        lambda: convolve(stride=(1, 2, 3)),
        ValueError,
        "stride must be an int or a pair of ints of at least 1, got (1, 2, 3)",
    ),
    "padding": (
        lambda: convolve(padding=-1),
        ValueError,
        "padding must be an int or a pair of ints of at least 0, got -1",
    ),
    "padding_name": (
        lambda: convolve(padding="full"),
        ValueError,
        "padding must be an int, a pair, 'same' or 'valid', got 'full'",
    ),
    "same_with_stride": (
        lambda: convolve(padding="same", stride=2),
        ValueError,
        "padding='same' needs stride 1, got stride (2, 2)",
    ),
    "dilation": (lambda: convolve(dilation=1.5), ValueError, "dilation must be an int or a pair of ints of at least 1"),
    "kernel_too_large": (
        lambda: convolve(dilation=3),
        ValueError,
        "an image of (5, 5) is too small for a kernel of (3, 3) with padding (0, 0) and dilation (3, 3)",
    ),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS.keys())
def test_argument_errors(case):
    """reliability.md, shapes: which argument, what it was, what was expected, and again at a second call."""
    call, error, text = case
    for _ in range(2):
        with pytest.raises(error, match=re.escape(text)):
            call()


def test_argument_errors_after_the_same_shapes_were_fine():
    """What passed the checks once is remembered: only for the same dtypes, shapes and arguments."""
    assert convolve(padding=1).shape == (2, 4, 5, 5)
    with pytest.raises(TypeError, match=r"weight is torch.float32, but x is torch.float64"):
        convolve(X.double(), padding=1)
    with pytest.raises(ValueError, match="padding must be"):
        convolve(padding=-1)
    with pytest.raises(ValueError, match="unknown act"):
        convolve(padding=1, act="gelu")
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(X.bfloat16(), padding=1).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"weight is torch.float32, but x is torch.bfloat16"):
        convolve(X.bfloat16(), padding=1)
