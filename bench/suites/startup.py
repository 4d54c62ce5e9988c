"""Seconds until the first result, in a new process with empty caches: after the imports, at a new batch size, and at a
new image size. A steady call's time is part of each.
"""

import time

MODELS = ("resnet50",)
QUICK_MODELS = ("resnet18",)
BATCHES = {"cpu": (16,), "cuda": (256,)}
FRESH = True
TASKS = {None: "network"}


def cases(options):
    from bench.suites import models

    return models.cases(options)


def title(case) -> str:
    return f"{case['model']} first result  batch {case['batch']} {case['dtype']}"


def values(case, system) -> dict:
    """`import_s`: torch, fused_resnet and what the system needs. A system that serves one shape is built anew."""
    start = time.perf_counter()
    import torch

    from bench.suites.common import NETWORK_LIMITS, image, on_device, plain_output, relative_error, set_up, trained_like
    from bench.systems import find

    subject, device, dtype = find(system), case["device"], case["dtype"]
    subject.imports()
    numbers = {"import_s": time.perf_counter() - start}
    set_up(device)
    plain = trained_like(case["model"], 64)
    batch, size = case["batch"], case["size"]
    shapes = {"first_s": (batch, size), "new_batch_s": (batch // 2 or 2, size), "new_size_s": (batch, size + 32)}
    model = on_device(plain, dtype, device)
    inputs = {name: image((n, 3, s, s), dtype, device) for name, (n, s) in shapes.items()}
    if device != "cpu":
        torch.cuda.synchronize()
    serve, outputs = subject.forward(model), {}
    for name, x in inputs.items():
        start = time.perf_counter()
        with torch.inference_mode():
            outputs[name] = (serve(x) if serve else subject.network(model, x)()).cpu()
        numbers[name] = time.perf_counter() - start
    exact = on_device(plain, "fp32", device)
    errors = [relative_error(outputs[name], plain_output(exact, x.float()).cpu()) for name, x in inputs.items()]
    return {**numbers, "error": max(errors), "limit": NETWORK_LIMITS[dtype]}
