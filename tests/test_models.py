"""What users do with networks: list, build, freeze, extract features, copy, save, hook."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import batch_norms, largest, on_meta, seeded, statistics, step
from tolerances import tolerance
from torch import nn

import fused_resnet as fr
from fused_resnet import models


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


@pytest.mark.parametrize(
    "build", [models.resnet18, models.cifar_resnet20, models.preact_resnet_cifar], ids=lambda build: build.__name__
)
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
        maps, model = {}, models.cifar_resnet20(lean=lean)
        weights = {p.data_ptr() for p in model.parameters()}

        def keep(t):
            if t.dim() == 4 and t.data_ptr() not in weights:
                maps[t.data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(torch.randn(2, 3, 32, 32))
        return sum(t.numel() for t in maps.values())

    assert kept(True) < 0.75 * kept(False)  # of each block one convolution's output and the block's, instead of three


@pytest.mark.parametrize("norm_layer", [None, lambda channels: torch.nn.GroupNorm(4, channels)], ids=["bn", "gn"])
@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenet_v1", "mobilenet_v2", "preact_resnet_cifar"])
def test_lean_is_the_same(name, norm_layer):
    """Also where blocks cannot run as one operator, and are computed again as a whole."""
    options = {} if norm_layer is None or name == "mobilenet_v1" else {"norm_layer": norm_layer}
    if name.startswith("mobilenet"):
        options["dropout"] = 0.0
    x, found = torch.randn(4, 3, 32, 32), []
    for lean in (False, True):
        torch.manual_seed(0)
        model = getattr(models, name)(lean=lean, **options).train()
        torch.manual_seed(1)  # of dropout
        y = model(x)
        torch.manual_seed(2)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for plain, lean in zip(*found, strict=True):
        torch.testing.assert_close(lean, plain, rtol=tolerance("other_backend"), atol=tolerance("other_backend"))


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
