"""Maps of more than 2^31 elements on the GPU, where an index of 32 bits is negative (t832).

The same bodies run on the CPU over small maps. Values are chosen so that every channel has mean 0 and variance 1, and
that no result is rounded in bf16: each image, computed again by itself, is compared with `torch.equal`.
"""

import pytest
import torch
from devices import on_devices, skip_without
from problems import poisoned, require
from torch import Tensor

from fused_resnet.ops import add_act, bn_act, conv_scale_act

poison = pytest.fixture(autouse=True)(poisoned)

SHAPES = {"cpu": (3, 16, 5, 8), "cuda": (3, 64, 3344, 3348)}
sizes = on_devices()


def test_shape_is_large():
    n, c, h, w = SHAPES["cuda"]
    assert n * c * h * w >= 2**31 + 1
    assert c * h * w < 2**31  # aten's convolutions split the batch


def room_for(device: str, bytes_each: int) -> None:
    """Skip where `bytes_each` for every element are not free: the reference's maps are fp32, and it keeps several."""
    if device == "cuda":
        n, c, h, w = SHAPES[device]
        skip_without(n * c * h * w * bytes_each)


def pattern(device: str, kind: str) -> Tensor:
    """[N, C, H, W] of 1 and -1 in bf16: a row of random signs (a, -a, a, -a) as "x", (b, b, -b, -b) as "grad".

    The sum of each is 0 in every row, and the sum of their product as well where a is b. Images and channels differ by
    a sign, so that one is not mistaken for another.
    """
    n, c, h, w = SHAPES[device]
    quarter = torch.randint(2, (h, w // 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    signs = {"x": (1, -1, 1, -1), "grad": (1, 1, -1, -1)}[kind]
    base = torch.cat([quarter * sign for sign in signs], 1).to(device, torch.bfloat16)
    outer = torch.randint(2, (n, c, 1, 1), generator=torch.Generator().manual_seed(1)) * 2 - 1
    out = torch.empty(n, c, h, w, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last)
    return torch.mul(outer.to(device, torch.bfloat16), base, out=out)


def per_channel(device: str, values) -> Tensor:
    c = SHAPES[device][1]
    return torch.tensor([values[i % len(values)] for i in range(c)], dtype=torch.float32, device=device)


def assert_images(found: Tensor, formula) -> None:
    """Image by image: the whole in fp32 would not fit beside what is tested."""
    for i, image in enumerate(found):
        assert torch.equal(image, formula(i)), f"image {i}"


def column(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1).to(torch.bfloat16)


@sizes
def test_bn_act_past_32_bits(device, backend):
    """With eps 3, y = x * weight / 2 + bias; a gradient orthogonal to 1 and x is only scaled on its way back."""
    room_for(device, 40)
    x = pattern(device, "x").requires_grad_()
    require(backend, "bn_act", x.detach())
    weight, bias = per_channel(device, (1.0, 2.0, 4.0)), per_channel(device, (-1.0, 0.0, 3.0))
    y = bn_act(x, weight, bias, None, None, act="none", training=True, eps=3.0, backend=backend)
    scale = column(weight / 2)
    assert_images(y.detach(), lambda i: x.detach()[i] * scale + column(bias))
    grad = pattern(device, "grad")
    (d_x,) = torch.autograd.grad(y, x, grad)
    del y
    assert_images(d_x, lambda i: grad[i] * scale)


@sizes
def test_add_act_past_32_bits(device, backend):
    room_for(device, 20)
    x, residual = pattern(device, "x").requires_grad_(), pattern(device, "grad")
    require(backend, "add_act", x.detach())
    y = add_act(x, residual, backend=backend)
    assert_images(y.detach(), lambda i: torch.relu(x.detach()[i] + residual[i]))
    (d_x,) = torch.autograd.grad(y, x, residual)
    assert_images(d_x, lambda i: residual[i] * (y.detach()[i] > 0))


@sizes
def test_conv_scale_act_past_32_bits(device, backend):
    """A 1x1 convolution that permutes the channels: y = relu(x[:, order] * scale + shift)."""
    room_for(device, 40)
    x, c = pattern(device, "x"), SHAPES[device][1]
    order = torch.randperm(c)
    weight = torch.eye(c)[order].view(c, c, 1, 1).to(x)
    require(backend, "conv_scale_act", x, weight)
    scale, shift = per_channel(device, (0.5, 1.0, 2.0)), per_channel(device, (-1.0, 0.0, 3.0))
    with torch.no_grad():
        y = conv_scale_act(x, weight, scale, shift, backend=backend)
    assert_images(y, lambda i: torch.relu(x[i][order.to(device)] * column(scale) + column(shift)))
