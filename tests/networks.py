"""What the tests of whole networks share."""

import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch import nn

import fused_resnet as fr


def largest(value, truth):
    """max|value - truth| / max|truth|."""
    return ((value.double() - truth.double()).abs().max() / truth.double().abs().max()).item()


def relative(value, truth):
    """|value - truth| / |truth|, Euclidean norms."""
    return ((value - truth).norm() / truth.norm()).item()


def nonzero(tensors):
    """Indices of those that are more than rounding: of the others there is no relative error."""
    scale = max(t.norm() for t in tensors)
    return [i for i, t in enumerate(tensors) if t.norm() > 1e-9 * scale]


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def seeded(build, seed=0, **kwargs):
    torch.manual_seed(seed)
    return build(**kwargs)


def step(model, x, labels):
    """One forward and backward pass in training mode; the gradients of all parameters."""
    model.train()
    F.cross_entropy(model(x), labels).backward()
    return [p.grad for p in model.parameters()]


def statistics(model):
    return [b for b in model.buffers() if b.is_floating_point()]


def network_errors(found, truth):
    """The median and the largest of all tensors' relative errors."""
    errors = torch.tensor([relative(found[i], truth[i]) for i in nonzero(truth)])
    return errors.median().item(), errors.max().item()


def assert_network_two_times(mine, eager, truth, other=None):
    """The two-times rule for the median and for the largest error; returns the larger of the two ratios.

    `other`: eager in its other layout, in which oneDNN sums in another order: the larger error of both counts.
    """
    found, plain = network_errors(mine, truth), network_errors(eager, truth)
    if other is not None:
        plain = map(max, zip(plain, network_errors(other, truth), strict=True))
    ratios = []
    for error, allowed in zip(found, plain, strict=True):
        assert error <= tolerance("two_times") * allowed + tolerance("model_floor")
        ratios.append(error / max(allowed, tolerance("model_floor")))
    return max(ratios)


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


def on_meta(build, **kwargs):
    with torch.device("meta"):
        return build(**kwargs)


def assert_training_step(name: str, backend: str, device, batch: int, **options) -> None:
    """A step at 32x32 by a backend: gradients of all parameters, and the running statistics, by the two-times rule."""
    found = {}
    for kind, by, dtype in (
        ("truth", "reference", torch.float64), ("plain", "reference", torch.float32), ("own", backend, torch.float32)
    ):  # fmt: skip
        model = seeded(getattr(fr.models, name), num_classes=10, **options).to(device, dtype)
        torch.manual_seed(1)
        x, labels = torch.randn(batch, 3, 32, 32).to(device, dtype), torch.randint(10, (batch,)).to(device)
        with fr.use_backend(by):
            torch.manual_seed(2)  # of dropout
            gradients = step(model, x.contiguous(memory_format=torch.channels_last), labels)
        found[kind] = [[t.cpu().double() for t in tensors] for tensors in (gradients, statistics(model))]
    for i in range(2):
        assert_network_two_times(found["own"][i], found["plain"][i], found["truth"][i])
