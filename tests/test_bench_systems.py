"""The systems that the benchmarks compare compute the same, as far as a CPU can tell."""

import contextlib
import importlib.util
import sys
import types

import fake_cudnn
import pytest
import torch
import torch.nn.functional as F
from networks import batch_norms, largest, seeded

import fused_resnet as fr
from bench.networks import Layer
from bench.suites import ops
from bench.systems import PEERS, cudnn, cudnn_graphs, does, find, onnx_export
from bench.systems.units import without_batch_norm
from fused_resnet.modules import unit
from fused_resnet.modules.unit import ACT_FUNCTIONS, unfused

FP32_NETWORK = 2e-5  # the same network in another order of 20 to 50 layers' sums

LAYERS = {
    "3x3 residual relu": Layer((2, 8, 7, 6), (16, 8, 3, 3), (1, 1), (1, 1), residual=True),
    "strided relu6": Layer((1, 6, 9, 9), (4, 6, 3, 3), (2, 2), (1, 1), act="relu6"),
    "depthwise": Layer((2, 8, 5, 5), (8, 1, 3, 3), (1, 1), (1, 1), groups=8, act="relu6"),
    "1x1 linear residual": Layer((2, 8, 1, 1), (4, 8, 1, 1), residual=True, act="none"),
    "grouped dilated": Layer((1, 8, 9, 9), (8, 4, 3, 3), (1, 1), (2, 2), (2, 2), groups=2),
}


def network(name, size, **kwargs):
    """In eval mode, with running statistics, weights and biases that are not those of a new one; and an image."""
    model = seeded(getattr(fr, name), **kwargs)
    for bn in batch_norms(model):
        bn.running_mean.uniform_(-0.2, 0.2)
        bn.running_var.uniform_(0.8, 1.5)
        torch.nn.init.uniform_(bn.weight, 0.4, 0.8)
        torch.nn.init.uniform_(bn.bias, -0.2, 0.2)
    model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return model, torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)


def plain(model, x):
    with torch.no_grad(), unfused():
        return model(x)


def tensors_of(layer):
    def normal(shape):
        return torch.randn(shape).contiguous(memory_format=torch.channels_last)

    channels = layer.weight[0]
    residual = normal(layer.output) if layer.residual else None
    return normal(layer.x), normal(layer.weight), torch.rand(channels) + 0.5, 3 * torch.randn(channels), residual


def formula(layer, tensors):
    x, weight, scale, shift, residual = (None if t is None else t.double() for t in tensors)
    y = F.conv2d(x, weight, **layer.geometry) * scale[:, None, None] + shift[:, None, None]
    return ACT_FUNCTIONS[layer.act](y if residual is None else y + residual)


@pytest.mark.parametrize("name", ["cudnn-frontend", "onnxruntime", "openvino", "tensorrt", "torch-tensorrt"])
def test_missing_names_package(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    system = find(name)
    said = system.missing(system.devices[0])
    assert "not installed (pip install " in said
    assert all(package in said for package in system.packages.values())


def test_missing_cuda_provider(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "no CUDA provider" in find("onnxruntime").missing("cuda:0")


def test_peers_of_a_gpu():
    assert {"cudnn-frontend", "eager"} <= {name for name in PEERS if does(name, "layer", "cuda:0")}


@pytest.mark.parametrize("name", ["eager", "eager-nchw", "openvino", "onnxruntime", "fused_resnet"])
def test_network_equals_plain(name):
    system = find(name)
    if system.missing("cpu"):
        pytest.skip(system.missing("cpu"))
    model, x = network("cifar_resnet20", 32)
    truth = plain(model, x)
    with torch.no_grad():
        assert largest(system.network(model, x)(), truth) < FP32_NETWORK


def test_compile_equals_plain():
    """A single block: a network takes a minute of compilation."""
    block = fr.BasicBlock(8, 8).eval().requires_grad_(False)
    x = torch.randn(1, 8, 6, 6)
    assert largest(find("compile").network(block, x)(), plain(block, x)) < FP32_NETWORK


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", ["eager", "fused_resnet", "fused_resnet@reference"])
def test_layer_equals_formula(name, layer):
    tensors = tensors_of(layer)
    assert largest(find(name).layer(layer, tensors)(), formula(layer, tensors)) < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_onnxruntime_equals_plain(name):
    for package in find("onnxruntime").packages:
        pytest.importorskip(package)
    model, x = network(name, 64)
    assert largest(find("onnxruntime").network(model, x)(), plain(model, x)) < FP32_NETWORK


def test_onnxruntime_bfloat16_says_why():
    for package in find("onnxruntime").packages:
        pytest.importorskip(package)
    model, x = network("cifar_resnet20", 32)
    with pytest.raises(RuntimeError, match=r"ONNX Runtime: .*implementation for Conv"):
        find("onnxruntime").network(model.bfloat16(), x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onnx_export_is_a_model_of_one_dtype(dtype):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, x = network("cifar_resnet20", 32)
    exported = onnx.load_from_string(onnx_export.export(model.to(dtype), x.to(dtype)))
    onnx.checker.check_model(exported, full_check=True)
    assert {node.op_type for node in exported.graph.node}.isdisjoint({"BatchNormalization", "Cast"})
    kinds = {tensor.data_type for tensor in exported.graph.initializer} - {onnx.TensorProto.INT64}
    assert kinds == {onnx.TensorProto.FLOAT if dtype == torch.float32 else onnx.TensorProto.BFLOAT16}


# The norms before a convolution stay.
@pytest.mark.parametrize(("name", "left"), [("resnet18", 0), ("mobilenet_v2", 0), ("preact_resnet_cifar", 13)])
def test_without_batch_norm_equals_plain(name, left):
    model, x = network(name, 32)
    folded = without_batch_norm(model, x)
    assert len(batch_norms(folded)) == left
    assert largest(plain(folded, x), plain(model, x)) < FP32_NETWORK


@pytest.fixture
def on_cpu(monkeypatch):
    """cuDNN's peer with the fake package, and what it needs of CUDA; gives the graph's class."""

    class Graph(fake_cudnn.Graph):
        pass

    monkeypatch.setitem(sys.modules, "cudnn", fake_cudnn.module(Graph))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cudnn, "graphed", lambda call: call)
    monkeypatch.setattr(cudnn_graphs.Planned, "_seconds", lambda self, given, plan, workspace: 1.0 / (plan + 1))
    return Graph


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_cudnn_graph_is_the_formula(layer, on_cpu):
    tensors = tensors_of(layer)
    y = find("cudnn-frontend").layer(layer, tensors)()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert largest(y, formula(layer, tensors)) < 1e-5


def test_cudnn_convolution_with_statistics_is_the_formula(on_cpu):
    case = {"device": "cpu", "dtype": "fp32", "op": "conv 3x3 8->16 +bn+relu", "shape": [3, 8, 6, 5]}
    case |= {"channels": 16, "kernel": 3, "direction": "forward", "mode": "statistics"}
    ready = ops.prepare(case, "cudnn-frontend")
    assert ready.error <= ready.limit < 1e-5
    assert ready.call()[0].shape == (3, 16, 6, 5)


def test_cudnn_takes_the_fastest_plan_that_builds(on_cpu):
    on_cpu.broken = (2,)
    run = cudnn.FusedConvolution(LAYERS["depthwise"], tensors_of(LAYERS["depthwise"]))
    assert run.planned.plan == 1
    on_cpu.broken = (0, 1, 2)
    with pytest.raises(RuntimeError, match="no fused kernel for 3x3 depthwise 8 5px in float32: this plan cannot"):
        cudnn.FusedConvolution(LAYERS["depthwise"], tensors_of(LAYERS["depthwise"]))


@pytest.mark.parametrize("allowed", [False, True])
def test_cudnn_uses_tf32_only_where_torch_may(allowed, on_cpu):
    layer = LAYERS["strided relu6"]
    # A context: PyTorch's own samples (test_op_db.py), once imported, forbid to set the flag itself.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
        run = cudnn.FusedConvolution(layer, tensors_of(layer))
    assert bool(run.planned.graph.deselected) is not allowed


def test_cudnn_says_why_a_layer_is_unsupported(on_cpu):
    on_cpu.reason = 'x\n{"engineId":2,"k":{}}\nWarning: CODE; Reason: is_group_conv\nWarning: CODE; Reason: check()\n'
    with pytest.raises(RuntimeError, match=r"depthwise 8 5px in float32: engine 2: is_group_conv$"):
        find("cudnn-frontend").layer(LAYERS["depthwise"], tensors_of(LAYERS["depthwise"]))
    with pytest.raises(RuntimeError, match="no cuDNN graph for the activation 'silu'"):
        cudnn_graphs.operation_graph(Layer((1, 1, 1, 1), (1, 1, 1, 1), act="silu"), torch.float32)


@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenet_v2", "preact_resnet_cifar"])
def test_cudnn_network_equals_plain(name, on_cpu):
    model, x = network(name, 32)
    before = unit.conv_bn_act
    call = find("cudnn-frontend").network(model, x)
    assert largest(call(), plain(model, x)) < FP32_NETWORK
    assert unit.conv_bn_act is before
