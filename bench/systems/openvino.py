"""OpenVINO, on the CPU."""

import torch

from bench.systems.base import System
from fused_resnet.modules.unit import unfused


class OpenVINO(System):
    """The plain network converted from PyTorch, with its latency preset and torch's number of threads."""

    name = "openvino"
    devices = ("cpu",)
    tasks = ("network",)
    packages = {"openvino": "openvino"}

    def network(self, model, x):
        import openvino as ov

        with unfused():
            converted = ov.convert_model(model.float(), example_input=x.float(), input=[list(x.shape)])
        hints = {
            "INFERENCE_PRECISION_HINT": "f32" if x.dtype == torch.float32 else "bf16",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = ov.Core().compile_model(converted, "CPU", hints).create_infer_request()
        image = x.float().contiguous().numpy()
        return lambda: torch.from_numpy(next(iter(request.infer({0: image}, share_inputs=True).values())))
