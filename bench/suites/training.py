"""A training step: forward, loss, backward, SGD. fp32, or autocast as people train; channels_last."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from bench.floors import network_training
from bench.networks import network
from bench.suites.common import FEWEST_CLASSES, Ready, image, system_for
from bench.suites.models import cases as cases
from bench.suites.models import images as images
from bench.systems import find
from fused_resnet.options import DTYPES

TASKS = {None: "training"}
MODELS = ("resnet18", "resnet50")
QUICK_MODELS = ("resnet50",)
BATCHES = {"cpu": (16,), "cuda": (256,)}
WINDOWS = {"cpu": 3.0, "cuda": 0.5}

# Largest relative difference of the loss and of the gradient's norm of the first step from eager's: rounding of the
# forward and backward pass; a ReLU whose sign it decides moves a gradient by more.
LIMITS = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 2e-2}


def title(case) -> str:
    return f"{case['model']} training step  batch {case['batch']} {case['dtype']}"


class Step:
    """One step of SGD on one batch."""

    def __init__(self, model: nn.Module, forward, x: Tensor, target: Tensor, dtype: str):
        self.model, self.forward, self.x, self.target = model, forward, x, target
        self.autocast = dtype != "fp32"
        self.dtype = DTYPES[dtype]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def loss(self) -> Tensor:
        with torch.autocast(self.x.device.type, self.dtype) if self.autocast else contextlib.nullcontext():
            return F.cross_entropy(self.forward(self.x).float(), self.target)

    def __call__(self) -> Tensor:
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss

    def first(self) -> tuple[float, float]:
        """The loss and the gradient's norm of a step."""
        loss = self().item()
        return loss, torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item()


def step(case, subject) -> Step:
    """Every system starts from the same weights and the same batch."""
    torch.manual_seed(0)
    device, size = case["device"], case["size"]
    model = fr.create_model(case["model"], **subject.model_options)
    model = model.to(device).to(memory_format=torch.channels_last).train()
    x = image((case["batch"], 3, size, size), "fp32", device)
    target = torch.randint(FEWEST_CLASSES, (case["batch"],)).to(device)
    return Step(model, subject.forward(model), x, target, case["dtype"])


def prepare(case, system) -> Ready:
    subject = system_for(system, case["device"])
    expected = step(case, find("eager")).first()
    call = step(case, subject)
    found = call.first()
    error = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    limit = LIMITS[case["dtype"]]
    return Ready(call, case["device"], network=True, gradients=True, error=error, limit=limit)


def cost(case):
    return network_training(network(case["model"], case["batch"], case["size"]), case["dtype"])
