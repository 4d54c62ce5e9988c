"""Inference's shortcuts: residuals that are overwritten, prepared convolutions, no dispatcher.

Each must be invisible: whoever can see a tensor finds in it what was there, and what is computed is what the operator
computes now.
"""

import pytest
import torch
from problems import BACKEND_NAMES, image, randomised
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet as fr
from fused_resnet.backends import backend_report
from fused_resnet.modules import blocks, prepared, unit

needs_cpu = pytest.mark.skipif("cpu" not in BACKEND_NAMES, reason=backend_report()["cpu"] or "available")


STAGES = {
    "basic": lambda: nn.Sequential(*[fr.BasicBlock(16, 16) for _ in range(4)]),
    "bottleneck": lambda: nn.Sequential(*[fr.Bottleneck(16, 4) for _ in range(4)]),
}
stages = pytest.mark.parametrize("make", STAGES.values(), ids=STAGES.keys())


@pytest.fixture
def overwritten(monkeypatch):
    """For each unit with a residual: whether its output took the residual's memory."""
    found, original = [], unit.conv_bn_act

    def record(conv, bn, x, residual=None, *args, **options):
        y = original(conv, bn, x, residual, *args, **options)
        if residual is not None:
            found.append(y.data_ptr() == residual.data_ptr())
        return y

    monkeypatch.setattr(unit, "conv_bn_act", record)
    return found


# --- residuals ---


@needs_cpu
@stages
def test_blocks_overwrite_each_others_maps(make, overwritten):
    stage, x = randomised(make()), image(2, 16, 7, 5)
    before = x.clone()
    with torch.no_grad():
        truth = stage(x)
        assert overwritten == [False] * 4  # nn.Sequential knows nothing of it
        overwritten.clear()
        y = blocks.run_in_turn(stage, x)
    assert overwritten == [False, True, True, True]  # the caller's x is left alone
    assert torch.equal(y, truth)
    assert torch.equal(x, before)


@needs_cpu
def test_projection_is_overwritten(overwritten):
    stage, x = randomised(fr.resnet50().layer1), image(1, 64, 5, 5)
    with torch.no_grad():
        stage(x)
    assert overwritten == [True, False, False]


@stages
def test_nothing_is_overwritten_where_gradients_are_recorded(make, overwritten):
    stage = randomised(make())
    blocks.run_in_turn(stage, image(2, 16, 7, 5)).sum().backward()
    assert overwritten == [False] * 4


class KeepsItsInput(fr.BasicBlock):
    def forward(self, x):
        self.kept = x
        return super().forward(x)


class Identity(fr.BasicBlock):
    """As stochastic depth: what it returns is what it was given."""

    def forward(self, x):
        return x


def hook_blocks(stage, keep):
    for block in stage:
        block.register_forward_hook(lambda m, args, y: keep(y))


def hook_blocks_before(stage, keep):
    for block in stage:
        block.register_forward_pre_hook(lambda m, args: keep(args[0]))


def hook_first_convolutions(stage, keep):
    for block in stage:
        block.conv1.register_forward_pre_hook(lambda m, args: keep(args[0]))


def override_forward(stage, keep):
    for block in stage:

        def forward(x, original=block.forward):
            return keep(original(keep(x)))

        block.forward = forward


@stages
@pytest.mark.parametrize(
    "watch", [hook_blocks, hook_blocks_before, hook_first_convolutions, override_forward], ids=lambda f: f.__name__
)
def test_what_was_seen_stays(make, watch):
    stage, x, seen = randomised(make()), image(2, 16, 7, 5), []

    def keep(y):
        seen.append((y, y.clone()))
        return y if watch is override_forward else None

    watch(stage, keep)
    with torch.no_grad():
        blocks.run_in_turn(stage, x)
    assert len(seen) >= 4
    assert all(torch.equal(y, copy) for y, copy in seen)


def test_what_was_seen_by_a_hook_on_every_module_stays():
    stage, seen = randomised(STAGES["basic"]()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append((y, y.clone())))
    try:
        with torch.no_grad():
            blocks.run_in_turn(stage, image(2, 16, 7, 5))
    finally:
        handle.remove()
    assert len(seen) == 5  # the stage itself too
    assert all(torch.equal(y, copy) for y, copy in seen)


def test_what_a_block_of_another_class_keeps_stays():
    stage = randomised(nn.Sequential(fr.BasicBlock(16, 16), KeepsItsInput(16, 16), fr.BasicBlock(16, 16)))
    x = image(2, 16, 7, 5)
    with torch.no_grad():
        truth = stage[0](x)
        blocks.run_in_turn(stage, x)
    assert torch.equal(stage[1].kept, truth)


def test_what_passes_through_a_block_stays():
    stage, x = randomised(nn.Sequential(Identity(16, 16), fr.BasicBlock(16, 16))), image(2, 16, 7, 5)
    before = x.clone()
    with torch.no_grad():
        blocks.run_in_turn(stage, x)
    assert torch.equal(x, before)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fused_resnet" and isinstance(out, torch.Tensor):
            self.seen.append((out, out.clone()))
        return out


@stages
def test_a_mode_sees_every_operator(make):
    stage, x = randomised(make()), image(2, 16, 7, 5)
    with torch.no_grad():
        truth = blocks.run_in_turn(stage, x)  # what is prepared here must not be used below
        with Recorder() as recorder:
            y = blocks.run_in_turn(stage, x)
    assert len(recorder.seen) == 4 * (2 if isinstance(stage[0], fr.BasicBlock) else 3)
    assert all(torch.equal(out, copy) for out, copy in recorder.seen)
    torch.testing.assert_close(y, truth)


@needs_cpu
def test_feature_maps_stay():
    model = randomised(fr.resnet18(features_only=True))
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        maps = model(x)
        again = [m.clone() for m in model(x)]
    assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))


# --- prepared convolutions ---


@pytest.fixture
def unit_and_input():
    module, x = randomised(fr.ConvBNAct2d(8, 8, 3)), image(2, 8, 9, 9)
    with torch.no_grad():
        module(x)
    if "cpu" in BACKEND_NAMES:
        assert prepared.prepared(module.conv, module.bn, x, None, "relu") is None  # a gradient would be recorded
        with torch.no_grad():
            assert prepared.prepared(module.conv, module.bn, x, None, "relu") is not None
    return module, x


def plainly(module, x):
    with unit.unfused():
        return module(x)


def change_stride(module):
    module.conv.stride = (2, 2)


def change_padding(module):
    module.conv.padding = (0, 2)


def change_dilation(module):
    module.conv.dilation = (2, 1)


def change_act(module):
    module.act = "silu"


def change_weight_in_place(module):
    module.conv.weight.mul_(2)


def transpose_weight(module):
    """Another view of the same memory, which PyTorch does not count as a change."""
    module.conv.weight.data = module.conv.weight.data.transpose(0, 1)


def change_variance(module):
    module.bn.running_var.fill_(3)


def change_eps(module):
    module.bn.eps = 1.0


def add_bias(module):
    module.conv.bias = nn.Parameter(torch.randn(8))


def parametrize(module):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(module.conv, "weight", Doubled())


def replace_batch_norm(module):
    module.bn = randomised(type(module.bn)(8))


CHANGES = [change_stride, change_padding, change_dilation, change_act, change_weight_in_place, transpose_weight,
           change_variance, change_eps, add_bias, parametrize, replace_batch_norm]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_prepared_is_not_stale(unit_and_input, change):
    module, x = unit_and_input
    with torch.no_grad():
        before = module(x)
        change(module)
        y = module(x)
        assert y.shape != before.shape or not torch.equal(y, before)
        torch.testing.assert_close(y, plainly(module, x))


def test_prepared_takes_every_shape(unit_and_input):
    module, _ = unit_and_input
    with torch.no_grad():
        for size in range(3, 3 + 2 * prepared.MOST_SHAPES):
            x = image(1, 8, size, 5)
            torch.testing.assert_close(module(x), plainly(module, x))


def test_prepared_gives_way_to_autocast_and_to_a_backend(unit_and_input):
    module, x = unit_and_input
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        assert module(x).dtype == torch.float32
        with fr.use_backend("reference"):
            assert torch.equal(module(x), fr.ops.conv_scale_act(
                x, module.conv.weight, *unit.folded(module.bn), padding=1, backend="reference"
            ))  # fmt: skip


def test_prepared_gives_way_to_functional_call(unit_and_input):
    module, x = unit_and_input
    twice = {name: 2 * value.detach() for name, value in module.named_parameters()}
    with torch.no_grad():
        y = torch.func.functional_call(module, twice, (x,))
        with unit.unfused():
            torch.testing.assert_close(y, torch.func.functional_call(module, twice, (x,)))
        assert not torch.equal(y, module(x))


def test_prepared_checks_its_residual(unit_and_input):
    module, x = unit_and_input
    with torch.no_grad():
        module(x, torch.zeros_like(x))
        with pytest.raises(ValueError, match="residual must have the output's shape"):
            module(x, image(2, 8, 9, 8))
        with pytest.raises(TypeError, match=r"residual is torch\.bfloat16"):
            module(x, image(2, 8, 9, 9, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="x has 7 channels"):
            module(image(2, 7, 9, 9))


# --- operators called directly ---

CALLS = {
    "conv_scale_act": lambda op, x: op(x, torch.randn(8, 8, 3, 3), torch.rand(8), torch.rand(8), x, [1, 1], [1, 1],
                                       [1, 1], 1, "relu", ""),
    "block": lambda op, x: op(x, None, [torch.randn(8, 8, 3, 3)], [None], [torch.rand(8)], [torch.rand(8)],
                              [1, 1, 1, 1, 1, 1, 1], [1e-5], ["relu"], "input", [], False, False, "", "")[0],
    "scale_act": lambda op, x: op(x, torch.rand(8), torch.rand(8), x, "relu", ""),
    "add_act": lambda op, x: op(x, x, "relu", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_direct_call_is_the_operator(name):
    """Outputs and gradients are the dispatcher's, bit for bit."""
    found = []
    for op in (getattr(torch.ops.fused_resnet, name), lambda *args: fr.ops.library.call(name, *args)):
        torch.manual_seed(1)
        x = image(2, 8, 5, 5).requires_grad_()
        y = CALLS[name](op, x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
