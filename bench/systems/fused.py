"""fused_resnet itself."""

import contextlib

import fused_resnet as fr
from bench.systems.base import Graphed, System


class Fused(System):
    """The modules and operators as a user has them; `backend` names one for everything."""

    name = "fused_resnet"
    tasks = ("network", "layer", "op", "statistics", "training")

    def __init__(self, backend: str = ""):
        self.backend = backend

    def missing(self, device: str) -> str:
        if self.backend and self.backend not in fr.available_backends():
            return f"backend {self.backend!r} cannot be used here; `fused-resnet info` says why"
        return ""

    def around(self):
        """The context that chooses the backend."""
        return fr.use_backend(self.backend) if self.backend else contextlib.nullcontext()

    def forward(self, model):
        if not self.backend:
            return model

        def run(x):
            with self.around():
                return model(x)

        return run

    def layer(self, layer, tensors):
        """As a module runs it: prepared once where the backend does so."""
        x, weight, scale, shift, residual = tensors
        options = {"residual": residual, "act": layer.act, **layer.geometry}
        with self.around():
            run = fr.ops.prepare_conv_scale_act(x, weight, scale, shift, **options)
        if run is not None:
            return lambda: run(x, residual, None)
        options["backend"] = self.backend or None
        return lambda: fr.ops.conv_scale_act(x, weight, scale, shift, **options)


class FusedGraph(Graphed, Fused):
    """The same, captured in a CUDA graph."""

    name = "fused_resnet-graph"


class FusedLean(Fused):
    """With `lean=True`: less is kept for the backward pass, and computed again."""

    name = "fused_resnet-lean"
    tasks = ("training",)
    model_options = {"lean": True}
