"""Networks: parity with torchvision, the facts of their sources, and what users do with them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from tolerances import tolerance
from torch import nn

import fused_resnet as fr
from fused_resnet import models
from fused_resnet.modules.blocks import BasicBlock, Bottleneck, PadShortcut

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


def relative(value, truth):
    """|value - truth| / |truth|, Euclidean norms."""
    return ((value - truth).norm() / truth.norm()).item()


def largest(value, truth):
    """max|value - truth| / max|truth|."""
    return ((value.double() - truth.double()).abs().max() / truth.double().abs().max()).item()


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def seeded(build, seed=0, **kwargs):
    torch.manual_seed(seed)
    return build(**kwargs)


def twin(name, **kwargs):
    """Ours and torchvision's, from the same seed."""
    return seeded(getattr(models, name), **kwargs), seeded(getattr(torchvision.models, name), **kwargs)


def step(model, x, labels):
    """One forward and backward pass in training mode; the gradients of all parameters."""
    model.train()
    F.cross_entropy(model(x), labels).backward()
    return [p.grad for p in model.parameters()]


def statistics(model):
    return [b for b in model.buffers() if b.is_floating_point()]


def calibrate(model, x):
    """Running statistics that are those of `x`, so that the network is well scaled in eval mode."""
    momenta = [(bn, bn.momentum) for bn in batch_norms(model)]
    for bn, _ in momenta:
        bn.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for bn, momentum in momenta:
        bn.momentum = momentum
    return model.eval()


def nonzero(tensors):
    """Indices of those that are more than rounding: of the others there is no relative error."""
    scale = max(t.norm() for t in tensors)
    return [i for i, t in enumerate(tensors) if t.norm() > 1e-9 * scale]


def assert_same_state(ours, theirs):
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
        assert torch.equal(ours[key], value), key


# --- parity with torchvision ------------------------------------------------------------------------------------------


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


def assert_network_two_times(mine, eager, truth):
    """The two-times rule for the median and for the largest of all tensors' relative errors."""
    errors = torch.tensor([[relative(mine[i], truth[i]), relative(eager[i], truth[i])] for i in nonzero(truth)])
    for error, plain in (errors.median(0).values, errors.max(0).values):
        assert error <= tolerance("two_times") * plain + tolerance("model_floor")


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


# --- facts of the sources ---------------------------------------------------------------------------------------------


def multiply_adds(model, *size):
    """Multiplications of convolutions and linear layers, counted without computing."""
    counts = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda m, _, out: counts.append(out.numel() * m.weight[0].numel()))
    model.eval()(torch.empty(1, *size, device="meta"))
    return sum(counts)


def on_meta(build, **kwargs):
    with torch.device("meta"):
        return build(**kwargs)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("resnet18", 1.8), ("resnet34", 3.6), ("resnet50", 3.8), ("resnet101", 7.6), ("resnet152", 11.3)],
)
def test_resnet_multiply_adds(name, billions):
    """Table 1 of arXiv:1512.03385; its bottlenecks have the stride on the 1x1 convolution."""
    original = {"stride_on": "1x1"} if billions > 3.6 else {}
    found = multiply_adds(on_meta(getattr(models, name), **original), 3, 224, 224)
    assert found / 1e9 == pytest.approx(billions, rel=tolerance("source_flops"))


def test_resnet50_multiply_adds_with_stride_on_3x3():
    assert multiply_adds(on_meta(models.resnet50), 3, 224, 224) / 1e9 == pytest.approx(4.089, abs=5e-4)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_resnet_layer_count(depth):
    model = on_meta(getattr(models, f"resnet{depth}"))
    main = [m for name, m in model.named_modules() if "downsample" not in name]
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in main) == depth


def test_shortcuts():
    """Projections: none in A, three where shapes change in B (one more before a bottleneck), every block in C."""

    def projections(shortcut, block=BasicBlock):
        model = on_meta(models.ResNet, block=block, layers=(2, 2, 2, 2), shortcut=shortcut)
        return sum(isinstance(b.downsample, nn.Sequential) for b in model.modules() if isinstance(b, block)), model

    none, a = projections("A")
    assert none == 0
    assert sum(isinstance(m, PadShortcut) for m in a.modules()) == 3
    assert not any("downsample" in key for key in a.state_dict())
    assert [projections(kind)[0] for kind in ("B", "C")] == [3, 8]
    assert [projections(kind, Bottleneck)[0] for kind in ("B", "C")] == [4, 8]
    plain = on_meta(models.plain18)
    assert list(plain.state_dict()) == list(a.state_dict())
    assert parameters(plain) == parameters(a)


def test_shortcut_a_pads_with_zeros():
    x = torch.randn(2, 3, 5, 5)
    out = PadShortcut(3, 7, stride=2)(x)
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2])
    assert out.shape == (2, 7, 3, 3)
    assert not out[:, 3:].any()


def test_plain_net_has_no_shortcut():
    """With the last batch norm of a block at zero a residual block is the identity, and a plain one gives zero."""
    x = torch.rand(1, 64, 9, 9)
    for residual in (True, False):
        block = BasicBlock(64, 64, residual=residual).eval()
        nn.init.zeros_(block.bn2.weight)
        assert torch.equal(block(x), x if residual else torch.zeros_like(x))


def test_zero_init_residual_is_the_identity():
    model = models.resnet18(zero_init_residual=True).eval()
    x = torch.rand(1, 64, 9, 9)
    assert torch.equal(model.layer1(x), x)


@pytest.mark.parametrize(
    ("depth", "million"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)]
)
def test_cifar_depth_and_parameters(depth, million):
    """Table 6 of arXiv:1512.03385."""
    model = on_meta(getattr(models, f"cifar_resnet{depth}"))
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == depth
    assert parameters(model) / 1e6 == pytest.approx(million, rel=tolerance("source_flops"))
    assert [stage[0].conv1.out_channels for stage in (model.layer1, model.layer2, model.layer3)] == [16, 32, 64]


def test_preact_facts():
    model = models.preact_resnet_cifar()
    assert [stage[0].conv1.out_channels for stage in model.stages] == [32, 64, 128, 256]
    assert [stage[0].pool is not None for stage in model.stages] == [False, True, True, True]
    assert [stage[0].downsample.stride for stage in model.stages[1:]] == [(2, 2)] * 3
    assert model.dropout.p == 0.25
    assert model(torch.randn(2, 3, 33, 32)).shape == (2, 10)


def test_preact_block_formula():
    block = models.PreActBlock(8, 16, pool=True)
    calibrate(block, torch.randn(4, 8, 9, 9))
    x = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        y = block.conv1(F.relu(block.bn1(F.max_pool2d(x, 2, ceil_mode=True))))
        expected = block.conv2(F.relu(block.bn2(y))) + block.downsample(x)
        assert largest(block(x), expected) < tolerance("model_eval_fp32")


def test_mobilenet_v1_facts():
    """4.2 million parameters, 569 million multiply-adds (arXiv:1704.04861, table 4)."""
    model = on_meta(models.mobilenet_v1)
    assert parameters(model) == 4_231_976
    assert multiply_adds(model, 3, 224, 224) / 1e6 == pytest.approx(569, abs=1)
    assert parameters(on_meta(models.mobilenet_v1, width_mult=0.5)) / 1e6 == pytest.approx(1.3, rel=0.03)


def test_mobilenet_v2_multiply_adds():
    assert multiply_adds(on_meta(models.mobilenet_v2), 3, 224, 224) / 1e6 == pytest.approx(301, abs=1)


def test_depthwise_separable_cost_ratio():
    """6x6x3 -> 4x4x5 with a 3x3 kernel: 672 multiplications against 2160, 1/c_out + 1/k^2 of them."""
    with torch.device("meta"):
        separable = nn.Sequential(fr.ConvBNAct2d(3, 3, 3, padding=0, groups=3), fr.ConvBNAct2d(3, 5, 1))
        full = fr.ConvBNAct2d(3, 5, 3, padding=0)
    costs = multiply_adds(separable, 3, 6, 6), multiply_adds(full, 3, 6, 6)
    assert costs == (672, 2160)
    assert costs[0] / costs[1] == pytest.approx(1 / 5 + 1 / 9)


# --- what users do ----------------------------------------------------------------------------------------------------


def test_list_models_builds_all():
    for name in models.list_models():
        model = on_meta(models.create_model, name=name, num_classes=3, in_channels=1)
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert (layers[0].in_channels, layers[-1].out_features) == (1, 3), name
    with pytest.raises(ValueError, match=r"unknown model 'resnet19', expected one of"):
        models.create_model("resnet19")


def test_multi_head():
    model = models.resnet34_multi_head({"a": 11, "b": 168, "c": 7})
    assert model.trunk.conv1.in_channels == 1
    out = model(torch.randn(2, 1, 33, 40))
    assert {name: tuple(logits.shape) for name, logits in out.items()} == {"a": (2, 11), "b": (2, 168), "c": (2, 7)}
    sum(logits.sum() for logits in out.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    default = on_meta(models.resnet34_multi_head).heads.values()
    assert [head.out_features for head in default] == [11, 168, 7]


def test_multi_head_takes_other_trunks():
    assert models.MultiHead(on_meta(models.mobilenet_v2), {"a": 2}).heads["a"].in_features == 1280
    assert models.MultiHead(nn.Flatten(), {"a": 2}, in_features=12)(torch.randn(3, 3, 2, 2))["a"].shape == (3, 2)
    with pytest.raises(ValueError, match=r"Flatten has no linear layer .* give in_features"):
        models.MultiHead(nn.Flatten(), {"a": 2})
    with pytest.raises(ValueError, match="at least one head"):
        models.MultiHead(on_meta(models.resnet18), {})


@pytest.mark.parametrize("build", [models.resnet18, models.cifar_resnet20, models.preact_resnet_cifar], ids=str)
def test_greyscale(build):
    assert build(in_channels=1, num_classes=2)(torch.randn(2, 1, 33, 33)).shape == (2, 2)


def test_frozen_batch_norm_survives_train():
    model = fr.freeze_batch_norm(models.resnet18(num_classes=2))
    before = copy.deepcopy(statistics(model))
    step(model, torch.randn(2, 3, 33, 33), torch.tensor([0, 1]))
    assert model.training
    assert not any(bn.training for bn in batch_norms(model))
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
    assert all(bn.weight.grad is None and bn.bias.grad is None for bn in batch_norms(model))
    assert model.conv1.weight.grad is not None
    fr.freeze_batch_norm(model, False)
    assert all(bn.training for bn in batch_norms(model))


def test_transfer_learning_replaces_the_head():
    model = models.resnet18()
    model.requires_grad_(False)
    model.fc = nn.Linear(512, 2)
    F.cross_entropy(model(torch.randn(2, 3, 33, 33)), torch.tensor([0, 1])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_only(name):
    model, features = (seeded(getattr(models, name), features_only=only).eval() for only in (False, True))
    wide = 4 if name == "resnet50" else 1
    assert features.feature_info.channels() == [64, *(wide * c for c in (64, 128, 256, 512))]
    assert features.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert list(features.state_dict()) == [key for key in model.state_dict() if not key.startswith("fc.")]
    x = torch.randn(1, 3, 65, 64)
    with torch.no_grad():
        maps = features(x)
        assert [m.shape[1] for m in maps] == features.feature_info.channels()
        assert [m.shape[2] for m in maps] == [33, 17, 9, 5, 3]
        assert torch.equal(model.fc(maps[-1].mean((2, 3))).argmax(), model(x).argmax())


def test_features_out_indices():
    features = models.resnet18(features_only=True, out_indices=(-4, 2))
    assert features.feature_info.module_name() == ["layer1", "layer2"]
    assert not any(key.startswith(("layer3", "layer4", "fc")) for key in features.state_dict())
    features.load_state_dict(models.resnet18().state_dict())  # the rest is passed over
    assert [m.shape[1] for m in features(torch.randn(1, 3, 33, 33))] == [64, 128]
    dilated = on_meta(models.resnet50, features_only=True, replace_stride_with_dilation=[False, False, True])
    assert dilated.feature_info.reduction() == [2, 4, 8, 16, 16]
    for wrong in ((), (5,), (0, -6)):
        with pytest.raises(ValueError, match="out_indices must be"):
            models.resnet18(features_only=True, out_indices=wrong)
    with pytest.raises(ValueError, match="needs features_only=True"):
        models.resnet18(out_indices=(1,))


@pytest.mark.parametrize(
    "build",
    [
        models.cifar_resnet20,
        models.mobilenet_v2,
        models.preact_resnet_cifar,
        models.resnet34_multi_head,
        lambda: models.resnet18(features_only=True),
        lambda: models.resnet50(stride_on="1x1", shortcut="A", lean=True),
    ],
    ids=["cifar", "mobilenet_v2", "preact", "multi_head", "features", "resnet50"],
)
def test_models_deepcopy_and_pickle(build):
    model = build().eval()
    x = torch.randn(1, 1 if isinstance(model, models.MultiHead) else 3, 33, 33)
    with torch.no_grad():
        outputs = [m(x) for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))]
    first, *others = [list(out.values()) if isinstance(out, dict) else list(out) for out in outputs]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "build",
    [models.resnet18, models.cifar_resnet20, models.mobilenet_v1, models.mobilenet_v2, models.preact_resnet_cifar],
    ids=["resnet18", "cifar", "mobilenet_v1", "mobilenet_v2", "preact"],
)
def test_lean_gives_the_same(build):
    """The same gradients, and running statistics that are updated once."""
    x, labels = torch.randn(2, 3, 33, 33), torch.tensor([0, 1])
    full, lean = (seeded(build, num_classes=2, lean=lean) for lean in (False, True))
    gradients = []
    for model in (full, lean):
        torch.manual_seed(1)  # dropout
        gradients.append(step(model, x, labels))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(full.buffers(), lean.buffers(), strict=True))
    assert {int(bn.num_batches_tracked) for bn in batch_norms(lean)} == {1}


def test_lean_keeps_less():
    def kept(lean):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            models.cifar_resnet20(lean=lean)(torch.randn(2, 3, 32, 32))
        return sum(sizes)

    assert kept(True) < kept(False) / 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.resnet18(shortcut="D"), "shortcut must be one of"),
        (lambda: models.resnet18(stride_on="1x1"), "is an option of bottleneck blocks, got BasicBlock"),
        (lambda: models.resnet50(stride_on="2x2"), "stride_on must be '3x3' or '1x1'"),
        (lambda: models.resnet50(replace_stride_with_dilation=[True]), "must be None or have 3 elements"),
        (lambda: models.CIFARResNet(21), r"depth must be 6n \+ 2"),
        (lambda: models.PreActBlock(8, 16), "only where pool=True"),
        (lambda: models.MobileNetV2(inverted_residual_setting=[]), "rows of 4 values"),
    ],
    ids=["shortcut", "stride_on", "stride_on_value", "dilation", "depth", "preact", "mobilenet_v2"],
)
def test_models_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        on_meta(build)


def test_hooks_on_children_are_called():
    """A hooked child runs by itself, and the network's output stays."""
    model = models.mobilenet_v2().eval()
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        expected = model(x)
        seen = []
        for child in (model.features[0][2], model.features[3].conv, model.features[5].conv[0][0]):
            child.register_forward_hook(lambda *_: seen.append(1))
        assert largest(model(x), expected) < tolerance("model_eval_fp32")
    assert len(seen) == 3
