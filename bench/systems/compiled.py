"""torch.compile of the plain network."""

import importlib.util

import torch

from bench.systems.base import System
from fused_resnet.modules.unit import unfused


class Compile(System):
    """The default mode."""

    name = "compile"
    tasks = ("network", "training")
    freezing = False

    def options(self) -> dict:
        return {}

    def missing(self, device: str) -> str:
        if device != "cpu" and importlib.util.find_spec("triton") is None:
            return "triton not installed (pip install triton)"
        return ""

    def imports(self) -> None:
        import torch._inductor.compile_fx  # noqa: F401

    def forward(self, model):
        import torch._inductor.config as inductor

        inductor.freezing = self.freezing
        compiled = torch.compile(model, **self.options())

        def run(x):
            with unfused():  # whatever is compiled, now or for a new size, is the plain network
                return compiled(x)

        return run


class CompileMaxAutotune(Compile):
    """With autotuned kernels, and CUDA graphs on a GPU."""

    name = "compile-max-autotune"
    devices = ("cuda",)

    def options(self) -> dict:
        return {"mode": "max-autotune"}


class CompileFreezing(Compile):
    """With the weights as constants, so that batch norm is folded into them; on a GPU autotuned as well."""

    name = "compile-freezing"
    tasks = ("network",)
    freezing = True

    def options(self) -> dict:
        return {"mode": "max-autotune"} if torch.cuda.is_available() else {}
