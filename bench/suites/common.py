"""What the suites share: how a case is handed over, how data are made, how a result is checked."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet as fr
from bench.systems import find
from fused_resnet.modules.unit import unfused
from fused_resnet.options import DTYPES

# Largest error over the largest value, against the plain network in fp32: rounding of up to 152 layers in fp32 (6e-8
# each), and in bf16 and fp16 (8 and 11 bits).
NETWORK_LIMITS = {"fp32": 2e-5, "bf16": 3e-2, "fp16": 5e-3}

# The same for a single operator, against fp64: in fp32 a channel's sum over 200,000 pixels is some 450 roundings of
# 6e-8 at random; in bf16 and fp16 the output's own rounding, and those of what it is made of, are far more.
OPERATOR_LIMITS = {"fp32": 5e-5, "bf16": 2e-2, "fp16": 2e-3}

FEWEST_CLASSES = 10  # every network has as many: labels are drawn from these


@dataclass
class Ready:
    """A case that is prepared for one system: what is timed, and how wrong it is."""

    call: Callable[[], Any]
    device: str
    network: bool = False  # timed as its user sees it, the way through Python included
    gradients: bool = False
    error: float | None = None
    limit: float | None = None
    numbers: dict = field(default_factory=dict)


def set_up(device: str) -> None:
    """fp32 is fp32 and not TF32, for every system; cuDNN may choose its fastest kernels."""
    torch.manual_seed(0)
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True


def image(shape, dtype: str, device: str) -> Tensor:
    """Random numbers, channels_last; every system has the same, as its process was seeded."""
    values = torch.randn(*shape, device=device).to(DTYPES[dtype])
    return values.contiguous(memory_format=torch.channels_last)


def trained_like(name: str, size: int, **options) -> nn.Module:
    """A network with running statistics of random images: with a new one's the outputs of a deep network explode."""
    model = fr.create_model(name, **options)
    with torch.no_grad(), fr.use_backend("reference"):
        model.train()(torch.randn(8, 3, size, size))
    return model.eval()


def on_device(model: nn.Module, dtype: str, device: str) -> nn.Module:
    return copy.deepcopy(model).to(device, DTYPES[dtype]).to(memory_format=torch.channels_last)


def plain_output(model: nn.Module, x: Tensor) -> Tensor:
    """What the plain network makes of x."""
    with torch.inference_mode(), unfused():
        return model(x)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """max|found - truth| / max|truth|; infinite where `found` is not finite."""
    found = found.detach().to(truth.device, truth.dtype)
    if found.shape != truth.shape or not torch.isfinite(found).all():
        return float("inf")
    return ((found - truth).abs().max() / truth.abs().max()).item()


def operator_limit(eager_error: float, dtype: str) -> float:
    """Twice eager's error and four roundings, and never more than the dtype can explain."""
    return min(2 * eager_error + 4 * torch.finfo(DTYPES[dtype]).eps, OPERATOR_LIMITS[dtype])


def system_for(name: str, device: str):
    """The system; set up for `device`."""
    set_up(device)
    return find(name)
