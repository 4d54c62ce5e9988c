"""bn_act and scale_act: exactness, the two-times rule, gradients, statistics, and what reliability.md says of BN."""

import pytest
import torch
import torch.nn.functional as F
from problems import (
    ACTS,
    EXACT_ACTS,
    LAYOUTS,
    PLANES,
    acts,
    backends,
    compare_with_eager,
    dtypes,
    eager_bn_act,
    eager_scale_act,
    integers,
    layouts,
    plain_batch_norm,
    planes,
    poisoned,
    representable,
    require,
    run,
)
from tolerances import assert_two_times, tolerance, ulp

from fused_resnet.ops import bn_act, scale_act

poison = pytest.fixture(autouse=True)(poisoned)

# As many values a channel as a power of two: sums, means and their quotients are exact. (Not in fp64: there aten's
# var_mean divides after every value, in the precision of the result.)
EXACT_PLANES = {
    "one_channel": (2, 1, 4, 4),
    "two_values": (2, 5, 1, 1),
    "seventeen": (4, 17, 4, 2),
    "sixty_four": (2, 64, 8, 8),
}
exact_planes = pytest.mark.parametrize("shape", EXACT_PLANES.values(), ids=EXACT_PLANES.keys())


def training(
    x, weight=None, bias=None, residual=None, *, act, running=(None, None), momentum=0.1, eps=1e-5, backend=None
):
    return bn_act(
        x,
        weight,
        bias,
        *running,
        residual=residual,
        act=act,
        training=True,
        momentum=momentum,
        eps=eps,
        backend=backend,
    )


def problem(shape, dtype=torch.float32, residual=True):
    c = shape[1]
    tensors = {"x": (torch.randn(shape) * 2 + 1).to(dtype), "weight": torch.rand(c) + 0.5, "bias": torch.randn(c)}
    return tensors | ({"residual": torch.randn(shape).to(dtype)} if residual else {})


def as_scale(tensors):
    return {{"weight": "scale", "bias": "shift"}.get(name, name): t for name, t in tensors.items()}


def exact_problem(shape, dtype):
    """Half of a channel's values are mean - 1, the others mean + 1: variance 1, and with eps = 3, 1 / sqrt(4)."""
    n, c, h, w = shape
    signs = torch.tensor([-1.0, 1.0]).repeat(n * h * w // 2)
    x = torch.stack([signs[torch.randperm(len(signs))] for _ in range(c)]).view(c, n, h, w).transpose(0, 1)
    return {
        "x": (x + integers(c, low=-4, high=4).view(-1, 1, 1)).to(dtype),
        "weight": 2.0 ** integers(c, low=0, high=2),
        "bias": integers(c, low=-4, high=4),
        "residual": integers(*shape, low=-4, high=4, dtype=dtype),
    }


@backends
@dtypes()
@exact_planes
def test_bn_act_exact(shape, dtype, backend):
    tensors = exact_problem(shape, dtype)
    require(backend, "bn_act", tensors["x"])
    for act in EXACT_ACTS:
        truth, _ = run(eager_bn_act, tensors, None, torch.float64, act=act, eps=3.0)
        assert torch.equal(training(**tensors, act=act, eps=3.0, backend=backend), representable(truth, dtype)), act


@backends
@exact_planes
def test_bn_act_exact_gradients(shape, backend):
    tensors = exact_problem(shape, torch.float32)
    require(backend, "bn_act", tensors["x"])
    pre, _ = run(eager_bn_act, tensors, None, torch.float64, act="none", eps=3.0)
    grad = integers(*shape, low=-2, high=2) * (pre != 0) * (pre != 6)
    for act in EXACT_ACTS:
        _, truth = run(eager_bn_act, tensors, grad, torch.float64, act=act, eps=3.0)
        _, found = run(training, tensors, grad, act=act, eps=3.0, backend=backend)
        for name, gradient in found.items():
            assert torch.equal(gradient, representable(truth[name], tensors[name].dtype)), (act, name)


@backends
@dtypes()
@planes(without="two_values")  # of two values nothing but eps is left in the gradient of x: test_bn_act_exact_gradients
def test_bn_act_two_times(shape, dtype, backend):
    tensors = problem(shape, dtype)
    require(backend, "bn_act", tensors["x"])
    compare_with_eager(training, eager_bn_act, tensors, "relu", fused_options={"backend": backend})


@backends
@dtypes()
@acts
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_bn_act_two_times_every_act(act, residual, affine, dtype, backend):
    tensors = problem(PLANES["seventeen"], dtype, residual)
    if not affine:
        tensors |= {"weight": None, "bias": None}
    require(backend, "bn_act", tensors["x"])
    compare_with_eager(training, eager_bn_act, tensors, act, fused_options={"backend": backend})


@backends
@layouts
@acts
def test_bn_act_strides(layout, act, backend):
    """reliability.md, strides."""
    tensors = problem(PLANES["seventeen"])
    require(backend, "bn_act", tensors["x"])
    tensors |= {name: LAYOUTS[layout](tensors[name]) for name in ("x", "residual")}
    compare_with_eager(training, eager_bn_act, tensors, act, layout, {"backend": backend})


@backends
@dtypes(torch.float32, torch.bfloat16, torch.float16, torch.float64)
@planes()
def test_scale_act_exact(shape, dtype, backend):
    c = shape[1]
    tensors = {
        "x": integers(*shape, low=-8, high=8, dtype=dtype),
        "scale": 2.0 ** integers(c),
        "shift": integers(c, low=-4, high=4),
        "residual": integers(*shape, low=-4, high=4, dtype=dtype),
    }
    require(backend, "scale_act", tensors["x"])
    for act in EXACT_ACTS:
        truth, _ = run(eager_scale_act, tensors, None, torch.float64, act=act)
        assert torch.equal(scale_act(**tensors, act=act, backend=backend), representable(truth, dtype)), act


@backends
@dtypes()
@layouts
@acts
def test_scale_act_two_times(act, layout, dtype, backend):
    tensors = as_scale(problem(PLANES["sixty_four"], dtype))
    require(backend, "scale_act", tensors["x"])
    tensors |= {name: LAYOUTS[layout](tensors[name]) for name in ("x", "residual")}
    compare_with_eager(scale_act, eager_scale_act, tensors, act, layout, {"backend": backend})


@backends
@dtypes()
def test_bn_act_inference_two_times(dtype, backend):
    """Folded, batch norm in eval mode is as close to the truth as `torch.nn.functional.batch_norm`."""
    tensors = problem(PLANES["sixty_four"], dtype)
    require(backend, "scale_act", tensors["x"])
    mean, var = torch.randn(64), torch.rand(64) * 4 + 0.1

    def fused(x, weight, bias, residual, *, act):
        return bn_act(x, weight, bias, mean, var, residual=residual, act=act, backend=backend)

    def eager(x, weight, bias, residual, *, act):
        statistics = mean.to(weight.dtype), var.to(weight.dtype)
        return (
            F.relu(F.batch_norm(x, *statistics, weight, bias) + residual)
            if act == "relu"
            else (F.batch_norm(x, *statistics, weight, bias) + residual)
        )

    compare_with_eager(fused, eager, tensors, "relu")


@pytest.mark.parametrize("function", [training, scale_act], ids=["bn_act", "scale_act"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_bn_act_gradcheck(residual, act, function):
    tensors = problem((2, 3, 2, 3), torch.float64, residual)
    tensors = tensors if function is training else as_scale(tensors)
    leaves = [t.double().requires_grad_() for t in tensors.values()]

    def call(*args):
        return function(**dict(zip(tensors, args, strict=True)), act=act)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@backends
def test_scale_act_opcheck(backend):
    tensors = {name: t.requires_grad_() for name, t in problem((2, 17, 3, 4), torch.bfloat16).items()}
    require(backend, "scale_act", tensors["x"])
    x, weight, bias, residual = tensors.values()
    torch.library.opcheck(torch.ops.fused_resnet.scale_act.default, (x, weight, bias, residual, "silu", backend))


# --- reliability.md ---


@backends
@dtypes(torch.float32, torch.bfloat16)
def test_bn_variance_is_exact_at_two_values(dtype, backend):
    """Biased (1) for normalising, unbiased (2) for running_var."""
    x = torch.tensor([3.0, 5.0]).view(2, 1, 1, 1).to(dtype)
    require(backend, "bn_act", x)
    running = torch.zeros(1), torch.ones(1)
    y = training(x, act="none", running=running, momentum=1.0, eps=3.0, backend=backend)
    assert torch.equal(y.flatten(), torch.tensor([-0.5, 0.5]).to(dtype))
    assert running[0].item() == 4.0
    assert running[1].item() == 2.0


@backends
@planes()
def test_bn_running_statistics_two_times(shape, backend):
    x = torch.randn(shape) * 3 - 2
    require(backend, "bn_act", x)
    found, eager = ((torch.zeros(shape[1]), torch.ones(shape[1])) for _ in range(2))
    truth = torch.zeros(shape[1]).double(), torch.ones(shape[1]).double()
    training(x, act="relu", running=found, momentum=0.3, backend=backend)
    eager_bn_act(x, act="relu", running=eager, momentum=0.3)
    eager_bn_act(x.double(), act="relu", running=truth, momentum=0.3)
    for name, *values in zip(("running_mean", "running_var"), found, eager, truth, strict=True):
        assert_two_times(*values, name, "floor_ulps_moments")


@backends
@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e3, 1e4, 1e5, 1e6], ids="{:.0e}".format)
def test_bn_cancellation(ratio, backend):
    x = torch.randn(4, 17, 9, 7) + ratio * torch.linspace(-1, 1, 17).view(-1, 1, 1)
    require(backend, "bn_act", x)
    running = torch.zeros(17), torch.zeros(17)
    truth = eager_bn_act(x.double(), act="none")
    y = training(x, act="none", running=running, momentum=1.0, backend=backend)
    assert (y - truth).abs().max() <= tolerance("cancellation") * ulp(torch.float32, ratio) * truth.abs().max()
    error = (running[1] / x.double().var((0, 2, 3)) - 1).abs().max()
    assert error <= tolerance("cancellation") * ulp(torch.float32, ratio)


@backends
@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -1e4, 1e6], ids=str)
def test_bn_constant_channels(constant, backend):
    x, bias = torch.full((3, 5, 7, 3), constant), torch.arange(5.0)
    require(backend, "bn_act", x)
    running = torch.zeros(5), torch.zeros(5)
    y = training(x, None, bias, act="none", running=running, momentum=1.0, backend=backend)
    error = tolerance("cancellation") * ulp(torch.float32, abs(constant))
    assert (y - bias.view(-1, 1, 1)).abs().max() <= error / 1e-5**0.5
    assert (running[0] - constant).abs().max() <= error
    assert (running[1] >= 0).all()
    assert (running[1] <= error**2).all()


@backends
@dtypes()
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_bn_eps_zero_with_running_var_zero(mean, layout, dtype, backend):
    """Infinity and NaN where eager's kernels for dense tensors have them: scale and shift are infinite."""
    x = LAYOUTS[layout](torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 4).expand(2, 3, 4, 4).to(dtype))
    require(backend, "scale_act", x)
    mean, zero = torch.full((3,), mean), torch.zeros(3)
    y = bn_act(x, None, None, mean, zero, act="none", eps=0.0, backend=backend)
    assert torch.equal(y.nan_to_num(0.5), plain_batch_norm(x, mean, zero, eps=0.0).nan_to_num(0.5))


@backends
@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0])
def test_bn_eps(eps, backend):
    tensors = problem(PLANES["seventeen"])
    require(backend, "bn_act", tensors["x"])
    compare_with_eager(training, eager_bn_act, tensors, "relu", fused_options={"backend": backend}, eps=eps)
