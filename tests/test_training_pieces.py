"""Training where a block does not run whole: frozen parts, hooks on parts, and under torch.compile."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import seeded
from problems import poisoned
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from training_steps import (
    BLOCKS,
    Operators,
    assert_close,
    assert_identical,
    block_of,
    blocks,
    eager,
    images,
    loss_of,
    results,
)

import fused_resnet as fr
from fused_resnet.backends import reference
from fused_resnet.modules import unit

poison = pytest.fixture(autouse=True)(poisoned)


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


# --- freezing ---------------------------------------------------------------------------------------------------------


@blocks
def test_frozen_batch_norms(make):
    """Twice, with a step of the convolutions between: what was derived from their weights is not used again."""
    module, x = block_of(make), images()
    for name, child in module.named_modules():  # the projection's is PyTorch's, which has no flag
        if name == "downsample.1":
            module.downsample[1] = fr.modules.BatchNorm2d(child.num_features).double()
    fr.freeze_batch_norm(module.eval()).train()
    before = [b.clone() for b in module.buffers()]
    for _ in range(2):
        wanted = eager(module, x)
        assert_close(results(module, x), wanted)
        torch.optim.SGD(module.parameters(), lr=1e-3).step()
    assert_identical(list(module.buffers()), before)
    assert all(bn.weight.grad is None for bn in norms(module))
    wanted = eager(fr.freeze_batch_norm(module, False).train(), x)
    with Operators() as operators:
        assert_close(results(module, x), wanted)
    assert operators.blocks() == 1


@blocks
def test_one_batch_norm_in_eval_mode(make):
    """Each in turn: the block runs layer by layer, and as one operator again afterwards."""
    module, x = block_of(make), images()
    for bn in norms(module):
        bn.eval()
        wanted, before = eager(module, x), bn.running_mean.clone()
        with Operators() as operators:
            assert_close(results(module, x), wanted)
        assert operators.blocks() == len(norms(module)) - 1
        assert torch.equal(bn.running_mean, before)
        bn.train()
        with Operators() as operators:
            module(x)
        assert operators.blocks() == 1


# Which parameters of a bottleneck train, whether x needs a gradient, and for each convolution that has to be asked,
# from the last to the first, whether its input's and its weight's gradients are.
PARTIAL = {
    "all_but_x": ("", False, [(True, True), (True, True), (False, True)]),
    "first_convolution_frozen": ("bn conv2 conv3", False, [(True, True), (True, True)]),
    "last_convolution": ("conv3", False, [(False, True)]),
    "batch_norms": ("bn", False, [(True, False), (True, False)]),
    "last_batch_norm": ("bn3", False, []),
    "input_alone": ("none", True, [(True, False)] * 3),
}


@pytest.mark.parametrize(("trained", "of_x", "asked"), PARTIAL.values(), ids=PARTIAL.keys())
def test_frozen_weights_cost_nothing(trained, of_x, asked, monkeypatch):
    module, x, found = block_of(BLOCKS["bottleneck"]), images().requires_grad_(of_x), []
    for name, p in module.named_parameters():
        p.requires_grad_(name.startswith(tuple(trained.split())) if trained else True)
    plain, convolution_backward = copy.deepcopy(module), reference.convolution_backward

    def noted(*args):
        found.append(args[6])
        return convolution_backward(*args)

    monkeypatch.setattr(reference, "convolution_backward", noted)
    with fr.use_backend("reference"):
        loss_of(module(x)).backward()
    assert found == [(d_x, d_weight, False) for d_x, d_weight in asked]
    d_x, x.grad = x.grad, None
    with unit.unfused():
        loss_of(plain(x)).backward()
    assert_close([d_x, *[p.grad for p in module.parameters()]], [x.grad, *[p.grad for p in plain.parameters()]])


@blocks
def test_nothing_to_train(make):
    module = block_of(make).requires_grad_(False)
    assert not module(images()).requires_grad
    assert all(bn.num_batches_tracked == 1 for bn in norms(module))


# --- hooks ------------------------------------------------------------------------------------------------------------

# Each changes what passes, so that a hook that is not heard shows.
HOOKS = {
    "forward_pre": lambda module, args: (args[0] * 1.5,),
    "forward": lambda module, args, y: y * 1.5,
    "full_backward_pre": lambda module, grads: (grads[0] * 1.5,),
    "full_backward": lambda module, grads, _: tuple(None if g is None else g * 1.5 for g in grads),
}
hooks = pytest.mark.parametrize("kind", HOOKS)


def hook(module, kind):
    calls = []

    def called(*args):
        calls.append(kind)
        return HOOKS[kind](*args)

    return calls, getattr(module, f"register_{kind}_hook")(called)


@blocks
@hooks
def test_hook_on_a_block(kind, make):
    """It is heard once, and the block stays one operator."""
    module, x = block_of(make), images()
    plain = copy.deepcopy(module)
    hook(plain, kind)
    calls, handle = hook(module, kind)
    with unit.unfused():
        wanted = results(plain, x)
    with Operators() as operators:
        assert_close(results(module, x), wanted)
    assert len(calls) == operators.blocks() == 1
    handle.remove()
    module(x)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["conv1", "bn1", "conv2", "bn3", "downsample", "downsample.0", "downsample.1"])
@hooks
def test_hook_inside_a_block(kind, name):
    """The piece runs by itself and is heard once; everything is as in eager. Without the hook, one operator again."""
    module, x = block_of(BLOCKS["bottleneck_projected"]), images()
    plain = copy.deepcopy(module)
    hook(plain.get_submodule(name), kind)
    calls, handle = hook(module.get_submodule(name), kind)
    with unit.unfused():
        wanted = results(plain, x)
    assert_close(results(module, x), wanted)
    assert len(calls) == 1
    handle.remove()
    with Operators() as operators:
        module(x)
    assert operators.blocks() == 1


@blocks
def test_parametrized_weight(make):
    module, x = block_of(make), images()
    weight_norm(module.conv2)
    wanted = eager(module, x)
    assert_close(results(module, x), wanted)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_steps(backend):
    """Two steps of ResNet-18, forward pass and loss as one graph: loss, gradients, statistics and weights."""
    model = seeded(fr.resnet18, num_classes=10).double().train()
    other = copy.deepcopy(model)
    x, labels = torch.randn(4, 3, 32, 32, dtype=torch.double), torch.randint(10, (4,))
    states = []
    for network in (model, other):

        def loss_of_images(x, network=network):
            return F.cross_entropy(network(x), labels)

        run = loss_of_images if network is model else torch.compile(loss_of_images, fullgraph=True, backend=backend)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            losses.append(run(x))
            losses[-1].backward()
            optimizer.step()
        tensors = [*losses, *[p.grad for p in network.parameters()], *network.parameters(), *network.buffers()]
        states.append([t.detach().double() for t in tensors])
    assert_close(states[1], states[0])
    torch.compiler.reset()
