"""Networks that change after `fuse`: other children, attributes, dtypes, parametrizations."""

import pytest
import torch
from small_networks import CHANNELS, assert_as, assert_near, images, is_running_fused, net, training_step
from tolerances import assert_two_times
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning"
)


def replaced(name: str, make):
    def change(model):
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, make().double())

    return change


def assigned(name: str, attribute: str, value):
    return lambda model: setattr(model.get_submodule(name), attribute, value)


def frozen_norm():
    ops = pytest.importorskip("torchvision.ops", reason="FrozenBatchNorm2d is torchvision's")
    made = ops.FrozenBatchNorm2d(CHANNELS)
    made.weight.uniform_(0.5, 1.5)
    made.running_mean.normal_()
    return made


def in_sequential(model):
    model.blocks = nn.Sequential(model.blocks[0], nn.Conv2d(CHANNELS, CHANNELS, 1).double(), model.blocks[1])


def sync(model):
    fr.convert_sync_batchnorm(model)


CHANGES = {
    "group_norm": replaced("blocks.0.bn1", lambda: nn.GroupNorm(2, CHANNELS)),
    "frozen_norm": replaced("blocks.0.bn2", frozen_norm),
    "identity_norm": replaced("bn", nn.Identity),
    "instance_norm": replaced("bn", lambda: nn.InstanceNorm2d(CHANNELS)),
    "sync_norm": sync,
    "gelu": replaced("act", nn.GELU),
    "silu": replaced("blocks.0.relu", nn.SiLU),
    "other_conv": replaced("blocks.0.conv1", lambda: nn.Conv2d(CHANNELS, CHANNELS, 5, padding=2)),
    "reflected_conv": replaced("conv", lambda: nn.Conv2d(3, CHANNELS, 3, padding=1, padding_mode="reflect")),
    "block": replaced("blocks.0", lambda: nn.Conv2d(CHANNELS, CHANNELS, 1)),
    "other_shortcut": replaced("blocks.1.downsample", lambda: nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, 2, 1)),
    "inserted": in_sequential,
    "stride": assigned("conv", "stride", (2, 2)),
    "dilation": lambda model: [assigned("conv", k, (2, 2))(model) for k in ("dilation", "padding")],
    "padding_mode": assigned("blocks.0.conv1", "padding_mode", "reflect"),
    "eps": assigned("blocks.0.bn1", "eps", 0.3),
    "momentum": assigned("blocks.0.bn1", "momentum", 0.7),
    "no_momentum": assigned("blocks.0.bn1", "momentum", None),
    "dropout": assigned("dropout", "p", 0.5),
    "flag": assigned("", "doubled", True),
    "inplace": assigned("act", "inplace", True),
    "own_forward": lambda model: setattr(model.bn, "forward", lambda x: 2.0 * x),
    "own_block_forward": lambda model: setattr(model.blocks[0], "forward", lambda x: 2.0 * x),
    "untracked": assigned("bn", "track_running_stats", False),
    "no_statistics": lambda model: [assigned("bn", k, None)(model) for k in ("running_mean", "running_var")],
    "frozen": lambda model: model.blocks[0].requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_fuse_then_change(change):
    fused, late, eager = fr.fuse(net()), net(), net()
    for model in (fused, late, eager):
        torch.manual_seed(5)
        change(model)
    late = fr.fuse(late)
    for training in (True, False):
        for model in (fused, late, eager):
            model.train(training)
        torch.manual_seed(6)
        expected = training_step(eager, images())
        for model in (fused, late):
            torch.manual_seed(6)
            assert_near(training_step(model, images()), expected)
        assert is_running_fused(fused, images())
        late(images()), eager(images())  # as often as the other, for the statistics


def test_fuse_then_change_of_class():
    """A norm with a forward of its own in the place of a plain one."""

    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 3.0 * super().forward(x)

    fused, eager = fr.fuse(net()), net()
    for model in (fused, eager):
        model.bn.__class__ = Scaled
        model.blocks[0].bn1.__class__ = Scaled
    assert_as(fused.train(), eager.train())


# --- weights that are computed ----------------------------------------------------------------------------------------

WEIGHTS = {
    "weight_norm": lambda conv: weight_norm(conv),
    "parametrized_weight_norm": lambda conv: parametrizations.weight_norm(conv),
    "spectral_norm": lambda conv: spectral_norm(conv),
    "parametrized_spectral_norm": lambda conv: parametrizations.spectral_norm(conv),
    "orthogonal": lambda conv: parametrizations.orthogonal(conv),
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
}


@pytest.mark.parametrize("fuse_first", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("reparametrize", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_fuse_computed_weights(reparametrize, fuse_first):
    """Left alone, with the reason, and right, also where they came later."""
    models = []
    for mine in (True, False):
        model = net()
        if mine and fuse_first:
            model = fr.fuse(model)
        torch.manual_seed(4)
        reparametrize(model.blocks[0].conv1)
        if mine and not fuse_first:
            torch.manual_seed(4)
            model = fr.fuse(model, inplace=True)
            left = {row.path: row.reason for row in fr.fusion_report(model).skipped}
            assert any(word in left["blocks.0.conv1"] for word in ("norm", "pruning", "parametrized"))
        models.append(model)
    for training in (True, False):
        steps = []
        for model in models:
            torch.manual_seed(3)
            steps.append(training_step(model.train(training), images()))
        assert_near(*steps)
    assert is_running_fused(models[0], images())


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fuse_then_another_dtype(dtype):
    truth = net().eval()
    fused, eager = fr.fuse(truth).to(dtype), net().to(dtype).eval()
    native = torch.channels_last
    eager = eager.to(memory_format=native)
    truth.load_state_dict({k: v.to(truth.state_dict()[k].dtype) for k, v in fused.state_dict().items()})
    x = images().to(dtype)
    with torch.no_grad():
        assert_two_times(fused(x), eager(x.to(memory_format=native)), truth(x.double()), floor="floor_ulps_block")
    assert_as(fr.fuse(net().float()).double().eval(), net().float().double().eval())


def test_fuse_to_and_back():
    fused = fr.fuse(net().float()).eval()
    with torch.no_grad():
        before = fused(images().float())
        fused.bfloat16()(images().bfloat16())
        assert fused.float()(images().float()).dtype == torch.float
    assert before.dtype == torch.float


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fuse_autocast(training):
    truth = net().train(training)
    fused, eager = fr.fuse(net().float()).train(training), net().float().train(training)
    eager = eager.to(memory_format=torch.channels_last)
    x = images().float().to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = truth(images())
        with torch.autocast("cpu", torch.bfloat16):
            found, plain = fused(x), eager(x)
    assert_two_times(found, plain, expected, floor="floor_ulps_block", dtype=torch.bfloat16)


def test_fuse_checkpointing():
    """A block that is computed again counts its batch once, as this package's blocks do, and has eager's gradients."""
    fused, eager = fr.fuse(net()).train(), net().train()
    x = torch.randn(2, CHANNELS, 6, 5, dtype=torch.double)
    for reentrant in (True, False):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        checkpoint(fused.blocks, leaves[0], use_reentrant=reentrant).square().sum().backward()
        eager.blocks(leaves[1]).square().sum().backward()
        assert_near([leaf.grad for leaf in leaves[:1]], [leaf.grad for leaf in leaves[1:]])
        assert_near([p.grad for p in fused.blocks.parameters()], [p.grad for p in eager.blocks.parameters()])
        assert_near(list(fused.blocks.buffers()), list(eager.blocks.buffers()))


class Listed(nn.Module):
    """Calls what its list of modules holds, one by one."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)
        self.layers = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(2))

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        for layer in self.layers:
            x = layer(x)
        return x


def test_fuse_list_of_modules_grows():
    model = Listed().double().eval()
    fused = fr.fuse(model)
    assert is_running_fused(fused, images(2))
    layer = nn.Conv2d(CHANNELS, CHANNELS, 1).double()
    for network in (model, fused):
        network.layers.append(layer)
    assert torch.equal(fused(images(2)), model(images(2)))  # its own forward, for another part of it would be missing
