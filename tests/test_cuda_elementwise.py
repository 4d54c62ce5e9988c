"""scale_act and add_act by the kernels of csrc/cuda: on a GPU, or thread by thread on the CPU."""

import pytest
import torch
from cuda_kernels import DEVICE, library, shapes
from problems import (
    EXACT_ACTS,
    PLANES,
    acts,
    compare_with_eager,
    dtypes,
    eager_add_act,
    eager_scale_act,
    integers,
    planes,
    poisoned,
    representable,
    run,
)
from tolerances import assert_two_times

from fused_resnet.backends.cuda import training

pytestmark = pytest.mark.skipif(bool(library()), reason=library() or "it is there")
poison = pytest.fixture(autouse=True)(poisoned)


class AddAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, act):
        y = training.add_act(x, residual, act)
        ctx.save_for_backward(y, x, residual)
        ctx.act = act
        return y

    @staticmethod
    def backward(ctx, grad):
        d_x = training.add_act_backward(grad, *ctx.saved_tensors, ctx.act)
        return d_x, d_x, None


@dtypes()
@shapes
def test_cuda_scale_act_exact(shape, dtype):
    c = shape[1]
    tensors = {
        "x": integers(*shape, low=-8, high=8, dtype=dtype).to(DEVICE),
        "scale": (2.0 ** integers(c)).to(DEVICE),
        "shift": integers(c, low=-4, high=4).to(DEVICE),
    }
    for residual in (None, integers(*shape, low=-4, high=4, dtype=dtype).to(DEVICE)):
        for act in EXACT_ACTS:
            truth, _ = run(eager_scale_act, tensors | {"residual": residual}, None, torch.float64, act=act)
            found = training.scale_act(*tensors.values(), residual, act)
            assert torch.equal(found, representable(truth, dtype)), act


@dtypes()
@acts
def test_cuda_scale_act_two_times(act, dtype):
    shape = PLANES["sixty_four"]
    x, residual = ((torch.randn(shape) * 2 + 1).to(DEVICE, dtype) for _ in range(2))
    vectors = (torch.rand(shape[1]) + 0.5).to(DEVICE), torch.randn(shape[1]).to(DEVICE)
    named = dict(zip(("x", "scale", "shift", "residual"), (x, *vectors, residual), strict=True))
    truth, plain = (run(eager_scale_act, named, None, to, act=act)[0] for to in (torch.float64, None))
    assert_two_times(training.scale_act(**named, act=act), plain, truth)


@dtypes()
@acts
@planes()
def test_cuda_add_act_two_times(shape, act, dtype):
    tensors = {name: (torch.randn(shape) * 3).to(DEVICE, dtype) for name in ("x", "residual")}
    compare_with_eager(lambda x, residual, act: AddAct.apply(x, residual, act), eager_add_act, tensors, act)
