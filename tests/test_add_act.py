"""add_act: exactness, the two-times rule, gradients and layouts."""

import pytest
import torch
from problems import (
    EXACT_ACTS,
    LAYOUTS,
    PLANES,
    acts,
    backends,
    compare_with_eager,
    dtypes,
    eager_add_act,
    integers,
    layouts,
    planes,
    poisoned,
    representable,
    require,
    run,
)

from fused_resnet.ops import add_act

poison = pytest.fixture(autouse=True)(poisoned)


def problem(shape, dtype=torch.float32):
    return {"x": (torch.randn(shape) * 3).to(dtype), "residual": (torch.randn(shape) * 3).to(dtype)}


@backends
@dtypes(torch.float32, torch.bfloat16, torch.float16, torch.float64)
@planes()
def test_add_act_exact(shape, dtype, backend):
    tensors = {name: integers(*shape, low=-8, high=8, dtype=dtype) for name in ("x", "residual")}
    require(backend, "add_act", tensors["x"])
    grad = integers(*shape, low=-8, high=8, dtype=dtype)
    for act in EXACT_ACTS:
        truth, true_grads = run(eager_add_act, tensors, grad, torch.float64, act=act)
        out, grads = run(add_act, tensors, grad, act=act, backend=backend)
        assert torch.equal(out, representable(truth, dtype)), act
        for name, found in grads.items():  # also at the kinks: aten's own choice there
            assert torch.equal(found, representable(true_grads[name], dtype)), (act, name)


@backends
@dtypes()
@acts
@planes()
def test_add_act_two_times(shape, act, dtype, backend):
    tensors = problem(shape, dtype)
    require(backend, "add_act", tensors["x"])
    compare_with_eager(add_act, eager_add_act, tensors, act, fused_options={"backend": backend})


@backends
@layouts
@acts
@pytest.mark.parametrize("residual_layout", ["channels_last", "sliced"])
def test_add_act_strides(residual_layout, act, layout, backend):
    """reliability.md, strides: the two inputs may differ in layout."""
    tensors = problem(PLANES["seventeen"])
    require(backend, "add_act", tensors["x"])
    tensors = {"x": LAYOUTS[layout](tensors["x"]), "residual": LAYOUTS[residual_layout](tensors["residual"])}
    compare_with_eager(add_act, eager_add_act, tensors, act, layout, {"backend": backend})


@backends
@acts
def test_add_act_of_a_tensor_with_itself(act, backend):
    x = torch.randn(2, 17, 5, 3)
    require(backend, "add_act", x)
    before = x.clone()
    out, grads = run(
        lambda x, **options: add_act(x, x, **options), {"x": x}, torch.ones(x.shape), act=act, backend=backend
    )
    wanted, wanted_grads = run(lambda x, act: eager_add_act(x, x, act=act), {"x": x}, torch.ones(x.shape), act=act)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(grads["x"], wanted_grads["x"])
    assert torch.equal(x, before)


@acts
def test_add_act_gradcheck(act):
    leaves = [t.requires_grad_() for t in problem((2, 3, 2, 3), torch.float64).values()]
    assert torch.autograd.gradcheck(lambda x, r: add_act(x, r, act=act), leaves)
    assert torch.autograd.gradgradcheck(lambda x, r: add_act(x, r, act=act), leaves, fast_mode=True)


@backends
@pytest.mark.parametrize(
    ("act", "dtype"), [("relu", torch.float32), ("silu", torch.bfloat16)], ids=["relu", "silu_bf16"]
)
def test_add_act_opcheck(act, dtype, backend):
    ops = torch.ops.fused_resnet
    x, residual = (t.requires_grad_() for t in problem((2, 17, 3, 4), dtype).values())
    require(backend, "add_act", x)
    torch.library.opcheck(ops.add_act.default, (x, residual, act, backend))
    x, residual = x.detach(), residual.detach()
    y = ops.add_act(x, residual, act, backend)
    saved = (x, residual) if act == "silu" else (None, None)
    args = (torch.randn(y.shape).to(dtype), y, *saved, act, backend)
    torch.library.opcheck(ops.add_act_backward.default, args)
