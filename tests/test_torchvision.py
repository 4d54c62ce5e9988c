"""Networks beside torchvision's: state dicts, outputs, a training step, options and sizes."""

import copy

import pytest
import torch

pytest.importorskip("torchvision")

import torchvision.models
from networks import (
    assert_network_two_times,
    batch_norms,
    calibrate,
    largest,
    nonzero,
    relative,
    seeded,
    statistics,
    step,
)
from tolerances import tolerance
from torch import nn

from fused_resnet import models

TORCHVISION = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "mobilenet_v2",
)


def twin(name, **kwargs):
    """Ours and torchvision's, from the same seed."""
    return seeded(getattr(models, name), **kwargs), seeded(getattr(torchvision.models, name), **kwargs)


def assert_same_state(ours, theirs):
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
        assert torch.equal(ours[key], value), key


@pytest.fixture(scope="module", params=TORCHVISION)
def twins(request):
    return twin(request.param)


def test_models_same_seed_same_state(twins):
    ours, theirs = twins
    assert_same_state(ours.state_dict(), theirs.state_dict())
    assert [name for name, _ in ours.named_children()] == [
        name for name, _ in theirs.named_children() if name != "relu"
    ]


def test_models_load_each_other(twins):
    for source, target in (twins, twins[::-1]):
        with torch.no_grad():
            next(source.parameters()).neg_()
        target.load_state_dict(source.state_dict())
        assert_same_state(target.state_dict(), source.state_dict())


def test_models_eval_equals_torchvision(twins):
    ours, theirs = twins
    calibrate(theirs, torch.randn(2, 3, 33, 33))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 65, 49)  # one odd-sized image
    with torch.no_grad():
        expected = theirs(x)
        out = ours.eval()(x)
        assert largest(out, expected) < tolerance("model_eval_fp32")
        assert largest(ours(x.to(memory_format=torch.channels_last)), expected) < tolerance("model_eval_fp32")


def test_models_training_step_two_times_rule(twins):
    """Gradients and running statistics after a step, against fp64 truth; eager in channels_last as well.

    Batch norm's shift keeps nearly all values away from the kinks of ReLU and ReLU6: a sign that rounding decides would
    otherwise move the gradients of small images by 1e-2 in either network (measured). The masks themselves are tested
    in fp64 below, and for every operator on its own.
    """
    ours, theirs = twins
    for bn in batch_norms(theirs):
        nn.init.constant_(bn.bias, 3.0 if isinstance(theirs, torchvision.models.MobileNetV2) else 4.0)
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    truth = copy.deepcopy(theirs).double()
    x, labels = torch.randn(2, 3, 33, 33), torch.randint(1000, (2,))
    expected = step(truth, x.double(), labels)
    mine = step(ours, x, labels)
    native = torch.channels_last  # for NCHW oneDNN sums in another order, up to three times as precise
    eager = step(theirs.to(memory_format=native), x.to(memory_format=native), labels)
    assert_network_two_times(mine, eager, expected)
    assert_network_two_times(statistics(ours), statistics(theirs), statistics(truth))
    counts = [[int(bn.num_batches_tracked) for bn in batch_norms(model)] for model in (ours, theirs)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_models_fp64_equals_torchvision(name):
    """Every mask and formula, with the initial weights: in fp64 no sign depends on rounding."""
    ours, theirs = (model.double() for model in twin(name))
    x, labels = torch.randn(2, 3, 33, 33, dtype=torch.double), torch.randint(1000, (2,))
    for model in (ours, theirs):
        model.train()
        getattr(model, "classifier", [nn.Dropout()])[0].p = 0.0
    mine, expected = step(ours, x, labels), step(theirs, x, labels)
    bound = tolerance("model_fp64")
    for found, truth in ((mine, expected), (statistics(ours), statistics(theirs))):
        assert max(relative(found[i], truth[i]) for i in nonzero(truth)) < bound


@pytest.mark.parametrize(
    "kwargs",
    [
        {"replace_stride_with_dilation": [False, True, True]},
        {"zero_init_residual": True},
        {"num_classes": 7},
        {"norm_layer": lambda c: nn.GroupNorm(4, c)},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_resnet50_options_as_torchvision(kwargs):
    ours, theirs = twin("resnet50", **kwargs)
    assert_same_state(ours.state_dict(), theirs.state_dict())
    x = torch.randn(2, 3, 45, 33)
    with torch.no_grad():
        assert largest(ours.eval()(x), theirs.eval()(x)) < tolerance("model_eval_fp32")
    assert ours.layer4[2].conv2.dilation == theirs.layer4[2].conv2.dilation


def test_mobilenet_v2_width_mult_as_torchvision():
    ours, theirs = twin("mobilenet_v2", width_mult=0.35, dropout=0.5)
    assert_same_state(ours.state_dict(), theirs.state_dict())
    assert ours.classifier[0].p == 0.5


@pytest.mark.parametrize("size", [(33, 97), (64, 64), (37, 40)], ids=str)
def test_resnet18_sizes_and_layouts(size):
    ours, theirs = twin("resnet18", num_classes=10)
    calibrate(theirs, torch.randn(4, 3, 64, 64))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *size)
    forms = (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3), x.flip(0))
    with torch.no_grad():
        expected = theirs(x)
        for form, wanted in zip(forms, (*[expected] * 3, expected.flip(0)), strict=True):
            assert largest(ours.eval()(form), wanted) < tolerance("model_eval_fp32")
