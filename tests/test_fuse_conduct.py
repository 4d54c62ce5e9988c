"""What `fuse` keeps of a network: class, signature, attributes, keys, hooks, copies, files, and how it is trained."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from small_networks import Block, Net, assert_as, assert_near, images, is_running_fused, labels, net, training_step
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_resnet as fr


def pair(inplace: bool = False, **options) -> tuple[nn.Module, nn.Module]:
    """The network fused, and as it was."""
    return fr.fuse(net(), inplace=inplace, **options), net()


def modes(*models: nn.Module):
    for training in (True, False, True):
        for model in models:
            model.train(training)
        yield training


# --- what it is -------------------------------------------------------------------------------------------------------


def test_fuse_keeps_the_class():
    fused, eager = pair()
    assert isinstance(fused, Net)
    assert type(fused) is not Net
    assert isinstance(fused.blocks[0], Block)
    for mine, other in zip(fused.modules(), eager.modules(), strict=True):
        assert isinstance(mine, type(other))
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(mine), name) == getattr(type(other), name)
    assert inspect.signature(fused.forward) == inspect.signature(eager.forward)
    assert inspect.signature(type(fused).forward) == inspect.signature(Net.forward)
    assert repr(fused) == repr(eager)


def test_fuse_changes_no_class():
    before = dict(vars(Net)), dict(vars(Block)), nn.Sequential.forward
    pair()
    assert (dict(vars(Net)), dict(vars(Block)), nn.Sequential.forward) == before
    assert not is_running_fused(net(), images())


def test_fuse_keeps_attributes_and_names():
    fused, eager = pair()
    assert fused.doubled is False
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in eager.named_modules()]
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in eager.named_parameters()]
    assert list(fused.state_dict()) == list(eager.state_dict())
    assert fused.conv.kernel_size == (3, 3)
    assert callable(fused.blocks[0].relu)


def test_fuse_loads_both_ways():
    fused, eager = pair()
    with torch.no_grad():
        for tensor in [*fused.parameters(), *(b for b in fused.buffers() if b.is_floating_point())]:
            tensor.mul_(1.1)
    eager.load_state_dict(fused.state_dict())
    for _ in modes(fused, eager):
        assert_as(fused, eager)
    other = fr.fuse(net())
    other.load_state_dict(eager.state_dict())
    assert_as(other.eval(), eager.eval())


def test_fuse_copies_by_default():
    model = net()
    fused = fr.fuse(model)
    assert type(model) is Net
    assert not set(fused.parameters()) & set(model.parameters())
    assert fr.fuse(model, inplace=True) is model


@pytest.mark.parametrize("lean", [False, True])
def test_fuse_computes_the_same(lean):
    fused, eager = pair(lean=lean)
    for _ in modes(fused, eager):
        assert is_running_fused(copy.deepcopy(fused), images())
        assert_as(fused, eager)


def test_unfuse_is_bitwise():
    fused, eager = pair()
    fr.unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in eager.modules()]
    assert [list(vars(m)) for m in fused.modules()] == [list(vars(m)) for m in eager.modules()]
    for _ in modes(fused, eager):
        for mine, other in zip(training_step(fused, images()), training_step(eager, images()), strict=True):
            assert torch.equal(mine, other)


# --- how it is called -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {"x": 0}), ((0,), {"scale": 1.0}), ((0,), {"scale": 0.5}), ((0, 0.5), {}), ((), {"scale": 0.5, "x": 0})],
    ids=str,
)
def test_fuse_forms_of_calls(args, kwargs):
    fused, eager = pair()
    args = tuple(images() if a == 0 else a for a in args)
    kwargs = {key: images() if a == 0 else a for key, a in kwargs.items()}
    for _ in modes(fused, eager):
        assert_near([fused(*args, **kwargs)], [eager(*args, **kwargs)])


def test_fuse_layouts_and_sizes():
    fused, eager = pair()
    with torch.no_grad():
        for _ in modes(fused, eager):
            for size in ((9, 8), (5, 12), (16, 16)):
                x = images(3, size)
                strided = images(3, (size[0], 2 * size[1]))[..., ::2]
                for form in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x.flip(3), strided):
                    assert_near([fused(form)], [eager(form)])


def test_fuse_image_without_a_batch():
    fused, eager = pair()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()).double()
    with torch.no_grad():
        assert_near([fr.fuse(model)(images()[0])], [model(images()[0])])
    for training in (True, False):  # which batch norm refuses
        for candidate in (fused, eager):
            with pytest.raises(ValueError, match="expected 4D input"):
                candidate.train(training)(images()[0])


# --- training ---------------------------------------------------------------------------------------------------------


def test_fuse_optimizer_made_before():
    losses = []
    for fuse in (True, False):
        model = net().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if fuse:
            model = fr.fuse(model, inplace=True)
            assert is_running_fused(copy.deepcopy(model), images())
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images()), labels())
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
        assert losses[-1][-1] < losses[-1][0]
    assert_near(*losses)


def test_fuse_new_head():
    fused, eager = pair()
    for model in (fused, eager):
        torch.manual_seed(3)
        model.fc = nn.Linear(16, 7).double()
    for _ in modes(fused, eager):
        assert_as(fused, eager)
    assert fused(images()).shape == (4, 7)
    assert is_running_fused(fused, images())


@pytest.mark.parametrize("frozen", ["blocks.0", "bn", "blocks.1.bn2", "blocks.1.downsample"])
def test_fuse_part_in_eval(frozen):
    fused, eager = pair()
    for model in (fused.train(), eager.train()):
        model.get_submodule(frozen).eval().requires_grad_(False)
    kept = {name: b.clone() for name, b in fused.named_buffers() if name.startswith(frozen + ".")}
    assert kept
    assert_as(fused, eager)
    assert_as(fused, eager)
    for name, before in kept.items():
        assert torch.equal(dict(fused.named_buffers())[name], before)


def test_fuse_lean_keeps_less():
    kept = {}
    for lean in (False, True):
        fused, eager = pair(lean=lean)
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.untyped_storage().nbytes()
            return tensor

        x = images(8, (20, 20)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            F.cross_entropy(fused.train()(x), labels(8)).backward()
        F.cross_entropy(eager.train()(x), labels(8)).backward()
        assert_near([p.grad for p in fused.parameters()], [p.grad for p in eager.parameters()])
        kept[lean] = total
    assert kept[True] < kept[False]


def test_fuse_average_of_models():
    fused, eager = pair()
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True) for m in (fused, eager)]
    for _ in range(3):
        for model, average in zip((fused, eager), averages, strict=True):
            model.train()
            training_step(model, images())
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * p.grad)
            average.update_parameters(model)
            average.eval()
        with torch.no_grad():
            assert_near([averages[0](images())], [averages[1](images())])
    assert is_running_fused(averages[0], images())
