"""A graphed network is the network: for every input, after every change, and wherever there is nothing to replay.

On the CPU a double stands for the graphs, see `graph_double`.
"""

import contextlib
import gc
import weakref
from collections import namedtuple

import pytest
import torch
from devices import full_fp32, on_devices
from graph_double import assert_is_model, logged, network
from problems import BACKEND_NAMES, LAYOUTS, image, poisoned, randomised
from test_state import CHANGES, new_eps
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import fused_resnet as fr
from fused_resnet import capture
from fused_resnet.backends import packing
from fused_resnet.modules import batch_norm, prepared

poison = pytest.fixture(autouse=True)(poisoned)
log = pytest.fixture(logged)
full_precision = pytest.fixture(autouse=True)(full_fp32)
shared = on_devices()


# --- replays ---


@shared
def test_graph_is_the_model(device, backend, log):
    """Outputs are those of the model, stay when the next input comes, and share nothing."""
    model, x = network(device)
    with fr.use_backend(backend):
        graphed = fr.graph(model, x)
        assert graphed.model is model
        inputs = [torch.randn_like(x) for _ in range(3)]
        outputs = [graphed(x) for x in inputs]
        for x, y in zip(inputs, outputs, strict=True):
            assert_is_model(lambda x, y=y: y, x, model)
    assert log == ["capture"] + ["replay"] * 3


@shared
def test_graph_of_every_layout(device, backend, log):
    model, x = network(device)
    with fr.use_backend(backend):
        graphed = fr.graph(model, x)
        for layout in LAYOUTS.values():
            assert_is_model(graphed, layout(x))
    assert [str(shape.memory_format) for shape in graphed.shapes] == ["torch.channels_last", "torch.contiguous_format"]


@shared
def test_graph_in_inference_mode(device, backend, log):
    model, x = network(device)
    with fr.use_backend(backend):
        with torch.inference_mode():
            graphed = fr.graph(model, x.clone())
            assert graphed(x.clone()).is_inference()
        assert_is_model(graphed, x)
    assert log.count("capture") == 1


Pair = namedtuple("Pair", ["left", "right"])
NESTS = {
    "list": lambda y: [y, 2 * y],
    "tuple": lambda y: (y, (3 * y,)),
    "dict": lambda y: {"maps": [y, y], "count": 3, "none": None},
    "named": lambda y: Pair(y, {"deep": y + 1}),
}


class Nested(nn.Module):
    def __init__(self, nest):
        super().__init__()
        self.nest, self.scale = nest, nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.nest(x * self.scale)


@on_devices("nest", NESTS)
def test_graph_of_nested_outputs(device, backend, nest, log):
    model, x = Nested(nest).to(device).eval(), torch.arange(6.0, device=device)
    with torch.no_grad():
        graphed, truth = fr.graph(model, x), model(x)
        found = graphed(x)
        graphed(2 * x)
    assert tree_map(type, found) == tree_map(type, truth)
    assert type(found) is type(truth)
    for y, expected in zip(tree_leaves(found), tree_leaves(truth), strict=True):
        assert torch.equal(y, expected) if isinstance(y, torch.Tensor) else y == expected


@pytest.mark.parametrize("what", [lambda y: {"y", "z"}, lambda y: y.to("meta")], ids=["a set", "a tensor on meta"])
def test_graph_refuses_outputs_that_it_cannot_clone(what, log, request):
    with pytest.raises(TypeError, match=f"fr.graph: Nested returns {request.node.callspec.id}, and not tensors on cpu"):
        fr.graph(Nested(what).eval(), torch.ones(3))


# --- weights ---


def fused_optimizer_step(model, x):
    """Which PyTorch does not count."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    with torch.enable_grad():
        model(x).sum().backward()
    optimizer.step()
    model.eval()


def another_batch_norm(model, x):
    model.unit.bn = randomised(type(model.unit.bn)(8)).to(x.device)


@on_devices("change", {f.__name__: f for f in [*CHANGES, fused_optimizer_step, another_batch_norm] if f is not new_eps})
def test_graph_sees_changed_weights(device, backend, change, log):
    model, x = network(device)
    with fr.use_backend(backend), torch.no_grad():
        graphed = fr.graph(model, x)
        before = graphed(x)
        with fr.use_backend(None):  # some changes run the network in fp64
            change(model, x)
        assert not torch.equal(graphed(x), before)
        assert_is_model(graphed, x)
    assert log == ["capture", "replay"] * 2 + ["replay"]


@shared
def test_graph_follows_the_dtype(device, backend, log):
    model, x = network(device)
    with fr.use_backend(backend):
        graphed = fr.graph(model, x)
        model.to(torch.bfloat16)
        assert graphed(x.bfloat16()).dtype == torch.bfloat16
    assert [shape.dtype for shape in graphed.shapes] == [torch.bfloat16]


@shared
def test_graph_is_captured_again_after_reset(device, backend, log):
    model, x = network(device)
    with fr.use_backend(backend):
        graphed = fr.graph(model, x)
        new_eps(model, x)
        graphed.reset()
        assert graphed.shapes == []
        assert_is_model(graphed, x)
    assert log == ["capture", "capture", "replay"]


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * packing.packed(self.weight, "doubled", lambda: 2 * self.weight.detach())


def forms(weight):
    return packing._packed[weight]


# What a cache holds of a module.
CACHES = {
    "packed": (Packs, (3,), lambda m: forms(m.weight)["doubled"][1], lambda m: packing.forget(m.weight)),
    "evicted": (Packs, (3,), lambda m: forms(m.weight)["doubled"][1], lambda m: [
        packing.packed(m.weight, i, lambda: torch.ones(1)) for i in range(packing.MOST_FORMS)]),
    "folded": (lambda: fr.BNAct2d(8), (2, 8, 3, 3), lambda m: batch_norm._folded[m][1][0], nn.Module.eval),
}  # fmt: skip
if "cpu" in BACKEND_NAMES:
    CACHES["prepared"] = (lambda: fr.ConvBNAct2d(8, 8, 3), (2, 8, 5, 5),
                          lambda m: next(iter(prepared._prepared[m.conv][1].values())), nn.Module.eval)  # fmt: skip


@contextlib.contextmanager
def nothing_held():
    yield packing.Held()


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("cache", CACHES)
def test_graph_holds_derived_memory(cache, held, log, monkeypatch):
    """The graph's kernels read it after its cache has dropped it; were it not held, it would be freed."""
    if not held:
        monkeypatch.setattr(capture, "holding", nothing_held)
    build, size, find, drop = CACHES[cache]
    module = build().eval()
    graphed = fr.graph(module, image(*size) if len(size) == 4 else torch.randn(size))
    value = weakref.ref(find(module))
    drop(module)
    gc.collect()
    assert (value() is not None) == held
    graphed.reset()
    gc.collect()
    assert value() is None


def test_derived_values_of_a_capture_are_not_kept(monkeypatch):
    """They are computed when the graph is replayed, not before."""
    for module in (packing, batch_norm):
        monkeypatch.setattr(module, "computed_now", lambda like: False)
    weight, bn = torch.ones(3), fr.BNAct2d(3).eval()
    found = [packing.packed(weight, "form", lambda: 2 * weight) for _ in range(2)]
    with torch.no_grad():
        found += [batch_norm.folded(bn)[0] for _ in range(2)]
    assert len({id(value) for value in found}) == 4
