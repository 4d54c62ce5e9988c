"""What `fuse` is given wrongly, what it refuses and why, and what its report says."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from small_networks import CHANNELS, Block, Net, assert_as, images, net
from torch import fx, nn

import fused_resnet as fr


def conv(*args, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, *args, **kwargs)


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.path: row.reason for row in fr.fusion_report(model).skipped}


# --- what is no network to fuse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda: "resnet18", "expected a torch.nn.Module, got str"),
        (lambda: None, "expected a torch.nn.Module, got NoneType"),
        (lambda: {}, "expected a torch.nn.Module, got dict"),
        (lambda: [net()], "expected a torch.nn.Module, got list"),
        (lambda: F.relu, "expected a torch.nn.Module, got function"),
        (lambda: Net, "expected a torch.nn.Module, got the class Net"),
        (lambda: torch.jit.trace(net().float(), images(dtype=torch.float)), "fuse the original"),
        (lambda: torch.jit.script(Block()), "fuse the original"),
        (lambda: torch.compile(net()), "fuse the original, then compile that"),
        (lambda: fx.symbolic_trace(net()), "fuse the model that it was traced from"),
    ],
    ids=["str", "None", "dict", "list", "function", "class", "traced", "scripted", "compiled", "graph"],
)
@pytest.mark.parametrize("function", [fr.fuse, fr.fusion_report], ids=["fuse", "report"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_fuse_not_a_network(function, given, text):
    with pytest.raises(TypeError, match=f"^fuse: .*{text}"):
        function(given())


def test_fuse_twice_warns():
    fused = fr.fuse(net())
    programs = [id(module.__dict__.get("_fused_resnet")) for module in fused.modules()]
    with pytest.warns(UserWarning, match="fused already, and was left as it is; unfuse it first") as caught:
        assert fr.fuse(fused) is fused
    assert caught[0].filename == __file__
    assert [id(module.__dict__.get("_fused_resnet")) for module in fused.modules()] == programs


def test_fuse_warns_of_nothing_else():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fr.unfuse(fr.fuse(net()))
        assert type(fr.unfuse(net())) is Net


# --- filters ----------------------------------------------------------------------------------------------------------


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("call", [1, 4])
def test_fuse_filter_that_raises(call):
    """Nothing was changed when the error comes through."""
    model, calls = net(), 0
    model.blocks[0].eval()
    model.blocks[1].train()

    def broken(module, path):
        nonlocal calls
        calls += 1
        if calls == call:
            raise BrokenError(path)
        return True

    def state():
        return [(type(m), list(vars(m)), m.training) for m in model.modules()]

    with torch.no_grad():
        before, expected = state(), model.eval().blocks(images(4)[:, :1].expand(-1, CHANNELS, -1, -1))
    before = state()
    with pytest.raises(BrokenError):
        fr.fuse(model, filter_fn=broken, inplace=True)
    assert state() == before
    with torch.no_grad():
        assert torch.equal(model.blocks(images(4)[:, :1].expand(-1, CHANNELS, -1, -1)), expected)


def test_fuse_filter_leaves_a_path_out():
    seen = {}

    def keep(module, path):
        seen[path] = module
        return not path.startswith("blocks.0")

    model = net()
    fused = fr.fuse(model, filter_fn=keep, inplace=True)
    convolutions_and_norms = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))}
    assert seen == convolutions_and_norms
    left = {name: "filter_fn left it out" for name in seen if name.startswith("blocks.0")}
    assert reasons(fused) == left
    assert not any(row.path.startswith("blocks.0.") for row in fr.fusion_report(fused).fused)
    assert_as(fused.train(), net().train())


def test_fuse_filter_leaves_everything_out():
    fused = fr.fuse(net(), filter_fn=lambda module, path: False)
    assert set(reasons(fused).values()) == {"filter_fn left it out"}
    assert not [row for row in fr.fusion_report(fused).fused if "conv" in row.pattern or "bn" in row.pattern]
    assert_as(fused.eval(), net().eval())


# --- forwards that fail -----------------------------------------------------------------------------------------------


class AlwaysFails(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        raise BrokenError("not today")


def test_fuse_forward_that_raises():
    """Its parts are fused, and the error is its own."""
    fused = fr.fuse(AlwaysFails())
    with pytest.raises(BrokenError, match="not today"):
        fused(images())
    assert fr.fusion_report(fused).counts() == {"conv+bn+relu": 1, "conv+bn+add+relu": 1}
    assert str(fr.fusion_report(fused))


@pytest.mark.parametrize("shape", [(2, 4, 9, 9), (3, 9), (2, 3, 0, 4), (1, 3, 9)], ids=str)
def test_fuse_input_of_a_wrong_shape(shape):
    """The same kind of error as eager's."""
    model = net()
    fused, x = fr.fuse(model), torch.randn(shape, dtype=torch.double)
    for training in (False, True):
        with pytest.raises((RuntimeError, ValueError)):
            model.train(training)(x)
        with pytest.raises((RuntimeError, ValueError)):
            fused.train(training)(x)


def test_fuse_wrong_arguments():
    model = net()
    fused = fr.fuse(model)
    for args, kwargs in (((), {}), ((images(), 1.0, 2), {}), ((images(),), {"y": 1})):
        with pytest.raises(TypeError) as expected:
            model(*args, **kwargs)
        with pytest.raises(TypeError) as found:
            fused(*args, **kwargs)
        assert str(found.value) == str(expected.value)
