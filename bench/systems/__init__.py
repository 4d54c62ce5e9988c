"""The systems that are measured: fused_resnet and its peers.

A system is a class (see `bench.systems.base`) with a `name`, the kinds of `devices` that it runs on, and the `tasks`
that it does:

* "network": `network(model, x)` returns a call without arguments that runs inference of `model` (a network of
  `fused_resnet.models` in eval mode, of x's dtype and device, channels_last) on `x` and returns its output. A peer
  takes the plain network: it calls, traces or exports the model under `unfused()`;
* "layer": `layer(layer, tensors)`, the same for one convolution with scale, shift, residual and activation;
* "training": `forward(model)` returns what is called in place of `model` in a training step;
* "statistics": `statistics(layer, tensors, eps)` returns a call that runs a convolution, batch norm with the statistics
  of the batch and ReLU on `tensors`, x, weight, and the norm's weight and bias; forward alone;
* "op": the suite `ops` knows how eager and fused_resnet do it, and "statistics" too.
"""

import importlib

# Name -> module and class; in the order of tables.
_WHERE = {
    "eager": ("eager", "Eager"),
    "eager-nchw": ("eager", "EagerNCHW"),
    "eager-graph": ("eager", "EagerGraph"),
    "compile": ("compiled", "Compile"),
    "compile-max-autotune": ("compiled", "CompileMaxAutotune"),
    "compile-freezing": ("compiled", "CompileFreezing"),
    "openvino": ("openvino", "OpenVINO"),
    "onnxruntime": ("onnxruntime", "ONNXRuntime"),
    "tensorrt": ("tensorrt", "TensorRT"),
    "torch-tensorrt": ("tensorrt", "TorchTensorRT"),
    "cudnn-frontend": ("cudnn", "CuDNNFrontend"),
    "fused_resnet": ("fused", "Fused"),
    "fused_resnet-graph": ("fused", "FusedGraph"),
    "fused_resnet-lean": ("fused", "FusedLean"),
    "fused_resnet-fuse": ("fused", "FusedTorchvision"),
}

OURS = "fused_resnet"
PEERS = [name for name in _WHERE if not name.startswith(OURS)]


def ours() -> list[str]:
    """fused_resnet by the automatic choice, and its variants."""
    return [name for name in _WHERE if is_ours(name)]


def is_ours(name: str) -> bool:
    return name.startswith(OURS)


def find(name: str):
    """The system `name`; "fused_resnet@backend" is fused_resnet with that backend for everything."""
    plain, _, backend = name.partition("@")
    if plain not in _WHERE:
        raise ValueError(f"unknown system {name!r}, expected one of {', '.join(_WHERE)}")
    module, cls = _WHERE[plain]
    system = getattr(importlib.import_module(f"bench.systems.{module}"), cls)
    return system(backend) if backend else system()


def does(name: str, task: str, device: str) -> bool:
    """Whether the system does `task` on this kind of device."""
    system = find(name)
    return task in system.tasks and device.partition(":")[0] in system.devices
