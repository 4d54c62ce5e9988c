"""Networks of others through `fuse` and back: outputs, keys, classes, a training step, and how much was fused.

The whole zoo takes the marker `sweep`; a sample of it is always run. Places are exact, with the libraries' versions of
constraints.txt.
"""

import copy
import gc
import re

import pytest
import torch
import zoo
from networks import assert_network_two_times, nonzero, relative, statistics
from tolerances import tolerance
from zoo_places import PLACES, TRAINED

import fused_resnet as fr

SAMPLE = {
    "torchvision:resnet18",
    "torchvision:googlenet",
    "torchvision:mnasnet0_5",
    "timm:resnet50_gn",
    "timm:resnetblur18",
    "timm:resnetv2_18",
    "timm:seresnet18",
    "timm:mobilenetv3_small_050",
    "timm:tf_efficientnetv2_b0",
    "timm:ese_vovnet19b_slim_dw",
    "transformers:resnet_basic",
    "transformers:resnet_bottleneck",
    "transformers:regnet_y",
}

# Convolutions of ResNets that nothing follows which could be fused with them; every other one is fused.
RESNETS = re.compile(r"\w+:(resne|wide_resnet|(gc|se|eca|sk)resne)")
ALONE = {
    r"timm:resnet50_gn|timm:resnetv2_50x1_bit": r".*",  # group norm
    r"timm:resnetv2_": r"stem\.conv3?|.*\.downsample\.conv|head\.fc",  # max pool; a sum that takes conv3; nothing
    r"timm:resnet51q": r"stem\.conv[12]",  # the next convolution
    r"timm:(se|resnetrs|resnest)": r".*\.(se|conv2)\.fc2",  # a sigmoid or a softmax of the attention
    r"timm:gcresnet": r".*\.attn\.(conv_attn|mlp_add\.fc1)",  # a softmax, a layer norm
    r"timm:skresnet": r".*\.attn\.fc_select",  # a softmax
}


def marked(names):
    """The sample, and behind the marker `sweep` all others."""
    return [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.sweep) for name in names]


@pytest.fixture(autouse=True)
def _one_network_at_a_time():
    yield
    gc.collect()


def built(name):
    library = name.partition(":")[0]
    pytest.importorskip(library, reason=f"{library} is not installed: pip install -e '.[test]'")
    return zoo.network(name)


def in_channels_last(model, x):
    return copy.deepcopy(model).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


def outputs(model, x):
    with torch.no_grad():
        return zoo.logits(model(x))


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_places(name, model):
    report = fr.fusion_report(model, zoo.images(name))
    total = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    alone = zoo.left_alone(model, report)
    assert (total - len(alone), total, len(report.fused)) == PLACES[name]
    if RESNETS.match(name):
        known = next((paths for names, paths in ALONE.items() if re.match(names, name)), "")
        assert not [path for path in alone if not re.fullmatch(known, path)]


@pytest.mark.parametrize("name", marked(PLACES))
def test_fuse_zoo_eval_and_back(name, record_property):
    model, x = built(name)
    eager, other, truth = (
        outputs(*twin) for twin in ((model, x), in_channels_last(model, x), (copy.deepcopy(model).double(), x.double()))
    )
    state, classes, parameters = model.state_dict(), [type(m) for m in model.modules()], list(model.parameters())

    fused = fr.fuse(model, inplace=True)
    assert fused is model
    assert list(fused.state_dict()) == list(state)
    assert all(a is b for a, b in zip(fused.parameters(), parameters, strict=True))
    out = outputs(fused, x)
    assert_same(outputs(copy.deepcopy(fused), x), out)
    assert [(o.shape, o.dtype) for o in out] == [(o.shape, o.dtype) for o in eager]
    record_property("eval", assert_network_two_times([o.double() for o in out], eager, truth, other))
    assert_places(name, fused)

    assert fr.unfuse(fused) is model
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(state)
    assert_same(outputs(model, x), eager)


def assert_exact_step(model, x):
    """Every mask and formula, in fp64, where no sign depends on rounding."""
    truth, x = copy.deepcopy(model).double(), x.double()
    fused = fr.fuse(truth)
    expected, found = zoo.training_step(truth, x), zoo.training_step(fused, x)
    for mine, exact in ((found, expected), (statistics(fused), statistics(truth))):
        assert all(relative(mine[i], exact[i]) < tolerance("model_fp64") for i in (nonzero(exact) if exact else ()))


@pytest.mark.parametrize("name", marked(TRAINED))
def test_fuse_zoo_train(name, record_property):
    model, x = built(name)
    assert_exact_step(model, x)
    zoo.leave_kinks(model, fr.fusion_report(model, x))
    twins = [
        (fr.fuse(model), x), (copy.deepcopy(model), x), (copy.deepcopy(model).double(), x.double()),
        in_channels_last(model, x),
    ]  # fmt: skip
    gradients = [zoo.training_step(*twin) for twin in twins]
    ratios = [assert_network_two_times(*gradients)]
    running = [statistics(twin) for twin, _ in twins]
    if running[0]:
        ratios.append(assert_network_two_times(*running))
    record_property("train", max(ratios))
    counts = [[int(b) for b in twin.buffers() if not b.is_floating_point() and not b.dim()] for twin, _ in twins[:2]]
    assert counts[0] == counts[1]


def test_fuse_zoo_holds_what_it_says():
    """All of torchvision's classification models, enough of timm's, a third of all trained."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    everything = {f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)}
    assert everything == {name for name in [*PLACES, *zoo.LEFT_OUT] if name.startswith("torchvision:")}
    assert {f"transformers:{name}" for name in zoo.TRANSFORMERS} <= PLACES.keys()
    assert sum(name.startswith("timm:") for name in PLACES) >= 40
    assert len(TRAINED) >= len(PLACES) / 3
    assert set(TRAINED) | SAMPLE <= PLACES.keys()
