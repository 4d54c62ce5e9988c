"""Every convolution of ResNet-18/34/50 and MobileNetV2 with scale, shift, residual and activation, fused, beside the
device's library (cuDNN, oneDNN) with batch norm, sum and activation after it. A problem that several layers pose is
measured once.
"""

import torch
from torch import Tensor

from bench.floors import conv_forward
from bench.networks import Layer, distinct_layers
from bench.suites.common import Ready, image, operator_limit, relative_error, system_for
from bench.systems import find
from fused_resnet.modules.unit import ACT_FUNCTIONS
from fused_resnet.options import DTYPES

TASKS = {None: "layer"}
MODELS = ("resnet18", "resnet34", "resnet50", "mobilenet_v2")
QUICK_MODELS = ("resnet50",)
BATCHES = {"cpu": (16,), "cuda": (256,)}
WINDOWS = {"cpu": 0.15, "cuda": 0.02}


def cases(options):
    for dtype in options.dtypes:
        for batch in options.batches:
            for layer, used_by in distinct_layers(options.models, batch, options.size).items():
                yield {
                    "device": options.device,
                    "dtype": dtype,
                    "batch": batch,
                    "layer": layer.to_dict(),
                    "used_by": used_by,
                }


def title(case) -> str:
    return f"{case['layer']['label']}  batch {case['batch']} {case['dtype']}"


def tensors(layer: Layer, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x, weight, scale, shift and residual; outputs are of the size of 1."""
    fan_in = layer.weight[1] * layer.weight[2] * layer.weight[3]
    weight = (image(layer.weight, "fp32", device) / fan_in**0.5).to(DTYPES[dtype])
    scale, shift = torch.rand(layer.weight[0]) + 0.5, torch.randn(layer.weight[0])
    residual = image(layer.output, dtype, device) if layer.residual else None
    return image(layer.x, dtype, device), weight, scale.to(device), shift.to(device), residual


def formula(layer: Layer, given) -> Tensor:
    """The layer in fp64."""
    x, weight, scale, shift, residual = (None if t is None else t.double() for t in given)
    y = torch.nn.functional.conv2d(x, weight, **layer.geometry) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    return ACT_FUNCTIONS[layer.act](y if residual is None else y + residual)


def prepare(case, system) -> Ready:
    subject, layer, dtype = system_for(system, case["device"]), Layer.of(case["layer"]), case["dtype"]
    given = tensors(layer, dtype, case["device"])
    with torch.inference_mode():
        truth = formula(layer, given)
        eager_error = relative_error(find("eager").layer(layer, given)(), truth)
        call = subject.layer(layer, given)
        error = relative_error(call(), truth)
    numbers = {"eager_error": eager_error}
    return Ready(call, case["device"], error=error, limit=operator_limit(eager_error, dtype), numbers=numbers)


def cost(case):
    return conv_forward(Layer.of(case["layer"]), case["dtype"])
