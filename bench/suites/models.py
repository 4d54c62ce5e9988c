"""Inference of whole networks, in images a second, from the call to the output."""

import time

import torch

from bench.floors import network_forward
from bench.networks import network
from bench.suites.common import (
    NETWORK_LIMITS,
    Ready,
    image,
    on_device,
    plain_output,
    relative_error,
    system_for,
    trained_like,
)
from fused_resnet.options import DTYPES

TASKS = {None: "network"}
MODELS = ("resnet18", "resnet34", "resnet50", "mobilenet_v2")
QUICK_MODELS = ("resnet50",)
BATCHES = {"cpu": (16, 1), "cuda": (256, 1, 32)}
WINDOWS = {"cpu": 1.0, "cuda": 0.3}


def cases(options):
    for name in options.models:
        for batch in options.batches:
            for dtype in options.dtypes:
                yield {
                    "device": options.device,
                    "dtype": dtype,
                    "batch": batch,
                    "model": name,
                    "size": options.size,
                }


# Of suites that look at inference and at training.
MODE_TASKS = {"inference": "network", "training": "training"}


def mode_cases(options):
    for mode in MODE_TASKS:
        for case in cases(options):
            yield {**case, "mode": mode}


def title(case) -> str:
    return f"{case['model']} inference  batch {case['batch']} {case['dtype']}"


def prepare(case, system) -> Ready:
    """`ready_s` is the time from a network of torch's modules to the first result."""
    subject, device = system_for(system, case["device"]), case["device"]
    plain = trained_like(case["model"], case["size"])
    pixels = image((case["batch"], 3, case["size"], case["size"]), "fp32", device)
    truth = plain_output(on_device(plain, "fp32", device), pixels).cpu()
    # Made outside inference mode: parameters made inside keep no version, and could not be packed once and for all.
    model = on_device(plain, case["dtype"], device)
    x = pixels.to(DTYPES[case["dtype"]])
    start = time.perf_counter()
    with torch.inference_mode():
        call = subject.network(model, x)
        out = call().cpu()
    numbers = {"ready_s": time.perf_counter() - start}
    error = relative_error(out, truth)
    return Ready(call, device, network=True, error=error, limit=NETWORK_LIMITS[case["dtype"]], numbers=numbers)


def cost(case):
    return network_forward(network(case["model"], case["batch"], case["size"]), case["dtype"])


def images(case) -> int:
    return case["batch"]
