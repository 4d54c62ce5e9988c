"""Networks beside their papers: multiply-adds, layers, parameters, shortcuts and formulas."""

import pytest
import torch
import torch.nn.functional as F
from networks import calibrate, largest, on_meta, parameters
from tolerances import tolerance
from torch import nn

import fused_resnet as fr
from fused_resnet import models
from fused_resnet.modules.blocks import BasicBlock, Bottleneck, PadShortcut


def multiply_adds(model, *size):
    """Multiplications of convolutions and linear layers, counted without computing."""
    counts = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda m, _, out: counts.append(out.numel() * m.weight[0].numel()))
    model.eval()(torch.empty(1, *size, device="meta"))
    return sum(counts)


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
