"""How wrong a network is: its output, and the gradients of a training step, against fp64, beside eager's error."""

import copy

import torch
import torch.nn.functional as F

import fused_resnet as fr
from bench.suites import models
from bench.suites.common import FEWEST_CLASSES, image, on_device, plain_output, system_for, trained_like
from fused_resnet.modules.unit import unfused
from fused_resnet.options import DTYPES

TASKS = models.MODE_TASKS
cases = models.mode_cases
MODELS = ("resnet18", "resnet50", "mobilenet_v2")
QUICK_MODELS = ("resnet18",)
BATCHES = {"cpu": (4,), "cuda": (32,)}
PEERS = ("eager",)


def title(case) -> str:
    return f"{case['model']} {case['mode']} error  batch {case['batch']} {case['dtype']}"


def values(case, system) -> dict:
    """`max_error`: the largest over the largest value; `rms_error`: root mean square over that of the truth."""
    subject = system_for(system, case["device"])
    found, truth = (_inference if case["mode"] == "inference" else _gradients)(case, subject)
    found, truth = found.double().cpu(), truth.cpu()
    error = found - truth
    return {
        "max_error": (error.abs().max() / truth.abs().max()).item(),
        "rms_error": (error.norm() / truth.norm()).item(),
    }


def _inference(case, subject):
    plain, device = trained_like(case["model"], case["size"]), case["device"]
    pixels = image((case["batch"], 3, case["size"], case["size"]), case["dtype"], device)
    truth = plain_output(on_device(plain, "fp64", device), pixels.double())
    with torch.inference_mode():
        return subject.network(on_device(plain, case["dtype"], device), pixels)(), truth


def _gradients(case, subject):
    """Of all parameters, in one vector; in low precision under autocast."""
    device, low = case["device"], case["dtype"] != "fp32"
    model = fr.create_model(case["model"], **subject.model_options).to(device).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()
    x = image((case["batch"], 3, case["size"], case["size"]), "fp32", device)
    target = torch.randint(FEWEST_CLASSES, (case["batch"],)).to(device)

    def gradients(network, forward, x):
        with torch.autocast(x.device.type, DTYPES[case["dtype"]], enabled=low and x.dtype != torch.float64):
            y = forward(x)
        y = y if y.dtype == torch.float64 else y.float()
        F.cross_entropy(y, target).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    with unfused():
        truth = gradients(exact, exact, x.double())
    return gradients(model, subject.forward(model), x), truth
