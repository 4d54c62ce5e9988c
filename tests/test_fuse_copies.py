"""Fused networks copied, pickled, saved and loaded."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_networks import Net, assert_as, images, is_running_fused, net
from torch import nn

import fused_resnet as fr


def changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    model.train()(images())
    return model


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "copy_of_copy": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(model)))),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("lean", [False, True])
def test_fuse_copies(copied, lean):
    fused, eager = fr.fuse(net(), lean=lean), net()
    changed(fused), changed(eager)
    found = copied(fused)
    assert isinstance(found, Net)
    assert is_running_fused(copy.deepcopy(found), images())
    assert str(fr.fusion_report(found)) == str(fr.fusion_report(fused))
    changed(found), changed(eager)  # of its own: what it was copied from has not changed
    for training in (True, False):
        assert_as(found.train(training), eager.train(training))
    assert type(fr.unfuse(found)) is Net
    assert type(fused) is not Net


def test_fuse_shallow_copy():
    fused, eager = fr.fuse(net()), net()
    found = copy.copy(fused)
    for training in (True, False):
        assert_as(found.train(training), eager.train(training))


FRESH = """
import sys, torch
sys.path[:0] = {paths!r}
model, x, expected, cls = torch.load({file!r}, weights_only=False)
assert type(model).__name__ == "Net" and isinstance(model, cls) and type(model) is not cls
assert torch.equal(model(x), expected)
import fused_resnet as fr
from small_networks import is_running_fused
assert is_running_fused(model, x)
assert type(fr.unfuse(model)) is cls
"""


def test_fuse_saved_and_loaded_in_a_fresh_process(tmp_path):
    fused, file = fr.fuse(net().eval()), tmp_path / "model.pt"
    with torch.no_grad():
        torch.save((fused, images(), fused(images()), Net), file)
    paths = [str(Path(__file__).parent), str(Path(fr.__file__).parents[1])]
    code = FRESH.format(paths=paths, file=str(file))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


def test_fuse_shared_memory():
    fused = fr.fuse(net().eval())
    with torch.no_grad():
        before = fused(images())
        assert fused.share_memory() is fused
        assert all(p.is_shared() for p in fused.parameters())
        assert torch.equal(fused(images()), before)
