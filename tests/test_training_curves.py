"""Losses of the first training steps of whole networks beside eager's, from one seed and on one thread."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from networks import seeded
from tolerances import tolerance

import fused_resnet as fr
from fused_resnet.modules import unit

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, SIZE = 10, 32
LONG, HARSH, SHORT = 50, 25, 10


def batches():
    """Four batches of an image of each class: a colour and a coarse pattern of its own, under noise."""
    random = torch.Generator().manual_seed(3)
    patterns = F.interpolate(torch.randn(CLASSES, 3, 4, 4, generator=random), SIZE)
    patterns = patterns + torch.randn(CLASSES, 3, 1, 1, generator=random)
    for _ in range(4):
        labels = torch.randperm(CLASSES, generator=random)
        yield patterns[labels] + torch.randn(CLASSES, 3, SIZE, SIZE, generator=random) * 0.3, labels


def curve(name, steps, lr, *, fused=False, layout=torch.channels_last, threads=1, dtype=torch.float32):
    """The losses of plain SGD; blocks begin as the identity, so that lr = 0.1 needs no warm-up."""
    model = seeded(getattr(fr, name), num_classes=CLASSES, zero_init_residual=True).train()
    model = model.to(dtype).to(memory_format=layout)
    optimizer, data, losses = torch.optim.SGD(model.parameters(), lr), list(batches()), []
    torch.set_num_threads(threads)
    with contextlib.nullcontext() if fused else unit.unfused():
        for i in range(steps):
            x, labels = data[i % len(data)]
            loss = F.cross_entropy(model(x.to(dtype).contiguous(memory_format=layout)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.double)


@pytest.mark.parametrize(
    ("name", "steps", "dtype"),
    [
        ("resnet18", LONG, torch.float32),
        ("resnet50", SHORT, torch.float64),  # in fp32 eager's own curves part: deep, at 1x1 pixels in the last stage
        pytest.param("resnet50", LONG, torch.float64, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_curves_lie_on_each_other(name, steps, dtype):
    """lr = 0.1: the same losses, and the same bits when it is run again; in the long form the network learns."""
    found, expected = (curve(name, steps, 0.1, fused=fused, dtype=dtype) for fused in (True, False))
    assert (found - expected).abs().max() < tolerance("training_curve") * expected[0]
    if steps == LONG:
        assert found[-4:].mean() < found[0] / 4
    again = curve(name, SHORT // 2, 0.1, fused=True, dtype=dtype)
    assert torch.equal(again, found[: SHORT // 2])


def test_a_harsh_rate_in_fp64():
    """lr = 1: the loss rises to many times the first, and is eager's all along."""
    found, expected = (curve("resnet18", SHORT, 1.0, fused=fused, dtype=torch.double) for fused in (True, False))
    assert expected.max() > 2 * expected[0]
    assert (found - expected).abs().max() < tolerance("model_fp64") * expected.max()


@pytest.mark.slow
def test_a_harsh_rate_spreads_no_wider_than_eager():
    """lr = 1: rounding grows to other losses altogether, in eager as well, whose own spread is the yardstick."""
    plain = [curve("resnet18", HARSH, 1.0, layout=layout) for layout in (torch.channels_last, torch.contiguous_format)]
    plain.append(curve("resnet18", HARSH, 1.0, threads=2))
    found, curves = curve("resnet18", HARSH, 1.0, fused=True), torch.stack(plain)
    spread = (curves.max(0).values - curves.min(0).values).max()
    distance = (curves - found).abs().min(0).values.max()
    assert distance <= tolerance("curve_spread") * spread
    assert torch.equal(curve("resnet18", SHORT, 1.0, fused=True), found[:SHORT])
