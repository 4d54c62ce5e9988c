"""Where a graphed network leaves it to the network: beyond the bound, for who wants more than outputs; and errors."""

import contextlib
import threading

import pytest
import torch
from devices import full_fp32, on_devices
from graph_double import assert_is_model, logged, network
from networks import batch_norms, largest
from problems import image
from tolerances import tolerance
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet as fr
from fused_resnet import capture
from fused_resnet.modules import unit

log = pytest.fixture(logged)
full_precision = pytest.fixture(autouse=True)(full_fp32)

# --- bounds ---


def test_graphs_are_bounded(log):
    model, x = network()
    graphed = fr.graph(model, x, max_shapes=2)
    for size in (12, 8, 10, 8, 12):
        assert_is_model(graphed, image(2, 3, size, size))
    assert log == ["capture", "replay", "capture", "replay", "replay", "replay"]
    assert [tuple(shape.shape) for shape in graphed.shapes] == [(2, 3, 12, 12), (2, 3, 8, 8)]
    lines = ["2 of 2 shapes:", "2x3x12x12 float32 channels_last cpu", "2x3x8x8 float32 channels_last cpu"]
    assert repr(graphed) == "GraphedModel(Small, " + "\n  ".join(lines) + ")"


def test_graph_keeps_to_the_backend_of_the_block(log):
    model, x = network()
    graphed = fr.graph(model, x)
    with fr.use_backend("reference"):
        assert_is_model(graphed, x)
    assert_is_model(graphed, x)
    assert [shape.backend for shape in graphed.shapes] == ["", "reference"]


# --- the model itself ---


def in_training(graphed, x):
    graphed.model.dropout.p = 0.0
    graphed.model.train()
    graphed(x).sum().backward()
    assert all(bn.num_batches_tracked == 1 for bn in batch_norms(graphed.model))


def partly_in_training(graphed, x):
    graphed.model.norm.train()
    assert not graphed(x).requires_grad
    assert graphed.model.norm.num_batches_tracked == 1


def with_grad(graphed, x):
    graphed(x.requires_grad_()).sum().backward()
    assert x.grad.abs().max() > 0


def under_autocast(graphed, x):
    with torch.autocast("cpu", torch.bfloat16):
        assert graphed(x).dtype == torch.bfloat16


def compiled(graphed, x):
    with torch.no_grad():
        y = torch.compile(lambda x: graphed(x) + 1, backend="eager", fullgraph=True)(x)
        assert largest(y, graphed.model(x) + 1) < tolerance("model_eval_fp32")
    torch.compiler.reset()


def under_a_mode(graphed, x):
    with FlopCounterMode(display=False) as counter:
        graphed(x)
    assert counter.get_total_flops() > 0


def transformed(graphed, x):
    found = torch.func.grad(lambda x: graphed(x).sum())(x)
    (expected,) = torch.autograd.grad(graphed.model(x.requires_grad_()).sum(), x)
    assert largest(found, expected) < tolerance("model_eval_fp32")


def run_unfused(graphed, x):
    with unit.unfused():
        assert torch.equal(graphed(x), graphed.model(x))


def empty(graphed, x):
    assert graphed(x[:0]).shape == (0, 5)


def on_another_device(graphed, x):
    with pytest.raises(ValueError, match="is on"):
        graphed(x.to("meta"))


def of_a_subclass(graphed, x):
    class Special(torch.Tensor):
        pass

    assert type(graphed(x.as_subclass(Special))) is Special


WAYS_OUT = [in_training, partly_in_training, with_grad, under_autocast, compiled, under_a_mode, transformed,
            run_unfused, empty, on_another_device, of_a_subclass]  # fmt: skip


@pytest.mark.parametrize("way", WAYS_OUT, ids=lambda f: f.__name__)
def test_graph_leaves_it_to_the_model(way, log):
    model, x = network()
    graphed = fr.graph(model, x)
    way(graphed, x)
    assert log == ["capture"]
    assert_is_model(graphed.model.eval() and graphed, x.detach())  # and comes back
    assert log[-1] == "replay"


# --- threads ---


@on_devices()
def test_graph_is_shared_by_threads(device, backend, log):
    """On a GPU each has a stream of its own; every output is that of the thread's own input."""
    model, x = network(device)
    inputs = [[torch.randn_like(x) for _ in range(20)] for _ in range(4)]
    found, start = [[] for _ in inputs], threading.Barrier(len(inputs))
    with fr.use_backend(backend):
        graphed = fr.graph(model, x)
        with torch.no_grad():
            truth = [[model(x) for x in of_thread] for of_thread in inputs]
    torch.cuda.synchronize() if device == "cuda" else None

    def work(i):
        start.wait()
        stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
        with stream, fr.use_backend(backend):
            found[i] += [graphed(x) for x in inputs[i]]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize() if device == "cuda" else None
    for outputs, expected in zip(found, truth, strict=True):
        assert all(largest(y, t) < tolerance("model_eval_fp32") for y, t in zip(outputs, expected, strict=True))
    assert log.count("capture") == 1


# --- errors ---

WRONG = {
    "model": (lambda m, x: (torch.relu, x), {}, TypeError, "model must be a torch.nn.Module, got a builtin"),
    "example": (lambda m, x: (m, [x]), {}, TypeError, "example must be an ordinary tensor, got a list"),
    "max_shapes": (lambda m, x: (m, x), {"max_shapes": 2.0}, TypeError, "max_shapes must be an int, got a float"),
    "no shapes": (lambda m, x: (m, x), {"max_shapes": 0}, ValueError, "max_shapes must be at least 1, got 0"),
    "device": (lambda m, x: (m, x.to("meta")), {}, ValueError, "needs a CUDA device; the example is on meta"),
    "empty": (lambda m, x: (m, x[:0]), {}, ValueError, r"the example is empty: \(0, 3, 12, 12\)"),
    "training": (lambda m, x: (m.train(), x), {}, ValueError, "the model is in training mode; call model.eval"),
    "part": (lambda m, x: (m.basic.train() and m, x), {}, ValueError, "basic is in training mode"),
    "elsewhere": (lambda m, x: (m.to("meta"), x), {}, ValueError, "is on cpu, and the model's conv1.weight on meta"),
    "channels": (lambda m, x: (m, x[:, :2]), {}, ValueError, "x has 2 channels"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_graph_names_what_is_wrong(wrong, log):
    arguments, options, error, text = WRONG[wrong]
    with pytest.raises(error, match=text):
        fr.graph(*arguments(*network()), **options)
    assert log == []


def test_graph_needs_cuda():
    with pytest.raises(ValueError, match=r"fr\.graph: a CUDA graph needs a CUDA device; the example is on cpu"):
        fr.graph(*network())


def test_graph_is_not_made_under_autocast(log):
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match=r"fr\.graph: called under autocast"):
        fr.graph(*network())


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


def test_graph_refuses_a_network_that_changes_itself(log):
    with pytest.raises(RuntimeError, match="buffer or submodule of Counts changed while it was captured"):
        fr.graph(Counts().eval(), torch.ones(2))


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_graph_capture_that_fails(error, log, monkeypatch):
    """The error names the shape, what was captured stays, and the next call captures."""
    model, x = network()
    graphed, other = fr.graph(model, x), image(2, 3, 8, 8)

    def fail(call, device):
        raise error("stream is capturing")

    with monkeypatch.context() as patch:
        patch.setattr(capture, "record", fail)
        text = "^stream" if error is torch.OutOfMemoryError else "fr.graph: Small cannot be captured .* 2x3x8x8 float32"
        with pytest.raises(error, match=text):
            graphed(other)
        assert len(graphed.shapes) == 1
        assert_is_model(graphed, x)
    assert_is_model(graphed, other)
    assert len(graphed.shapes) == 2
