"""What only a GPU can show of graphed networks: streams, memory that is reused, captures that fail."""

import pytest
import torch
from devices import full_fp32, gpu_backends
from graph_double import assert_is_model, logged, network
from networks import largest
from test_gpu_runtime import CYCLES
from tolerances import tolerance
from torch import nn

import fused_resnet as fr
from fused_resnet.backends import packing
from fused_resnet.modules import batch_norm

pytestmark = pytest.mark.gpu
full_precision = pytest.fixture(autouse=True)(full_fp32)
log = pytest.fixture(logged)


@gpu_backends
def test_graphs_of_two_shapes_and_more(backend, log):
    model, x = network("cuda")
    other, third = (torch.randn(2, 3, size, size, device="cuda") for size in (8, 10))
    with fr.use_backend(backend):
        graphed = fr.graph(model, x, max_shapes=2)
        for image in (x, other, third) * 3:
            assert_is_model(graphed, torch.randn_like(image))
    assert len(graphed.shapes) == log.count("capture") == 2
    assert log.count("replay") == 6


@gpu_backends
@pytest.mark.parametrize("build", [fr.resnet18, fr.resnet50, fr.mobilenet_v2], ids=lambda build: build.__name__)
def test_graph_of_a_resnet(backend, build, log):
    """At batch 1, before and after its weights are loaded."""
    model, other = build().cuda().eval(), build().cuda()
    x = torch.randn(1, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    with fr.use_backend(backend):
        graphed = fr.graph(model, x)
        assert_is_model(graphed, torch.randn_like(x))
        before = graphed(x)
        model.load_state_dict(other.state_dict())
        assert largest(graphed(x), before) > tolerance("model_eval_fp32")
        assert_is_model(graphed, torch.randn_like(x))
    assert log.count("capture") == 2


@gpu_backends
@pytest.mark.parametrize("forget", [packing.forget, batch_norm.forget_folded], ids=["packed", "folded"])
def test_graph_reads_what_the_caches_have_dropped(backend, forget, log):
    """The memory would be given to other tensors, which are NaN here."""
    model, x = network("cuda")
    with fr.use_backend(backend):
        graphed = fr.graph(model, x)
        truth, (found,) = graphed(x), graphed._graphs.values()
        for owner in model.parameters() if forget is packing.forget else model.modules():
            forget(owner)
        garbage = [torch.full((size,), float("nan"), device="cuda") for size in range(1, 5000, 7)]
        y = found(x)  # without the check, which would have it captured again
    assert torch.equal(y, truth)
    del garbage


@gpu_backends
def test_weights_derived_in_a_capture_are_not_used_before_it_is_replayed(backend):
    model, x = network("cuda")
    with fr.use_backend(backend), torch.no_grad():
        truth = model(x)
        model.eval()  # forgets what was derived
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = model(x)
        assert largest(model(x), truth) < tolerance("model_eval_fp32")
        captured.replay()
        assert largest(y, truth) < tolerance("model_eval_fp32")


@gpu_backends
def test_graph_runs_on_the_current_stream(backend, log):
    """A producer that is late on a side stream, and a replay on another stream right behind it."""
    model, x = network("cuda")
    late, second = torch.full_like(x, float("nan")), torch.randn_like(x)
    streams = [torch.cuda.Stream() for _ in range(2)]
    with fr.use_backend(backend):
        graphed = fr.graph(model, x)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]):
            torch.cuda._sleep(CYCLES)
            late.copy_(x)
            y = graphed(late)
        with torch.cuda.stream(streams[1]):
            z = graphed(second)
        torch.cuda.synchronize()
        assert_is_model(lambda x: y, x, model)
        assert_is_model(lambda x: z, second, model)


def test_graph_inside_another_capture(log):
    model, x = network("cuda")
    graphed = fr.graph(model, x)
    with torch.no_grad():
        graphed(x)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = graphed(x)
            with pytest.raises(RuntimeError, match="while another graph is captured"):
                fr.graph(model, x)
        x.copy_(torch.randn_like(x))
        captured.replay()
        assert_is_model(lambda x: y, x, model)
    assert log == ["capture", "replay"]


class Waits(nn.Module):
    def forward(self, x):
        return x * x.sum().item()


def test_graph_of_a_network_that_waits_for_the_gpu(log):
    """The error names it, the current stream is what it was, and another network is captured after it."""
    stream, x = torch.cuda.current_stream(), torch.randn(3, device="cuda")
    with pytest.raises(RuntimeError, match=r"fr\.graph: Waits cannot be captured for an input of 3 float32"):
        fr.graph(Waits().eval(), x)
    assert torch.cuda.current_stream() == stream
    model, x = network("cuda")
    assert_is_model(fr.graph(model, x), x)


def test_graph_refuses_outputs_on_the_cpu(log):
    class Leaves(nn.Module):
        def forward(self, x):
            return x.cpu()

    with pytest.raises(TypeError, match="returns a tensor on cpu"):
        fr.graph(Leaves().eval(), torch.ones(3, device="cuda"))


@gpu_backends
def test_graph_on_its_inputs_device(backend, log):
    """Not on the current one; and after the network has moved, on the other."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, and there is one")
    model, x = network("cuda:1")
    with fr.use_backend(backend):
        graphed = fr.graph(model, x)
        assert_is_model(graphed, x)
        model.to("cuda:0")
        assert_is_model(graphed, x.to("cuda:0"))
    assert torch.cuda.current_device() == 0
