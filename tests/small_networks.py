"""A small residual network of plain PyTorch, and what the tests of `fuse` do with it."""

from collections.abc import Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from networks import calibrate, seeded
from tolerances import assert_two_times, tolerance
from torch import Tensor, nn

from fused_resnet.fusion import run

CHANNELS = 8


class Block(nn.Module):
    """As torchvision's BasicBlock."""

    def __init__(self, inputs: int = CHANNELS, outputs: int = CHANNELS, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Net(nn.Module):
    """Stem, two blocks, a head; `doubled` is an attribute that the forward reads."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.act = nn.ReLU()
        self.blocks = nn.Sequential(Block(), Block(CHANNELS, 2 * CHANNELS, 2))
        self.dropout = nn.Dropout2d(0.0)
        self.fc = nn.Linear(2 * CHANNELS, classes)
        self.doubled = False

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.blocks(self.act(self.bn(self.conv(x))))
        y = self.dropout(y).mean((-2, -1))
        return self.fc(y) * scale * (2.0 if self.doubled else 1.0)


def net(dtype: torch.dtype = torch.double) -> nn.Module:
    """The network, its running statistics those of some images."""
    return calibrate(seeded(Net), images(8, dtype=torch.float)).to(dtype)


def images(count: int = 4, size: tuple[int, int] = (9, 8), dtype: torch.dtype = torch.double) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count), dtype=dtype)


def labels(count: int = 4) -> Tensor:
    return torch.arange(count) % 5


def assert_near(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], what: str = "output") -> None:
    """The same formula in fp64: each tensor within its own bound, and a floor of rounding of the largest of all."""
    assert len(found) == len(expected), f"{what}: {len(found)}, not {len(expected)}"
    largest = max((t.abs().max().item() for t in expected if t is not None and t.numel()), default=0.0)
    for i, (mine, eager) in enumerate(zip(found, expected, strict=True)):
        assert (mine is None) == (eager is None), f"{what} {i}"
        if mine is None or not eager.numel():
            continue
        assert mine.shape == eager.shape, f"{what} {i}: shape"
        assert mine.dtype == eager.dtype, f"{what} {i}: dtype"
        bound = tolerance("model_fp64") * eager.abs().max() + tolerance("model_fp64_floor") * largest
        error = (mine - eager).abs().max()
        assert error <= bound, f"{what} {i}: error {error:.2e}, bound {bound:.2e}"


def training_step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Loss, gradients of the input and of all parameters, and the buffers, after a step in train mode or another."""
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    loss = F.cross_entropy(model(leaf), labels(len(x)))
    loss.backward()
    gradients = [leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    return [loss.detach(), *gradients, *(b.double() for b in model.buffers())]


def assert_as(mine: nn.Module, eager: nn.Module, x: Tensor | None = None) -> None:
    """The two do the same in the modes they are in, with gradients and without; in fp64."""
    x = images() if x is None else x
    with torch.no_grad():
        assert_near([mine(x)], [eager(x)])
    assert_near(training_step(mine, x), training_step(eager, x), "tensor of a step")


def assert_two_times_as(mine: nn.Module, eager: nn.Module, truth: nn.Module, x: Tensor) -> None:
    """The two-times rule for the output, in the dtype of `mine`."""
    with torch.no_grad():
        assert_two_times(mine(x), eager(x), truth(x.double()), floor="floor_ulps_block")


def is_running_fused(model: nn.Module, x: Tensor) -> bool:
    """Whether programs run, and find blocks to fuse."""
    with mock.patch.object(run, "chain", wraps=run.chain) as chain:
        model(x)
    return chain.called
