"""What the tests of graphed networks share: a double that stands for a CUDA graph where there is no GPU."""

import copy

import torch
from networks import largest
from problems import image, randomised
from test_verify import small
from tolerances import tolerance
from torch.utils._pytree import tree_leaves

from fused_resnet import capture, graphs


def double(call, device):
    """A replay runs a copy of the network as it was when it was captured, into the same memory.

    What goes stale in a graph, or is overwritten by it, does so here.
    """
    run, (model, x) = call.func, call.args
    outputs, frozen = call(), copy.deepcopy(model)

    def replay():
        for kept, new in zip(tree_leaves(outputs), tree_leaves(run(frozen, x)), strict=True):
            if isinstance(kept, torch.Tensor):
                kept.copy_(new)
        return outputs

    return replay


def logged(request, monkeypatch):
    """Body of a fixture: a list of "capture" and "replay" as they happen; those of the double where there is no GPU."""
    device = "cuda" if request.node.get_closest_marker("gpu") else "cpu"
    found, original = [], capture.record if device == "cuda" else double

    def record(call, where):
        replay = original(call, where)
        found.append("capture")

        def replayed():
            found.append("replay")
            return replay()

        return replayed

    monkeypatch.setattr(capture, "record", record)
    monkeypatch.setattr(graphs, "DEVICE_TYPE", device)
    return found


def network(device="cpu"):
    return randomised(small()).to(device), image(2, 3, 12, 12).to(device)


def assert_is_model(graphed, x, model=None):
    """`graphed(x)` is what the model returns now, without a gradient."""
    y = graphed(x)
    assert not y.requires_grad
    with torch.no_grad():
        assert largest(y, (model or graphed.model)(x)) < tolerance("model_eval_fp32")
