"""Floors against layers computed by hand, and networks against figures computed independently."""

import pytest

from bench import floors
from bench.networks import Layer, distinct_layers, network

# 1x1, 64 -> 256 channels, 56 x 56, two images, with a residual.
POINTWISE = Layer((2, 64, 56, 56), (256, 64, 1, 1), residual=True)
# 2 * (2 * 56 * 56 * 256) outputs * 64 products
POINTWISE_FLOPS = 205_520_896
# x 2 * 64 * 56 * 56, weight 256 * 64, residual and output 2 * 256 * 56 * 56 each
POINTWISE_ELEMENTS = 401_408 + 16_384 + 1_605_632 + 1_605_632

DEPTHWISE = Layer((1, 32, 10, 10), (32, 1, 3, 3), (2, 2), (1, 1), groups=32)


def test_layer_output_and_label():
    assert POINTWISE.output == (2, 256, 56, 56)
    assert POINTWISE.label == "1x1 64->256 56px +residual"
    assert DEPTHWISE.output == (1, 32, 5, 5)
    assert DEPTHWISE.label == "3x3 /2 depthwise 32 10px"
    stem = Layer((1, 3, 224, 224), (64, 3, 7, 7), (2, 2), (3, 3))
    assert stem.output == (1, 64, 112, 112)
    dilated = Layer((1, 8, 20, 20), (8, 8, 3, 3), padding=(2, 2), dilation=(2, 2))
    assert dilated.output == (1, 8, 20, 20)


def test_layer_round_trip():
    assert Layer.of(POINTWISE.to_dict()) == POINTWISE
    assert Layer.of({**POINTWISE.to_dict(), "x": [2, 64, 56, 56]}) == POINTWISE


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_conv_forward_by_hand(dtype, size):
    cost = floors.conv_forward(POINTWISE, dtype)
    assert cost.flops == POINTWISE_FLOPS
    assert cost.bytes == size * POINTWISE_ELEMENTS


def test_depthwise_by_hand():
    cost = floors.conv_forward(DEPTHWISE, "fp32")
    assert cost.flops == 2 * 25 * 32 * 9
    assert cost.bytes == 4 * (3200 + 288 + 800)


def test_conv_backward_by_hand():
    cost = floors.conv_backward(DEPTHWISE, "fp32")
    assert cost.flops == 2 * (2 * 25 * 32 * 9)
    assert cost.bytes == 2 * 4 * (3200 + 288 + 800)
    assert floors.conv_backward(DEPTHWISE, "fp32", input_gradient=False).bytes == 4 * (3200 + 288 + 800)


def test_floor_is_the_larger_of_both_and_sums_over_parts():
    cost = floors.Cost(((100.0, 10.0),)) + floors.Cost(((10.0, 30.0),))
    assert cost.floor_s(peak=10.0, bandwidth=10.0) == 10.0 + 3.0
    assert (cost.flops, cost.bytes) == (110.0, 40.0)


def test_convolution_with_batch_norm_by_hand():
    forward, backward = (f(DEPTHWISE, "fp32") for f in (floors.conv_bn_act_forward, floors.conv_bn_act_backward))
    assert forward.bytes == 4 * (3200 + 288 + 800 + 2 * 800)
    assert backward.bytes == 4 * (5 * 800 + 2 * (3200 + 288 + 800))
    assert (forward.flops, backward.flops) == (14_400, 28_800)


def test_operators_around_the_convolutions_by_hand():
    shape, elements = (2, 8, 3, 5), 240
    assert floors.bn_act_forward(shape, "bf16", residual=False).bytes == 2 * 3 * elements
    assert floors.bn_act_forward(shape, "bf16", residual=True).bytes == 2 * 4 * elements
    assert floors.bn_act_backward(shape, "fp32", residual=False).bytes == 4 * 5 * elements
    assert floors.bn_act_backward(shape, "fp32", residual=True).bytes == 4 * 6 * elements
    assert floors.add_act_forward(shape, "fp32").bytes == floors.add_act_backward(shape, "fp32").bytes == 12 * elements
    assert floors.max_pool_forward((1, 1, 4, 4), (1, 1, 2, 2), "fp32").bytes == 4 * (16 + 4)


# GFLOP and MB an image, and images a second at 790 TFLOP/s and 4.3 TB/s in bf16 at batch 256: from the shapes of
# He et al. 2015, table 1, by a program of its own. The classifier, which is not in those figures, is within 1 %.
@pytest.mark.parametrize(
    ("name", "gflop", "megabytes", "images"),
    [
        ("resnet18", 3.63, 12.9, 185_000),
        ("resnet34", 7.33, 19.3, 99_000),
        ("resnet50", 8.17, 56.8, 59_400),
        ("resnet101", 15.6, 84.2, 36_200),
        ("resnet152", 23.0, 118, 25_200),
    ],
)
def test_networks_floor(name, gflop, megabytes, images):
    cost = floors.network_forward(network(name, 256), "bf16")
    assert cost.flops / 256 / 1e9 == pytest.approx(gflop, rel=0.01)
    assert cost.bytes / 256 / 1e6 == pytest.approx(megabytes, rel=0.01)
    assert 256 / cost.floor_s(790e12, 4.3e12) == pytest.approx(images, rel=0.01)


def test_training_floor_has_three_products_a_layer_but_two_in_the_first():
    found = network("resnet18", 2)
    forward, training = (f(found, "fp32") for f in (floors.network_forward, floors.network_training))
    products = sum(floors.conv_forward(layer, "fp32").flops for _, layer in found.layers)
    assert training.flops == forward.flops + 2 * products - floors.conv_forward(found.layers[0][1], "fp32").flops


def test_every_convolution_is_listed():
    for name, count in (("resnet18", 20), ("resnet34", 36), ("resnet50", 53), ("mobilenet_v2", 52)):
        assert len(network(name, 1).layers) == count
    found = distinct_layers(["resnet18", "resnet34", "resnet50", "mobilenet_v2"], 1)
    assert sum(len(layers) for used_by in found.values() for layers in used_by.values()) == 20 + 36 + 53 + 52
    assert len(found) == len(set(found))
    names = {layer for used_by in found.values() for layer in used_by.get("resnet50", [])}
    assert {"conv1", "layer1.0.downsample.0", "layer4.2.conv3"} <= names
    residuals = [layer for layer, used_by in found.items() if layer.residual and "resnet50" in used_by]
    assert sum(len(found[layer]["resnet50"]) for layer in residuals) == 16  # one a block
