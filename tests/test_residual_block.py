"""residual_block: every form of a block beside eager, in training; what it keeps, what it computes, what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from problems import ACT_FUNCTIONS, ACTS, BACKEND_NAMES, backends, compare_with_eager, dtypes, poisoned, require, run
from tolerances import tolerance
from torch.utils._pytree import tree_map_only

from fused_resnet.backends import reference
from fused_resnet.ops import Unit, block, residual_block

poison = pytest.fixture(autouse=True)(poisoned)

BLOCK = {"floor": "floor_ulps_block"}

POOL = ((3, 3), (2, 2), (1, 1))

# Channels of the input; of each convolution its output's channels, kernel, stride and groups; the shortcut.
FORMS = {
    "basic": (12, [(12, 3, 1, 1), (12, 3, 1, 1)], "input"),
    "basic_projected": (8, [(16, 3, 2, 1), (16, 3, 1, 1)], "projected"),
    "bottleneck": (32, [(8, 1, 1, 1), (8, 3, 1, 1), (32, 1, 1, 1)], "input"),
    "bottleneck_projected": (16, [(8, 1, 1, 1), (8, 3, 2, 1), (32, 1, 1, 1)], "projected"),
    "bottleneck_grouped": (16, [(8, 1, 1, 1), (8, 3, 1, 4), (16, 1, 1, 1)], "input"),
    "given": (6, [(10, 3, 1, 1), (7, 1, 1, 1)], "given"),
    "inverted": (8, [(24, 1, 1, 1), (24, 3, 1, 24), (8, 1, 1, 1)], "input"),
    "plain": (5, [(9, 3, 1, 1), (17, 3, 2, 1)], ""),
    "stem": (3, [(16, 7, 2, 1)], "pool"),
}
forms = pytest.mark.parametrize("form", FORMS)


def problem(form, dtype=torch.float32, size=(3, 9, 8)):
    """The tensors of a form by name, and its acts: those before the last one relu, or relu6 in an inverted residual."""
    channels, convs, shortcut = FORMS[form]
    n, h, w = size
    tensors = {"x": torch.randn(n, channels, h, w).to(dtype)}
    before = channels
    layers = list(enumerate(convs))
    if shortcut == "projected":
        strides = torch.Size(c[2] for c in convs).numel()
        layers.append((len(convs), (convs[-1][0], 1, strides, 1)))
    for i, (k, kernel, _, groups) in layers:
        c = channels if i == len(convs) else before
        weight = torch.randn(k, c // groups, kernel, kernel) / (c // groups * kernel**2) ** 0.5
        tensors |= {f"weight{i}": weight.to(dtype), f"bn_weight{i}": torch.rand(k) + 0.5, f"bn_bias{i}": torch.randn(k)}
        before = k
    if shortcut == "given":
        tensors["residual"] = torch.randn(n, before, h, w).to(dtype)
    return tensors


def units(form, tensors, act, inner):
    _, convs, shortcut = FORMS[form]
    strides = torch.Size(c[2] for c in convs).numel()
    geometry = [(kernel, stride, groups) for _, kernel, stride, groups in convs]
    if shortcut == "projected":
        geometry.append((1, strides, 1))
    found = []
    for i, (kernel, stride, groups) in enumerate(geometry):
        last = i == len(convs) - 1
        found.append(
            Unit(
                tensors[f"weight{i}"],
                tensors[f"bn_weight{i}"],
                tensors[f"bn_bias{i}"],
                stride=stride,
                padding=kernel // 2,
                groups=groups,
                act=act if last else "none" if i == len(convs) else inner,
            )
        )
    return (found[:-1], found[-1]) if shortcut == "projected" else (found, None)


def fused(form, *, act, inner="relu", lean=False, backend=None, **tensors):
    row, projection = units(form, tensors, act, inner)
    shortcut = FORMS[form][2]
    return residual_block(
        tensors["x"], row, residual=tensors.get("residual"), projection=projection, add_input=shortcut == "input",
        max_pool=POOL if shortcut == "pool" else (), lean=lean, backend=backend,
    )  # fmt: skip


def eager(form, *, act, inner="relu", **tensors):
    row, projection = units(form, tensors, act, inner)

    def unit(x, u):
        z = F.conv2d(x, u.weight, None, u.stride, u.padding, 1, u.groups)
        return F.batch_norm(z, None, None, u.bn_weight, u.bn_bias, True)

    y = tensors["x"]
    for u in row[:-1]:
        y = ACT_FUNCTIONS[u.act](unit(y, u))
    y = unit(y, row[-1])
    shortcut = FORMS[form][2]
    if shortcut == "projected":
        y = y + unit(tensors["x"], projection)
    elif shortcut in ("input", "given"):
        y = y + tensors["x" if shortcut == "input" else "residual"]
    y = ACT_FUNCTIONS[act](y)
    return F.max_pool2d(y, *POOL) if shortcut == "pool" else y


def of(function, form):
    return lambda **options: function(form, **options)


@backends
@dtypes()
@forms
def test_residual_block_exact_at_zero_gradient(form, dtype, backend):
    """No gradient arrives, none leaves: nothing of what a kernel has not written gets into a gradient."""
    tensors = problem(form, dtype)
    require(backend, "bn_act", tensors["x"])
    grad = torch.zeros(eager(form, act="relu", **tensors).shape, dtype=dtype)
    _, found = run(of(fused, form), tensors, grad, act="relu", backend=backend)
    assert set(found) == set(tensors)
    assert all((gradient == 0).all() for gradient in found.values())


@backends
@dtypes()
@forms
def test_residual_block_two_times(form, dtype, backend):
    """With smooth activations inside: what is rounded to the other side of a kink there has another gradient."""
    if form == "stem" and dtype != torch.float32:
        pytest.skip("neighbours that round to one value share the gradient of a pooling as they like")
    tensors = problem(form, dtype)
    require(backend, "bn_act", tensors["x"])
    options = {"fused_options": {"backend": backend}, "inner": "silu", "dtype": dtype, **BLOCK}
    compare_with_eager(of(fused, form), of(eager, form), tensors, "none" if form == "stem" else "relu", **options)


@backends
@forms
def test_residual_block_two_times_relu(form, backend):
    tensors = problem(form)
    require(backend, "bn_act", tensors["x"])
    compare_with_eager(of(fused, form), of(eager, form), tensors, "relu6", fused_options={"backend": backend}, **BLOCK)


@backends
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", ["basic", "bottleneck_projected", "given", "plain"])
def test_residual_block_every_act(form, act, backend):
    tensors = problem(form)
    require(backend, "bn_act", tensors["x"])
    inner = "silu" if act == "none" else act  # a shift before a 1x1 convolution and a batch norm has no gradient
    compare_with_eager(
        of(fused, form), of(eager, form), tensors, act, fused_options={"backend": backend}, inner=inner, **BLOCK
    )


@backends
@forms
@dtypes(torch.float32, torch.bfloat16)
def test_residual_block_lean_is_the_same(form, dtype, backend):
    tensors = problem(form, dtype)
    require(backend, "bn_act", tensors["x"])
    grad = torch.randn(eager(form, act="relu", **tensors).shape).to(dtype)
    y, found = run(of(fused, form), tensors, grad, act="relu", backend=backend)
    lean, lean_found = run(of(fused, form), tensors, grad, act="relu", backend=backend, lean=True)
    assert torch.equal(lean, y)
    for name, gradient in found.items():
        bound = tolerance("other_backend") * gradient.abs().max() if dtype == torch.float32 else 0
        assert (lean_found[name] - gradient).abs().max() <= bound, name


@forms
@pytest.mark.parametrize("act", ["none", "silu"])
def test_residual_block_gradcheck(form, act):
    tensors = problem(form, torch.float64, (2, 4, 3))
    leaves = [t.double().requires_grad_() for t in tensors.values()]

    def call(*args):
        return fused(form, act=act, inner="silu", **dict(zip(tensors, args, strict=True)))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@forms
@pytest.mark.parametrize("act", ["relu", "hardswish"])
def test_residual_block_second_derivative(form, act):
    tensors = problem(form, torch.float64)
    found = []
    for function in (fused, eager):
        leaves = {name: t.double().requires_grad_() for name, t in tensors.items()}
        y = function(form, act=act, **leaves)
        first = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values())))
    for name, ours, theirs in zip(tensors, *found, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


NEEDS = {
    "x": ["x"],
    "last weight": ["weight1"],
    "first weight": ["weight0"],
    "norms": ["bn_weight0", "bn_bias1"],
    "last norm": ["bn_bias1"],
    "projection": ["weight2"],
    "projection's norm": ["bn_weight2"],
}


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("form", ["basic", "basic_projected"])
def test_residual_block_only_the_gradients_that_are_needed(form, needs, monkeypatch):
    tensors = problem(form)
    names = [name for name in NEEDS[needs] if name in tensors]
    if not names:
        pytest.skip("no projection")
    asked, original = [], reference.convolution_backward

    def record(grad, x, norm, act, weight, args, needed, residual):
        asked.append(sum(needed))
        return original(grad, x, norm, act, weight, args, needed, residual)

    monkeypatch.setattr(reference, "convolution_backward", record)
    grad = torch.randn(eager(form, act="relu", **tensors).shape)
    _, everything = run(of(fused, form), tensors, grad, act="relu", backend="reference")
    asked.clear()
    leaves = {name: t.clone().requires_grad_(name in names) for name, t in tensors.items()}
    y = fused(form, act="relu", backend="reference", **leaves)
    found = torch.autograd.grad(y, [leaves[name] for name in names], grad)
    for name, gradient in zip(names, found, strict=True):
        assert torch.equal(gradient, everything[name])
    products = {  # of the convolutions whose gradients lie on the way
        "x": 2 + (form == "basic_projected"), "last weight": 1, "first weight": 2, "norms": 1, "last norm": 0,
        "projection": 1, "projection's norm": 0,
    }  # fmt: skip
    assert sum(asked) == products[needs]


def test_residual_block_keeps_the_convolutions_outputs_alone():
    tensors = {name: t.requires_grad_() for name, t in problem("bottleneck").items()}
    given = {t.data_ptr() for t in tensors.values()}
    for lean, planes in ((False, 8 + 8 + 32 + 32), (True, 8 + 8 + 32)):  # z1, z2, z3 and the output
        saved = {}

        def keep(t, saved=saved):
            return saved.setdefault(t.data_ptr(), t)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            fused("bottleneck", act="relu", lean=lean, backend="reference", **tensors)
        maps = sum(t.shape[1] for at, t in saved.items() if t.dim() == 4 and at not in given)
        assert maps == planes


@backends
@forms
def test_residual_block_of_no_images(form, backend):
    tensors = problem(form)
    require(backend, "bn_act", tensors["x"])
    tensors |= {name: tensors[name][:0] for name in ("x", "residual") if name in tensors}
    y, found = run(of(fused, form), tensors, eager(form, act="relu", **problem(form))[:0], act="relu", backend=backend)
    assert y.shape[0] == 0
    assert y.shape[1:] == eager(form, act="relu", **problem(form)).shape[1:]
    assert all((g == 0).all() for g in found.values())
    assert len({g.data_ptr() for name, g in found.items() if "bn" in name}) == sum("bn" in name for name in found)


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu") if name in BACKEND_NAMES])
@pytest.mark.parametrize(
    ("form", "dtype", "lean"),
    [
        ("basic", torch.float32, False), ("bottleneck_projected", torch.bfloat16, True), ("stem", torch.float32, False),
        ("given", torch.float32, False),
    ],
    ids=["basic", "bottleneck_projected_lean_bf16", "stem", "given"],
)  # fmt: skip
def test_block_opcheck(form, dtype, lean, backend, monkeypatch):
    """`fused_resnet::block` and `block_backward`, as compiled code calls them."""
    tensors = {name: t.requires_grad_() for name, t in problem(form, dtype).items()}
    require(backend, "bn_act", tensors["x"])
    calls = {}

    def record(name, *args):
        calls[name] = tree_map_only(torch.Tensor, torch.Tensor.detach, list(args))
        return getattr(torch.ops.fused_resnet, name)(*args)

    monkeypatch.setattr(block, "call", record)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # no tensors whose sizes only the backend knows
    y = fused(form, act="none" if form == "given" else "silu", lean=lean, backend=backend, **tensors)
    monkeypatch.undo()
    monkeypatch.setattr(block, "call", record)
    y.backward(torch.randn_like(y))
    monkeypatch.undo()
    forward = calls["block"]
    forward[0].requires_grad_()
    torch.library.opcheck(torch.ops.fused_resnet.block.default, tuple(forward))
    torch.library.opcheck(torch.ops.fused_resnet.block_backward.default, tuple(calls["block_backward"]))


ERRORS = {
    "no units": ({"units": []}, "one batch norm, or convolutions"),
    "two without weights": ({"units": [Unit(None), Unit(None)]}, "one batch norm, or convolutions"),
    "channels": ({"units": [Unit(torch.ones(4, 5, 1, 1))]}, "x has 3 channels"),
    "inner channels": ({"units": [Unit(torch.ones(4, 3, 1, 1)), Unit(torch.ones(4, 5, 1, 1))]}, "x has 4 channels"),
    "too small": ({"units": [Unit(torch.ones(4, 3, 1, 1), stride=3), Unit(torch.ones(4, 4, 3, 3))]}, "too small"),
    "bn": ({"units": [Unit(torch.ones(4, 3, 1, 1), torch.ones(3))]}, r"bn_weight must have shape \(4,\)"),
    "statistics": (
        {"units": [Unit(torch.ones(4, 3, 1, 1), running_mean=torch.ones(4))]},
        "running_mean and running_var",
    ),
    "act": ({"units": [Unit(torch.ones(4, 3, 1, 1), act="tanh")]}, "unknown act 'tanh'"),
    "eps": ({"units": [Unit(torch.ones(4, 3, 1, 1), eps=0.0)]}, "eps must be positive"),
    "same": (
        {"units": [Unit(torch.ones(4, 3, 1, 1)), Unit(torch.ones(4, 4, 2, 2), padding="same")]},
        "padding='same' of an even kernel",
    ),
    "input": ({"add_input": True}, r"cannot be added to \(2, 4, 5, 5\)"),
    "residual": ({"residual": torch.ones(2, 4, 5, 4)}, "residual must have the output's shape"),
    "projection": ({"projection": Unit(torch.ones(4, 3, 1, 1), stride=2)}, r"the projection gives \(2, 4, 3, 3\)"),
    "both": ({"add_input": True, "residual": torch.ones(2, 4, 5, 5)}, "give one of"),
    "no convolution": ({"units": [Unit(None)], "add_input": True}, "takes no projection and no add_input"),
    "pool's parts": ({"max_pool": (3, 2)}, "must be kernel, stride and padding"),
    "pool's padding": ({"max_pool": (2, 2, 2)}, "padding may be half its kernel"),
    "pool's taps": ({"max_pool": (17, 1, 8)}, "of 256 taps at most"),
    "pool's map": ({"max_pool": ((3, 7), (1, 1), (0, 0))}, "too small for a max_pool"),
    "pool": ({"max_pool": POOL, "residual": torch.ones(2, 4, 5, 5)}, "give one of"),
    "one value": ({"x": torch.ones(1, 3, 1, 1)}, "more than 1 value per channel"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_residual_block_refuses(error):
    changes, message = ERRORS[error]
    arguments = {"x": torch.ones(2, 3, 5, 5), "units": [Unit(torch.ones(4, 3, 1, 1))]} | changes
    with pytest.raises(ValueError, match=message):
        residual_block(arguments.pop("x"), arguments.pop("units"), **arguments)
    with pytest.raises(TypeError, match=r"weight is torch\.float16, but x is torch\.float32"):
        residual_block(torch.ones(2, 3, 5, 5), [Unit(torch.ones(4, 3, 1, 1).half())])


def test_residual_block_second_derivative_of_a_tensor_that_is_two_inputs():
    x, weight = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(4, 4, 3, 3, dtype=torch.float64)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    unit = Unit(weight, padding=1, act="silu")

    def eager():
        y = F.silu(F.batch_norm(F.conv2d(x, weight, padding=1), None, None, training=True))
        return F.silu(F.batch_norm(F.conv2d(y, weight, padding=1), None, None, training=True) + 2 * x)

    found = []
    for y in (residual_block(x, [unit, unit], residual=2 * x), eager()):
        first = torch.autograd.grad(y.square().sum(), [x, weight], create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [x, weight])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
