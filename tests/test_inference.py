"""Inference's shortcuts: residuals that are overwritten, prepared convolutions, outputs in kept memory, no dispatcher.

Each must be invisible: whoever can see a tensor finds in it what was there, and what is computed is what the operator
computes now.
"""

import gc
import io
import threading

import pytest
import torch
from problems import BACKEND_NAMES, LAYOUTS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet as fr
from fused_resnet.backends import backend_report
from fused_resnet.backends.cpu import extension_missing
from fused_resnet.modules import blocks, prepared, unit

needs_cpu = pytest.mark.skipif("cpu" not in BACKEND_NAMES, reason=backend_report()["cpu"] or "available")


def image(*size, dtype=torch.float32):
    return LAYOUTS["channels_last"](torch.randn(*size).to(dtype))


def randomised(module):
    for t in [*module.parameters(), *module.buffers()]:
        if t.is_floating_point() and t.dim() == 1:
            t.data.uniform_(0.5, 1.5)
    return module.eval()


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
    "conv_bn_act": lambda op, x: op(x, torch.randn(8, 8, 3, 3), None, torch.rand(8), None, x, [1, 1], [1, 1], [1, 1], 1,
                                    1e-5, "relu", "")[0],
    "bn_act": lambda op, x: op(x, torch.rand(8), torch.rand(8), x, 1e-5, "relu", "")[0],
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


# --- max pooling ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 2, 1), (2, 2, 0), (3, 1, 1), ((3, 5), (2, 1), (1, 2)), (1, 1, 0), (2, None, 1)],
)
@pytest.mark.parametrize("size", [(2, 64, 9, 8), (1, 3, 5, 7), (3, 33, 6, 6)])
def test_max_pool2d(size, kernel, stride, padding, dtype):
    x = image(*size, dtype=dtype)
    x[0, 0, 1, 1], x[0, 1], x[-1, -1, 0, 0] = float("nan"), -float("inf"), float("inf")
    with torch.no_grad():
        y = fr.ops.max_pool2d(x, kernel, stride, padding)
    truth = nn.functional.max_pool2d(x, kernel, stride, padding)
    assert torch.equal(y.nan_to_num(7), truth.nan_to_num(7))
    assert torch.equal(y.isnan(), truth.isnan())
    assert y.stride() == truth.stride()


def test_max_pool2d_errors_are_those_of_torch():
    with torch.no_grad():
        for arguments in ((image(1, 2, 4, 4), 3, 1, 2), (image(1, 2, 2, 2), 3), (torch.randn(1, 2, 4), 9)):
            with pytest.raises(RuntimeError) as truth:
                nn.functional.max_pool2d(*arguments)
            with pytest.raises(RuntimeError) as found:
                fr.ops.max_pool2d(*arguments)
            assert str(found.value) == str(truth.value)


def test_max_pool2d_gradient():
    x = image(2, 8, 9, 9).requires_grad_()
    other = x.detach().clone().requires_grad_()
    fr.ops.max_pool2d(x, 3, 2, 1).square().sum().backward()
    nn.functional.max_pool2d(other, 3, 2, 1).square().sum().backward()
    assert torch.equal(x.grad, other.grad)


# --- memory of outputs ---


@pytest.fixture
def megabytes():
    """A function that returns a fresh output of so many MB."""
    if extension_missing():
        pytest.skip(extension_missing())
    one = torch.ones(16)

    def make(count, value=1.0):
        x = torch.full((count, 16, 128, 128), value).contiguous(memory_format=torch.channels_last)
        return fr.ops.scale_act(x, one, 0 * one, act="none")

    gc.collect()
    fr.empty_cache()
    return make


def test_memory_of_a_dead_output_is_used_again(megabytes):
    y = megabytes(3)
    del y
    assert fr.empty_cache() >= 3 << 20
    assert fr.empty_cache() == 0
    y = megabytes(3)
    address = y.data_ptr()
    view = y[1:]
    del y
    assert megabytes(3).data_ptr() != address  # the view holds it
    assert (view == 1).all()
    del view
    assert megabytes(3).data_ptr() == address  # of those that are idle, the last


def test_living_outputs_never_share_memory(megabytes):
    random, alive = torch.Generator().manual_seed(0), []
    for step in range(200):
        count = int(torch.randint(1, 6, (), generator=random))
        alive.append((megabytes(count, float(step)), float(step)))
        if len(alive) > 8:
            alive.pop(int(torch.randint(0, len(alive), (), generator=random)))
    assert all((y == value).all() for y, value in alive)


def test_outputs_on_many_threads(megabytes):
    wrong = []

    def work(value):
        for _ in range(30):
            y = megabytes(1 + value % 3, float(value))
            if not (y == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_output_is_an_ordinary_tensor(megabytes):
    y = megabytes(2)
    truth = y.clone()
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), truth)
    array = y.numpy()
    y.add_(1)
    assert array.flat[0] == 2
    y.share_memory_()
    assert y.is_shared()
    assert torch.equal(y, truth + 1)


def test_no_more_is_kept_than_was_in_use_at_once(megabytes):
    for count in range(4, 20):  # each too large for the memory of those before it
        megabytes(count)
    assert fr.empty_cache() <= 20 << 20
    del megabytes
    assert fr.empty_cache() == 0
