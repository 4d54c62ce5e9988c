"""Fused networks under torch.func and forward-mode derivatives, where they compute as plain PyTorch, and in graphs."""

import pytest
import torch
from graph_double import assert_is_model, logged
from networks import batch_norms, largest
from problems import poisoned
from stack_networks import images, own, pair
from tolerances import tolerance
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jvp, stack_module_state, vmap
from training_steps import Operators

import fused_resnet as fr
from fused_resnet.modules import unit

poison = pytest.fixture(autouse=True)(poisoned)
log = pytest.fixture(logged)


def state(model):
    return dict(model.named_parameters()), dict(model.named_buffers())


def loss(model, parameters, buffers, x):
    return functional_call(model, (parameters, buffers), (x,)).square().sum()


def gradients(model, x):
    parameters, buffers = state(model)
    return grad(lambda p: loss(model, p, buffers, x))(parameters)


def per_image(model, x):
    parameters, buffers = state(model)
    return vmap(grad(lambda p, x: loss(model, p, buffers, x[None])), (None, 0))(parameters, x)


def tangent(model, x):
    return jvp(model, (x,), (torch.ones_like(x),))


def dual(model, x):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))))


def jacobian(model, x):
    return jacfwd(lambda corner: model(torch.cat([torch.cat([corner, x[..., :2, 2:]], 3), x[..., 2:, :]], 2)))(
        x[..., :2, :2]
    )


def over_groups(model, x):
    return vmap(model)(torch.stack([x, 2 * x]))


def hessian_product(model, x):
    return jvp(lambda x: grad(lambda x: model(x).square().sum())(x), (x,), (torch.ones_like(x),))


TRANSFORMS = [gradients, per_image, tangent, dual, jacobian, over_groups, hessian_product]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("wants_grad", [True, False], ids=["grad", "no_grad"])
def test_transform_eval(transform, wants_grad):
    """Bit by bit what the plain network gives."""
    plain, fused = pair(own)
    x = images()
    with torch.set_grad_enabled(wants_grad):
        found, expected = transform(fused, x), transform(plain, x)
    assert_identical(found, expected)


def assert_identical(found, expected):
    found, expected = (torch.utils._pytree.tree_leaves(value) for value in (found, expected))
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(b.count_nonzero() for b in expected)


def test_ensemble():
    """vmap over the parameters of several networks."""
    pairs = [pair(own) for _ in range(3)]
    parameters, buffers = stack_module_state([fused for _, fused in pairs])
    x, fused = images(), pairs[0][1]
    with torch.no_grad():
        found = vmap(lambda p, b: functional_call(fused, (p, b), (x,)))(parameters, buffers)
        assert largest(found, torch.stack([plain(x) for plain, _ in pairs])) < tolerance("model_eval_fp32")


def test_functional_call_is_fused():
    """With other parameters, without a transform: by the operators, and with their gradients."""
    plain, fused = pair(own)
    parameters, buffers = ({k: 1.25 * v.detach() for k, v in found.items()} for found in state(plain))
    tensors = [t.requires_grad_() for t in parameters.values()]
    x = images()
    expected = loss(plain, parameters, buffers, x)
    with Operators() as seen:
        found = loss(fused, parameters, buffers, x)
    assert "fused_resnet::conv_scale_act" in seen.names
    assert largest(found, expected) < tolerance("model_eval_fp32")
    for a, b in zip(torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors), strict=True):
        assert largest(a, b) < tolerance("model_eval_fp32")


def without_statistics(model):
    for bn in batch_norms(model):
        bn.running_mean = bn.running_var = bn.num_batches_tracked = None
        bn.track_running_stats = False
    return model


def test_training_under_a_transform_is_refused_as_by_pytorch():
    """Running statistics cannot be written there; without them it is right."""
    plain, fused = pair(own, training=True)
    for model in (plain, fused):
        with pytest.raises(RuntimeError, match="in-place operation"):
            gradients(model, images())
        without_statistics(model)
    x = images()
    assert_identical(gradients(fused, x), gradients(plain, x))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batched_backward_is_refused(training):
    """Several gradients of one fused forward at once, by the vmap that autograd has of its own."""
    _, fused = pair(own, training)
    with pytest.raises(NotImplementedError, match=r"one gradient at a time, .* fused_resnet.unfuse\(model\)"):
        torch.autograd.functional.jacobian(fused, images(), vectorize=True)
    assert torch.autograd.functional.jacobian(fr.unfuse(fused), images(), vectorize=True).count_nonzero()


# --- modules and operators of this package ---


def test_transforms_of_modules_of_this_package():
    block, x = fr.BasicBlock(8, 8).eval(), torch.randn(2, 8, 6, 6)
    with unit.unfused():
        expected = tangent(block, x), gradients(block, x)
    assert_identical((tangent(block, x), gradients(block, x)), expected)


def test_transforms_of_lean_blocks():
    """Which are computed again in the backward pass elsewhere, by a means that torch.func does not know."""
    block, x = without_statistics(fr.BasicBlock(8, 8)).train(), torch.randn(2, 8, 6, 6)
    expected = gradients(block, x)
    block.lean = True
    assert_identical(gradients(block, x), expected)


def test_operators_refuse_derivatives_of_transforms():
    """They have a backward for autograd alone: no zeros instead of a derivative."""
    x, one = torch.randn(2, 8, 6, 6), torch.ones(8)
    message = r"fused_resnet::scale_act has no rule for torch.func .* fused_resnet.unfuse\(model\)"

    def run(x):
        return fr.ops.scale_act(x, one, one)

    for transform in (lambda: jvp(run, (x,), (x,)), lambda: grad(lambda x: run(x).sum())(x), lambda: dual(run, x)):
        with pytest.raises(NotImplementedError, match=message):
            transform()
    assert torch.equal(vmap(run)(torch.stack([x, 2 * x]))[1], run(2 * x))


# --- graphs ---


def test_graph_of_a_fused_network(log):
    """It is captured once, replayed, and captured again when a weight has changed."""
    plain, fused = pair(own)
    x = images()
    graphed = fr.graph(fused, x)
    assert_is_model(graphed, x, plain)
    assert_is_model(graphed, 2 * x, plain)
    assert log == ["capture", "replay", "replay"]
    for model in (plain, fused):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    assert_is_model(graphed, x, plain)
    assert log == ["capture", "replay", "replay", "capture", "replay"]
