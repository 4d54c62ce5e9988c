"""The modules and operators under torch.compile, torch.export, autocast and torch.func."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import LAYOUTS, poisoned
from torch import nn

import fused_resnet as fr
from fused_resnet.modules import unit
from fused_resnet.ops import add_act, bn_act, conv_scale_act

poison = pytest.fixture(autouse=True)(poisoned)

MODULES = {
    "conv": lambda: fr.ConvBNAct2d(8, 8, 3, act="silu"),
    "conv_same_bias": lambda: fr.ConvBNAct2d(8, 8, (2, 4), padding="same", bias=True),
    "bn": lambda: fr.BNAct2d(8, act="hardswish"),
    "bn_cumulative": lambda: fr.BNAct2d(8, momentum=None),
    "bn_no_statistics": lambda: fr.BNAct2d(8, track_running_stats=False),
    "basic": lambda: fr.BasicBlock(8, 8),
    "bottleneck": lambda: fr.Bottleneck(8, 4, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))),
}
modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
SOME = ("conv", "bn", "bottleneck")
some_modules = pytest.mark.parametrize("make", [MODULES[name] for name in SOME], ids=SOME)


@pytest.fixture(autouse=True)
def _cold():
    yield
    torch.compiler.reset()


def compiled(module):
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def image(n=3):
    return LAYOUTS["channels_last"](torch.randn(n, 8, 7, 6))


@modules
def test_compile_eval(make):
    module, x = make().eval(), image()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(module)(x), module(x))


@modules
def test_compile_train(make):
    """Outputs, gradients and running statistics over two steps."""
    module = make().train()
    other = copy.deepcopy(module)
    fast = compiled(other)
    for _ in range(2):
        x = image()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = module(a), fast(b)
        torch.testing.assert_close(z, y)
        grad = torch.randn(y.shape)
        y.backward(grad)
        z.backward(grad)
        torch.testing.assert_close(b.grad, a.grad)
        for (name, p), q in zip(module.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(dict(other.named_buffers())[name], buffer)
        if name.endswith("num_batches_tracked"):
            assert buffer == 2


@some_modules
def test_compile_uses_weights_of_now(make):
    """Nothing is derived once and for all while tracing."""
    module, x = make().eval(), image()
    fast = compiled(module)
    with torch.no_grad():
        before = fast(x)
        for t in [*module.parameters(), *module.buffers()]:
            if t.is_floating_point():
                t.mul_(1.5).add_(0.25)
        after = fast(x)
        torch.testing.assert_close(after, module(x))
        assert not torch.equal(after, before)


def test_compile_with_dynamic_batch():
    module = fr.BasicBlock(8, 8).eval()
    fast = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for n in (2, 3, 5):
            x = image(n)
            torch.testing.assert_close(fast(x), module(x))


@modules
def test_export_eval(make):
    module, x = make().eval(), image()
    exported = torch.export.export(module, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), module(x))


# --- autocast: bf16 on the CPU ---


@modules
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(training, make):
    """dtypes, gradients and statistics of the plain network under autocast."""
    module = make().train(training)
    module(image())  # with fp32 weights packed
    x = image().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    expected = torch.float32 if isinstance(module, fr.BNAct2d) else torch.bfloat16
    assert y.dtype == expected
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == p.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())
    assert all(b.dtype != torch.bfloat16 for b in module.buffers())
    with torch.no_grad():
        if not training:
            torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05 * y.float().abs().max().item())


def test_autocast_nested():
    x, weight, one = image(), torch.randn(8, 8, 3, 3), torch.ones(8)
    with torch.autocast("cpu", torch.bfloat16):
        low = conv_scale_act(x, weight, one, one)
        with torch.autocast("cpu", enabled=False):
            full = conv_scale_act(x, weight, one, one)
            with torch.autocast("cpu", torch.float16):
                half = conv_scale_act(x, weight, one, one)
        again = conv_scale_act(x, weight, one, one)
    assert (low.dtype, full.dtype, half.dtype) == (torch.bfloat16, torch.float32, torch.float16)
    assert torch.equal(low, again)
    assert torch.equal(full, conv_scale_act(x, weight, one, one))


def test_autocast_promotes_as_aten():
    x, c = image(), torch.ones(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert add_act(x.bfloat16(), x).dtype == (x.bfloat16() + x).dtype
        assert add_act(x.bfloat16(), x.bfloat16()).dtype == torch.bfloat16
        y = bn_act(x.bfloat16(), c, c, c, c)
        assert y.dtype == torch.nn.functional.batch_norm(x.bfloat16(), c, c, c, c).dtype
        assert bn_act(x, c, c, c, c, residual=x.bfloat16()).dtype == torch.float32
    with pytest.raises(TypeError, match=r"residual is torch.float32, but x is torch.bfloat16; .* use autocast"):
        add_act(x.bfloat16(), x)


def test_autocast_compiled():
    module, x = fr.BasicBlock(8, 8).eval(), image()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        z = compiled(module)(x)
    assert z.dtype == y.dtype == torch.bfloat16
    assert torch.equal(z, y)


# --- torch.compile is not paid for where it is not used ---------------------------------------------------------------

WITHOUT = """
import sys

sys.path[:0] = {path!r},
import torch
from torch import nn
import fused_resnet as fr

torch.set_num_threads(1)
network = fr.create_model("cifar_resnet20")
network(torch.randn(2, 3, 8, 8)).sum().backward()
fused = fr.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval())
with torch.inference_mode():
    network.eval()(torch.randn(2, 3, 8, 8))
    fused(torch.randn(2, 3, 8, 8))
found = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
assert not found, found
"""


def test_torch_compile_is_not_imported():
    """It takes longer than torch and this package together."""
    code = WITHOUT.format(path=str(Path(fr.__file__).parents[1]))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


def test_constants_are_marked_as_torch_marks_them():
    assert vars(unit.is_unfused) == vars(torch.compiler.assume_constant_result(lambda: False)) != {}
