"""Hooks in fused networks see what they saw before, and are seen when they come and go."""

import copy

import pytest
import torch
from small_networks import Block, assert_as, assert_near, images, is_running_fused, net
from torch import nn

import fused_resnet as fr

INNER = ("conv", "bn", "act", "blocks.0.conv2", "blocks.0.bn1", "blocks.0.relu", "blocks.1.downsample.1")
OUTER = ("", "blocks", "blocks.0", "blocks.1", "dropout", "fc")
every = pytest.mark.parametrize("name", [*INNER, *OUTER])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Log(list):
    """A hook that keeps the outputs, or the inputs, that it is shown."""

    def __call__(self, module, args, output=None):
        self.append((args[0] if output is None else output).detach().clone())


def registered(model: nn.Module, name: str, kind: str) -> tuple[Log, object]:
    log, module = Log(), model.get_submodule(name)
    return log, (module.register_forward_hook if kind == "output" else module.register_forward_pre_hook)(log)


@every
@modes
@pytest.mark.parametrize("kind", ["output", "input"])
def test_hooks_added_later(name, training, kind):
    """And removed again: then the network runs as before."""
    fused, eager = fr.fuse(net()).train(training), net().train(training)
    assert_as(fused, eager)
    (mine, handle), (other, _) = registered(fused, name, kind), registered(eager, name, kind)
    assert_as(fused, eager)
    assert_near(mine, other)
    assert len(mine) >= 2
    handle.remove()
    assert_as(fused, eager)
    assert len(mine) == len(other) - len(mine)
    assert is_running_fused(fused, images())


@every
@modes
def test_hooks_added_before(name, training):
    """The place of a hook on an inner module is left alone; on a whole block it changes nothing."""
    model, eager = net().train(training), net().train(training)
    (mine, _), (other, _) = registered(model, name, "output"), registered(eager, name, "output")
    fused = fr.fuse(model, inplace=True)
    assert_as(fused, eager)
    assert_near(mine, other)
    inside = {path for row in fr.fusion_report(fused).fused for path in row.modules}
    assert name not in inside
    if name in OUTER:
        assert fr.fusion_report(fused).skipped == []


@modes
def test_hooks_that_change_the_output(training):
    fused, eager = fr.fuse(net()).train(training), net().train(training)
    for name in ("bn", "blocks.0", "blocks.1.conv1"):
        for model in (fused, eager):
            model.get_submodule(name).register_forward_hook(lambda module, args, output: output * 0.5)
            model.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))
        assert_as(fused, eager)


@pytest.mark.parametrize("name", ["bn", "blocks.0.conv2", "blocks.1", "fc"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_backward_hooks(name, when):
    found = []
    for fuse in (True, False):
        model, seen = net().train(), []
        if when == "after" and fuse:
            fr.fuse(model, inplace=True)
        model.get_submodule(name).register_full_backward_hook(
            lambda m, d_x, d_y, seen=seen: seen.append(d_y[0].clone())
        )
        if when == "before" and fuse:
            fr.fuse(model, inplace=True)
        model(images()).square().sum().backward()
        found.append(seen)
    assert_near(*found)
    assert len(found[0]) == 1


def test_hooks_with_keywords_and_always():
    fused, eager, logs = fr.fuse(net()), net(), ([], [])
    for model, log in zip((fused, eager), logs, strict=True):
        model.blocks[0].register_forward_hook(
            lambda m, args, kwargs, y, log=log: log.append(y.detach()), with_kwargs=True, always_call=True
        )
        model(images())
    assert_near(*logs)


def test_hooks_for_all_modules():
    """Every module's is called, as in the network itself."""
    counts = []
    for model in (fr.fuse(net()), net()):
        names = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, *a, names=names: names.append(type(m).__name__)
        )
        try:
            model(images())
        finally:
            handle.remove()
        counts.append(names)
    assert counts[0] == counts[1]


def test_hooks_survive_copies_and_unfuse():
    model = fr.fuse(net())
    log, _ = registered(model, "blocks.0.bn1", "output")
    copied = copy.deepcopy(model)
    copied(images())
    assert len(copied.blocks[0].bn1._forward_hooks) == 1
    assert log == []
    fr.unfuse(model)(images())
    assert len(log) == 1


def test_hooked_norm_in_a_lean_block():
    """A block that a hook looks into runs once, so that the batch is counted once."""
    eager = Block().double()
    fused, seen = fr.fuse(eager, lean=True), []
    fused.bn2.register_forward_hook(lambda *args: seen.append(args))
    x = torch.randn(2, 8, 6, 5, dtype=torch.double)
    for model in (fused, eager):
        model(x.clone().requires_grad_()).square().sum().backward()
    assert len(seen) == 1
    assert_near(list(fused.buffers()), list(eager.buffers()))
    assert_near([p.grad for p in fused.parameters()], [p.grad for p in eager.parameters()])
