"""Fused networks under torch.compile: whole graphs, no more of them than needed, and eager's numbers."""

import copy

import pytest
import torch
from networks import largest
from problems import poisoned
from stack_networks import images, networks, operators, own, pair
from tolerances import tolerance
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from training_steps import Operators, loss_of

poison = pytest.fixture(autouse=True)(poisoned)


@pytest.fixture(autouse=True)
def _cold():
    yield
    torch.compiler.reset()


@pytest.fixture
def counter():
    return CompileCounterWithBackend("aot_eager")


def compiled(model, counter, **kwargs):
    return torch.compile(model, backend=counter, fullgraph=True, **kwargs)


def dynamic(n):
    x = images(n)
    torch._dynamo.mark_dynamic(x, 0)
    return x


@networks
def test_compile_eval(make, counter):
    """One graph for every number of images, in which every convolution is fused."""
    plain, fused = pair(make)
    fast = compiled(fused, counter)
    for n in (2, 3, 5):
        x = dynamic(n)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), fused(x))
            assert largest(fast(x), plain(x)) < tolerance("model_eval_fp32")
    assert counter.frame_count == 1
    convolutions = sum(isinstance(module, nn.Conv2d) for module in plain.modules())
    assert operators(counter.graphs[0].graph).count("fused_resnet::conv_scale_act") == convolutions


def test_compile_in_place(counter):
    """`model.compile()`, which leaves marks on the module, as torch.compile does: it runs fused with and without."""
    _, fused = pair(own)
    x = images()
    with torch.no_grad():
        expected = fused(x)
        fused.compile(backend=counter, fullgraph=True)
        torch.testing.assert_close(fused(x), expected)
        with Operators() as seen:
            fused._call_impl(x)
    convolutions = ["fused_resnet::conv_scale_act"] * 3
    assert [name for name in seen.names if "conv" in name] == convolutions
    assert [name for name in operators(counter.graphs[0].graph) if "conv" in name] == convolutions


@networks
def test_compile_train(make, counter):
    """Outputs, gradients and running statistics over steps with other numbers of images: one graph."""
    _, fused = pair(make, training=True)
    eager = copy.deepcopy(fused)
    fast = compiled(fused, counter)
    for n in (2, 3, 5):
        x = dynamic(n)
        y, z = eager(x), fast(x)
        torch.testing.assert_close(z, y)
        loss_of(y).backward()
        loss_of(z).backward()
        for (name, p), q in zip(eager.named_parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")
        eager.zero_grad()
        fused.zero_grad()
    for b, c in zip(eager.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(c, b)
    assert counter.frame_count == 1
    assert "fused_resnet::block" in operators(counter.graphs[0].graph)


def test_compile_follows_the_mode(counter):
    """A graph for each mode, and no third one when a mode comes back."""
    _, fused = pair(own)
    other, fast, x = copy.deepcopy(fused), compiled(fused, counter), images()
    for i, training in enumerate((False, True, False, True)):
        fused.train(training)
        torch.testing.assert_close(fast(x), other.train(training)(x))
        assert counter.frame_count == min(i + 1, 2)


def silu(model):
    model.act = nn.SiLU()


def wider_norm(model):
    model.bn.eps = 0.5


def another_stride(model):
    model.stem.stride = (1, 1)


@pytest.mark.parametrize("change", [silu, wider_norm, another_stride])
def test_compile_sees_changes(change, counter):
    """What the fused forward relies on is guarded, as what a forward reads is."""
    plain, fused = pair(own)
    fast, x = compiled(fused, counter), images()
    with torch.no_grad():
        before = fast(x)
        change(plain)
        change(fused)
        after = fast(x)
        assert counter.frame_count == 2
        assert not torch.equal(before, after)
        assert largest(after, plain(x)) < tolerance("model_eval_fp32")


def test_compile_uses_weights_of_now(counter):
    plain, fused = pair(own)
    fast, x = compiled(fused, counter), images()
    with torch.no_grad():
        before = fast(x)
        for model in (plain, fused):
            for t in [*model.parameters(), *model.buffers()]:
                if t.is_floating_point():
                    t.mul_(1.5).add_(0.25)
        after = fast(x)
        assert largest(after, plain(x)) < tolerance("model_eval_fp32")
    assert not torch.equal(before, after)
    assert counter.frame_count == 1


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_hook_after_compile(fused, guarded, counter):
    """torch.compile does not look at hooks again, unless it is told to: fused and plain networks do the same."""
    model = pair(own)[fused]
    fast, x = compiled(model, counter), images()
    with torch.no_grad(), torch._dynamo.config.patch(skip_nnmodule_hook_guards=not guarded):
        before = fast(x)
        model.bn.register_forward_hook(lambda module, args, y: 2 * y)
        after, expected = fast(x), model(x)
    assert not torch.equal(before, expected)
    torch.testing.assert_close(after, expected if guarded else before)
    assert counter.frame_count == 1 + guarded


def test_hook_before_compile(counter):
    plain, fused = pair(own)
    for model in (plain, fused):
        model.act.register_forward_hook(lambda module, args, y: 2 * y)
    x = images()
    with torch.no_grad():
        assert largest(compiled(fused, counter)(x), plain(x)) < tolerance("model_eval_fp32")


def test_compile_of_a_transform(counter):
    """A graph that was made for vmap is not taken for a call without it."""
    plain, fused = pair(own)
    x = images()
    with torch.no_grad():
        found = torch.compile(torch.vmap(lambda x: fused(x)), backend=counter, fullgraph=True)(x[:, None])
        assert largest(found[:, 0], plain(x)) < tolerance("model_eval_fp32")
        torch.testing.assert_close(compiled(fused, counter)(x), fused(x))
    assert [len(operators(graph.graph)) for graph in counter.graphs] == [0, 4]  # with the sum
