"""fused_resnet itself."""

import contextlib
import importlib

import torch
from torch import nn

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


class FusedTorchvision(Fused):
    """torchvision's network with the same weights, made fast by `fuse`."""

    name = "fused_resnet-fuse"
    tasks = ("network", "training")
    packages = {"torchvision": "torchvision"}
    models = (
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("resnext50_32x4d", "wide_resnet50_2", "mobilenet_v2"),
    )

    def missing(self, device: str) -> str:
        return System.missing(self, device) or super().missing(device)

    def takes(self, model: str) -> bool:
        return model in self.models

    def imports(self) -> None:
        import_torchvision()

    def forward(self, model):
        """It shares its parameters with `model`, so that an optimizer of those trains it."""
        theirs = _same_network(model)
        theirs.load_state_dict(model.state_dict(keep_vars=True), assign=True)
        return super().forward(fr.fuse(theirs.train(model.training), inplace=True))


def _same_network(model: nn.Module) -> nn.Module:
    """torchvision's network with the parameters of `model`, without data."""
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    builders = import_torchvision().models
    for name in FusedTorchvision.models:
        with torch.device("meta"):
            theirs = getattr(builders, name)()
        if {key: t.shape for key, t in theirs.state_dict().items()} == shapes:
            return theirs
    raise ValueError(f"torchvision has no network like this {type(model).__name__}")


def import_torchvision():
    """torchvision, whether or not its compiled part fits this torch."""
    from bench import torchvision_operators  # noqa: F401

    return importlib.import_module("torchvision")
