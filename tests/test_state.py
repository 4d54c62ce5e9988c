"""State of the modules: derived weights are never stale, a step counts once, an error leaves everything as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from problems import BACKEND_NAMES, LAYOUTS, poisoned, randomised
from tolerances import assert_two_times
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from fused_resnet.backends.selection import BACKENDS

poison = pytest.fixture(autouse=True)(poisoned)

MODULES = {
    "conv": lambda: fr.ConvBNAct2d(8, 8, 3),
    "conv_bias": lambda: fr.ConvBNAct2d(8, 8, 3, bias=True),
    "bn": lambda: fr.BNAct2d(8),
    "block": lambda: fr.BasicBlock(8, 8),
    "inside_sequential": lambda: nn.Sequential(fr.ConvBNAct2d(8, 8, 3), fr.Bottleneck(8, 2)),
}
modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


def plain(module, x):
    """What the module's parameters and buffers say now, in plain PyTorch."""
    if isinstance(module, nn.Sequential):
        for child in module:
            x = plain(child, x)
        return x
    if isinstance(module, fr.BNAct2d):
        return F.relu(nn.BatchNorm2d.forward(module, x))
    if isinstance(module, fr.ConvBNAct2d):
        return F.relu(module.bn(module.conv(x)))
    pairs = [(module.conv1, module.bn1), (module.conv2, module.bn2)]
    pairs += [(module.conv3, module.bn3)] if isinstance(module, fr.Bottleneck) else []
    y = x
    for i, (conv, bn) in enumerate(pairs):
        y = F.relu(bn(conv(y)) + (x if i == len(pairs) - 1 else 0))
    return y


def assert_fresh(module, x):
    with torch.no_grad():
        truth = plain(copy.deepcopy(module).double().eval(), x.double())
        assert_two_times(module(x), plain(copy.deepcopy(module).eval(), x), truth)


def load_state_dict(module, x):
    module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()})


def optimizer_step(module, x):
    module.train()
    with torch.enable_grad():
        module(x).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=1e-3).step()
    module.eval()


def optimizer_step_in_eval(module, x):
    with torch.enable_grad():
        module(x).square().sum().backward()
    torch.optim.Adam(module.parameters(), lr=0.1).step()


def statistics_only(module, x):
    module.train()(x * 3)
    module.eval()


def to_float64_and_back(module, x):
    module.double()(x.double())
    for p in module.parameters():
        p.data.mul_(1.5)
    module.float()


def data_assignment(module, x):
    for p in module.parameters():
        p.data = p.data * 1.5


def data_assignment_to_and_fro(module, x):
    """The second assignment may get the memory that the first one gave back."""
    for p in module.parameters():
        p.data = p.data * 1.5
        p.data = p.data * 1.5


def data_in_place_then_eval(module, x):
    for p in [*module.parameters(), *module.buffers()]:
        if p.is_floating_point():
            p.data.mul_(1.5)
    module.eval()


def new_parameter(module, x):
    for m in module.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            setattr(m, name, nn.Parameter(p.detach() * 1.5))


def new_eps(module, x):
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 0.5


def copy_under_no_grad(module, x):
    for t in [*module.parameters(), *module.buffers()]:
        t.copy_(t * 2)


CHANGES = [load_state_dict, optimizer_step, optimizer_step_in_eval, statistics_only, to_float64_and_back,
           data_assignment, data_assignment_to_and_fro, data_in_place_then_eval, new_parameter, new_eps,
           copy_under_no_grad]  # fmt: skip


@modules
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_stale_folded_weights(change, make):
    module, x = randomised(make()).eval(), LAYOUTS["channels_last"](torch.randn(2, 8, 6, 6))
    with torch.no_grad():
        y = module(x)
        assert torch.equal(module(x), y)  # from the cache
        change(module, x)
        assert not torch.equal(module(x), y)
    assert_fresh(module, x)


@modules
def test_stale_folded_weights_of_an_average(make):
    module, x = randomised(make()), LAYOUTS["channels_last"](torch.randn(2, 8, 6, 6))
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    previous = None
    for _ in range(3):
        module.train()(x).square().sum().backward()
        optimizer.step()
        average.update_parameters(module)
        average.eval()
        assert_fresh(average.module, x)
        y = average(x).detach()
        assert previous is None or not torch.equal(y, previous)
        previous = y
        average.update_parameters(module)  # without another eval()
        assert_fresh(average.module, x)


@modules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_stale_folded_weights_after_to(dtype, make):
    module, x = randomised(make()).eval(), LAYOUTS["channels_last"](torch.randn(2, 8, 6, 6))
    with torch.no_grad():
        module(x)
        module, x = module.to(dtype), x.to(dtype)
        assert module(x).dtype == dtype
    assert_fresh(module, x)


@modules
def test_inference_mode(make):
    """A model made, loaded or run in inference mode: its tensors keep no version counter."""
    x = LAYOUTS["channels_last"](torch.randn(2, 8, 6, 6))
    with torch.inference_mode():
        module = randomised(make()).eval()
        y = module(x)
        assert_fresh(module, x)
        for p in module.parameters():
            p.mul_(1.5)
        assert not torch.equal(module(x), y)
        assert_fresh(module, x)
    assert_fresh(module, x)  # and outside, without a gradient
    outside = randomised(make()).eval()
    with torch.inference_mode():
        y = outside(x)
    assert torch.equal(outside(x).detach(), y)  # what inference mode cached can be used for training
    outside(x).sum().backward()
    assert all(p.grad is not None for p in outside.parameters())


@modules
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved_tensor_hooks"])
def test_checkpointed_recompute_updates_statistics_once(use_reentrant, make):
    """p96136: running statistics, their count and the gradients are those without a checkpoint."""
    module = randomised(make()).train()
    other, x = copy.deepcopy(module), torch.randn(2, 8, 6, 6)
    grads = []
    for m, run in ((module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant)), (other, other)):
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            run(leaf).square().sum().backward()
        grads.append([leaf.grad, *[p.grad for p in m.parameters()]])
    for name, buffer in other.named_buffers():
        assert torch.equal(dict(module.named_buffers())[name], buffer), name
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@modules
def test_out_of_memory_leaves_state_unchanged(make, monkeypatch):
    """The error propagates, the module is as before, and a smaller batch works."""
    module = randomised(make()).train()
    before = copy.deepcopy(module.state_dict())

    def fail(*args):
        raise torch.OutOfMemoryError("simulated")

    with monkeypatch.context() as patch:
        for name in BACKEND_NAMES:
            patch.setattr(BACKENDS[name], "norm_act" if isinstance(module, fr.BNAct2d) else "conv_moments", fail, False)
        with pytest.raises(torch.OutOfMemoryError, match="simulated"):
            module(torch.randn(8, 8, 6, 6))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module(torch.randn(2, 8, 6, 6)).sum().backward()
    assert all(int(value) == 1 for name, value in module.state_dict().items() if name.endswith("batches_tracked"))


@pytest.mark.parametrize("make", [MODULES["conv"], MODULES["bn"]], ids=["conv", "bn"])
def test_empty_batch_in_training(make):
    """N = 0: parameters and statistics stay finite and unchanged. Eager counts such a batch; it is not counted here."""
    module = randomised(make()).train()
    before = copy.deepcopy(module.state_dict())
    y = module(torch.randn(0, 8, 6, 6))
    assert y.shape == (0, 8, 6, 6)
    y.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(not p.grad.any() for p in module.parameters())
    eager = nn.BatchNorm2d(8)
    eager(torch.randn(0, 8, 6, 6))
    assert eager.num_batches_tracked == 1
