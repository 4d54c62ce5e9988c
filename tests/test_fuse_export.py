"""Fused networks as programs: torch.export, AOTInductor, ONNX, with the operators of this package and without."""

from collections import Counter

import pytest
import torch
from networks import largest
from stack_networks import images, networks, of_timm, operators, own, pair, resnet18
from tolerances import tolerance
from torch import nn
from torch.export import Dim

import fused_resnet as fr

ANY_BATCH = ({0: Dim("n", min=1, max=64)},)


def calls(program) -> Counter:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def assert_same_numbers(run, plain, *, bitwise=False):
    """For other numbers of images than the one that was exported."""
    with torch.no_grad():
        for n in (1, 5):
            x = images(n)
            found, expected = run(x), plain(x)
            assert torch.equal(found, expected) if bitwise else largest(found, expected) < tolerance("model_eval_fp32")


@pytest.mark.parametrize(("make", "strict"), [(own, False), (own, True), (of_timm, True), (resnet18, False)])
def test_export_keeps_the_operators(make, strict):
    plain, fused = pair(make)
    with torch.no_grad():
        program = torch.export.export(fused, (images(),), strict=strict, dynamic_shapes=ANY_BATCH)
    found = operators(program.graph)
    assert found.count("fused_resnet::conv_scale_act") == sum(isinstance(m, nn.Conv2d) for m in plain.modules())
    assert_same_numbers(program.module(), plain)


def test_export_fused():
    """`fr.export` is that, also where gradients are on."""
    plain, fused = pair(own)
    program = fr.export(fused, images(), dynamic_shapes=ANY_BATCH)
    with torch.no_grad():
        assert calls(program) == calls(torch.export.export(fused, (images(),), dynamic_shapes=ANY_BATCH))
    assert_same_numbers(program.module(), plain)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@networks
def test_export_decomposed(make, training):
    """The program of the network as it was before `fuse`: operation by operation, bit by bit."""
    plain, fused = pair(make, training)
    program = fr.export(fused, (images(),), decompose=True, dynamic_shapes=ANY_BATCH)
    assert calls(program) == calls(torch.export.export(plain, (images(),), dynamic_shapes=ANY_BATCH))
    assert not operators(program.graph)
    if not training:
        assert_same_numbers(program.module(), plain, bitwise=True)
        with torch.no_grad():  # nothing stays behind
            assert operators(fr.export(fused, images()).graph)


def test_export_decomposed_networks_of_this_package():
    model, x = fr.cifar_resnet20().eval(), images()
    assert operators(fr.export(model, x).graph)
    program = fr.export(model, x, decompose=True)
    assert not operators(program.graph)
    with torch.no_grad():
        assert largest(program.module()(x), model(x)) < tolerance("model_eval_fp32")


class Calls(nn.Module):
    def forward(self, x):
        return fr.ops.add_act(x, x)


def test_export_refuses():
    with pytest.raises(TypeError, match=r"export: expected a torch.nn.Module, got function"):
        fr.export(pair, images())
    with pytest.raises(RuntimeError, match=r"calls fused_resnet.add_act.default by itself"):
        fr.export(Calls(), images(), decompose=True)
    assert operators(fr.export(Calls(), images()).graph) == ["fused_resnet::add_act"]


def test_exported_program_is_saved_and_loaded(tmp_path):
    plain, fused = pair(own)
    for name, decompose in (("fused", False), ("plain", True)):
        program = fr.export(fused, images(), decompose=decompose, dynamic_shapes=ANY_BATCH)
        torch.export.save(program, tmp_path / f"{name}.pt2")
        loaded = torch.export.load(tmp_path / f"{name}.pt2")
        assert bool(operators(loaded.graph)) != decompose
        assert_same_numbers(loaded.module(), plain)


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    """Compiled ahead of time, in a process that has the operators."""
    plain, fused = pair(own)
    program = fr.export(fused, images(), dynamic_shapes=ANY_BATCH)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_same_numbers(torch._inductor.aoti_load_package(package), plain)


# --- TorchScript and ONNX, which know no operator of ours ---


def test_torchscript_trace(tmp_path):
    """A trace is of the plain network, and needs nothing of this package."""
    plain, fused = pair(own)
    torch.jit.trace(fused, (images(),)).save(tmp_path / "traced.pt")
    traced = torch.jit.load(tmp_path / "traced.pt")
    assert not [node for node in traced.inlined_graph.nodes() if "fused_resnet" in node.kind()]
    assert_same_numbers(traced, plain)


def onnx_of(model, x):
    """Node types with their counts, and what ONNX Runtime computes."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    exported = torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto
    session = runtime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    types = Counter((node.domain, node.op_type) for node in exported.graph.node)
    return types, torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("make", [own, resnet18])
def test_onnx(make):
    """A fused network is exported as the plain one is, and so is an unfused one."""
    plain, fused = pair(make)
    x = images().contiguous()
    types, output = onnx_of(plain, x)
    assert types["", "Conv"] == sum(isinstance(module, nn.Conv2d) for module in plain.modules())
    for model in (fused, fr.unfuse(fr.fuse(plain))):
        found, again = onnx_of(model, x)
        assert found == types
        assert torch.equal(again, output)
    with torch.no_grad():
        assert largest(output, plain(x)) < tolerance("model_eval_fp32")
