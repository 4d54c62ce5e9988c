"""Networks of before ResNet, and a frozen trunk with a new head: fused, they compute and train as eager does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import assert_network_two_times, calibrate, largest, nonzero, relative, seeded, statistics
from problems import poisoned
from tolerances import tolerance
from torch import Tensor, nn

import fused_resnet as fr

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
poison = pytest.fixture(autouse=True)(poisoned)


class LeNet5(nn.Module):
    """LeCun et al. 1998, with ReLU and max pooling: http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf"""

    def __init__(self):
        super().__init__()
        self.c1, self.c3, self.c5 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.Conv2d(16, 120, 5)
        self.f6, self.out = nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c3(x)), 2)
        return self.out(F.relu(self.f6(F.relu(self.c5(x)).flatten(1))))


class Same(nn.Module):
    """Maps that keep their size: 'same' convolutions, an even kernel among them, and max pooling of stride 1."""

    def __init__(self):
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 8, (4, 2), padding="same", dilation=2), nn.BatchNorm2d(8)
        self.keep, self.halve = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(2, ceil_mode=True)
        self.fc = nn.Linear(8 * 16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.keep(F.relu(self.bn_a(self.a(x))))
        x = self.halve(F.relu(self.bn_b(self.b(x)) + x))
        return self.fc(x.flatten(1))


class LocalResponse(nn.Module):
    """Krizhevsky et al. 2012: normalisation over neighbouring channels behind the activation."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.LocalResponseNorm(5, k=2.0), nn.MaxPool2d(3, 2),
            nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.ReLU(), nn.LocalResponseNorm(5, k=2.0),
        )  # fmt: skip
        self.classifier = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def of_torchvision(name, **options):
    return lambda: getattr(models, name)(num_classes=10, **options)


def small_head(name, channels):
    """Without the layers of 4096 units, which take all the time."""

    def make():
        model = getattr(models, name)(num_classes=10)
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 10)
        return model

    return make


def inception():
    """With a window in its auxiliary head that smaller images than 299 have room for."""
    model = models.inception_v3(num_classes=10, **WITH_HEADS)
    model.AuxLogits.conv1 = type(model.AuxLogits.conv1)(128, 768, kernel_size=1)
    return model


WITH_HEADS = {"aux_logits": True, "transform_input": True, "init_weights": False}
# Of each: how to build it, the size of its images, and in how many convolutions of how many something is fused.
NETWORKS = {
    "vgg16": (small_head("vgg16", 512), 32, 13, 13),
    "vgg16_bn": (small_head("vgg16_bn", 512), 32, 13, 13),
    "alexnet": (small_head("alexnet", 256), 64, 5, 5),
    "lenet5": (LeNet5, 32, 3, 3),
    "googlenet": (of_torchvision("googlenet", **WITH_HEADS), 64, 59, 59),
    "inception_v3": (inception, 139, 96, 96),
    "same": (Same, 31, 2, 2),
    "local_response": (LocalResponse, 32, 2, 2),
}
# Behind ReLU and without a shortcut the channels' means are many deviations from zero: batch norm as one multiply-add
# rounds there more often than eager's subtraction first, in the reference backend too. In fp64 it is the same.
MEANS_BEYOND_DEVIATIONS = {"vgg16_bn"}
older = pytest.mark.parametrize("name", NETWORKS)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def network(name):
    """One whose norms know its images, and those images."""
    make, size, *_ = NETWORKS[name]
    model = without_dropout(seeded(make))
    x = torch.randn(4, 3, size, size)
    return calibrate(model, x), x


def outputs(found) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def in_fp64(model):
    return copy.deepcopy(model).double()


@older
def test_eval(name):
    plain, x = network(name)
    fused = fr.fuse(plain)
    report = fr.fusion_report(fused)
    convolutions = {n for n, module in plain.named_modules() if isinstance(module, nn.Conv2d)}
    fused_ones = {n for row in report.fused for n in row.modules} & convolutions
    assert [len(fused_ones), len(convolutions)] == list(NETWORKS[name][2:])
    with torch.no_grad():
        truth, found, eager = in_fp64(plain)(x.double()), fused(x), plain(x)
        assert largest(in_fp64(fused)(x.double()), truth) < tolerance("model_fp64")
    if name in MEANS_BEYOND_DEVIATIONS:
        assert largest(found, eager) < tolerance("model_eval_fp32")
    else:
        assert_network_two_times([found.double()], [eager.double()], [truth])


def training_step(model, x, labels):
    """What a step makes: outputs, gradients of all parameters, running statistics, in fp64."""
    made = outputs(model.train()(x))
    sum(F.cross_entropy(y, labels) * weight for y, weight in zip(made, (1.0, 0.3, 0.3), strict=False)).backward()
    gradients = [p.grad.double() for p in model.parameters()]
    return [y.detach().double() for y in made], gradients, [b.double() for b in statistics(model)]


@older
def test_train(name):
    """A step in fp32 by the two-times rule; auxiliary heads too, whose logits come back in the original's tuple."""
    plain, x = network(name)
    labels, exact = torch.arange(len(x)), in_fp64(plain)
    fused, exact_fused = fr.fuse(plain), fr.fuse(exact)
    truth, same = (training_step(model, x.double(), labels) for model in (exact, exact_fused))
    eager, found = (training_step(model, x, labels) for model in (plain, fused))
    for mine, other, double, true in zip(found, eager, same, truth, strict=True):
        assert len(mine) == len(other)
        assert all(relative(double[i], true[i]) < tolerance("model_fp64") for i in nonzero(true or [torch.zeros(1)]))
        if true and name not in MEANS_BEYOND_DEVIATIONS:
            assert_network_two_times(mine, other, true)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_named_tuples(name):
    plain, x = network(name)
    fused = fr.fuse(plain)
    for training in (True, False):
        found, expected = fused.train(training)(x), plain.train(training)(x)
        assert type(found) is type(expected)
        assert getattr(found, "_fields", None) == getattr(expected, "_fields", None)
        assert isinstance(found, tuple) == training


# --- transfer learning ---


def classifier(dtype=torch.float32):
    """A trunk that is frozen with its running statistics, fused or not, and a head for three classes."""
    return seeded(models.resnet18, num_classes=10).to(dtype)


def trained(model, fused, steps=6):
    """Freeze the trunk, fuse it, replace the head, train: the losses, the trunk before and after."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = fr.fuse(model.eval()) if fused else model.eval()
    trunk = {key: t.clone() for key, t in model.state_dict().items() if not key.startswith("fc.")}
    torch.manual_seed(1)
    model.fc = nn.Linear(512, 3).to(model.conv1.weight.dtype)
    optimizer, losses = torch.optim.SGD(model.fc.parameters(), 0.01), []
    x, labels = torch.randn(6, 3, 32, 32).to(model.conv1.weight.dtype), torch.arange(6) % 3
    for _ in range(steps):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses), trunk, model


def test_transfer_learning():
    losses, trunk, model = trained(classifier(), fused=True)
    after = model.state_dict()
    assert all(torch.equal(after[key], t) for key, t in trunk.items())
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("fc."))
    assert losses[-1] < losses[0]
    eager, truth = trained(classifier(), fused=False)[0], trained(classifier(torch.double), fused=False)[0]
    error, plain = (losses - truth).abs().max(), (eager - truth).abs().max()
    assert error <= tolerance("two_times") * plain + tolerance("model_floor") * truth.max()
