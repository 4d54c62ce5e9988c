"""The modules: twins of plain PyTorch in training and inference, state, freezing, hooks, and saving."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from problems import ACT_FUNCTIONS, LAYOUTS, acts, poisoned
from tolerances import assert_two_times
from torch import nn

import fused_resnet as fr
from fused_resnet.modules import BatchNorm2d, DepthwiseSeparableConv2d

poison = pytest.fixture(autouse=True)(poisoned)


class PlainConvBNAct(nn.Module):
    """ConvBNAct2d as one writes it in PyTorch, with the same names."""

    def __init__(self, *args, act="relu", **options):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(*args, **options), nn.BatchNorm2d(args[1]), act

    def forward(self, x, residual=None):
        y = self.bn(self.conv(x))
        return ACT_FUNCTIONS[self.act](y if residual is None else y + residual)


def twin(module):
    """The same module in plain PyTorch, with the same parameters and buffers."""
    conv, plain = getattr(module, "conv", None), None
    if conv is not None:
        plain = PlainConvBNAct(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                               conv.dilation, conv.groups, conv.bias is not None, act=module.act)  # fmt: skip
        plain.bn.eps, plain.bn.momentum = module.bn.eps, module.bn.momentum
    else:
        plain = PlainBNAct(module)
    plain.load_state_dict(module.state_dict())
    return plain.train(module.training)


class PlainBNAct(nn.BatchNorm2d):
    def __init__(self, like):
        super().__init__(like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats)
        self.act = like.act

    def forward(self, x, residual=None):
        y = super().forward(x)
        return ACT_FUNCTIONS[self.act](y if residual is None else y + residual)


def randomise(module):
    """Statistics and parameters that are not 0 and 1."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.bias, m.running_mean, m.running_var):
                if t is not None:
                    t.data.uniform_(0.5, 1.5)
    return module


MODULES = {
    "conv3x3": lambda **o: fr.ConvBNAct2d(8, 16, 3, **o),
    "conv1x1_stride2_bias": lambda **o: fr.ConvBNAct2d(8, 16, 1, 2, 0, bias=True, **o),
    "conv3x3_grouped": lambda **o: fr.ConvBNAct2d(8, 16, 3, groups=4, eps=1e-3, momentum=0.3, **o),
    "batch_norm": lambda **o: fr.BNAct2d(8, **o),
    "batch_norm_cumulative": lambda **o: fr.BNAct2d(8, momentum=None, **o),
    "batch_norm_no_affine": lambda **o: fr.BNAct2d(8, affine=False, **o),
    "batch_norm_no_statistics": lambda **o: fr.BNAct2d(8, track_running_stats=False, **o),
}
modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


def step(module, x, residual, grad):
    """Output, gradients by name and buffers of one training step."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x, residual)
    y.backward(grad)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()} | {"x": x.grad}
    return y.detach(), gradients, {name: b.clone() for name, b in module.named_buffers()}


@modules
@acts
def test_module_is_its_twin(act, make):
    """Three training steps, then eval: outputs, gradients, buffers; num_batches_tracked counts the same."""
    module = randomise(make(act=act))
    plain, truth = twin(module), twin(module).double()
    for _ in range(3):
        x = LAYOUTS["channels_last"](torch.randn(4, 8, 7, 5) * 2 + 1)
        residual = torch.randn(plain(x).shape)
        plain.load_state_dict(module.state_dict())
        grad = torch.randn(residual.shape)
        if act in ("relu", "relu6", "hardswish"):  # one slope on either side of every kink
            pre = _pre_activation(truth, x.double(), residual.double())
            for kink in (0.0, 6.0, -3.0, 3.0):
                grad = grad * ((pre - kink).abs() > 1e-3)
        results = [step(module, x, residual, grad), step(plain, x, residual, grad)]
        results.append(step(truth, x.double(), residual.double(), grad.double()))
        _compare(*results)
    y, eager, true = module.eval()(x, residual), plain.eval()(x, residual), truth.eval()(x.double(), residual.double())
    assert_two_times(y, eager, true)


def _pre_activation(truth, x, residual):
    """Without a trace in the module."""
    found = copy.deepcopy(truth)
    found.act = "none"
    return found(x, residual)


def _compare(found, plain, true):
    assert_two_times(found[0], plain[0], true[0])
    for name in true[1]:
        if name != "conv.bias":  # batch norm takes it out again: its gradient is rounding
            assert_two_times(found[1][name], plain[1][name], true[1][name], name, "floor_ulps_gradient")
    for name in true[2]:
        if name.endswith("num_batches_tracked"):
            assert found[2][name] == plain[2][name]
        else:
            assert_two_times(found[2][name], plain[2][name], true[2][name], name)


@modules
def test_module_state_dict_is_its_twin(make):
    module = make()
    plain = twin(module)
    assert list(module.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert module.state_dict()[name].dtype == value.dtype, name


def test_batch_norm_cumulative_average():
    """momentum=None over three steps is the mean of the three batches (p5881)."""
    bn, batches = fr.BNAct2d(3, momentum=None), torch.randn(3, 4, 3, 5, 5)
    for x in batches:
        bn(x)
    assert bn.num_batches_tracked == 3
    torch.testing.assert_close(bn.running_mean, batches.mean((0, 1, 3, 4)))
    torch.testing.assert_close(bn.running_var, batches.var((1, 3, 4)).mean(0))


def test_old_checkpoint_without_num_batches_tracked_loads():
    bn = fr.BNAct2d(3)
    old = {name: value for name, value in bn.state_dict().items() if name != "num_batches_tracked"}
    old = type(bn.state_dict())(old)
    old._metadata = {"": {"version": 1}}
    bn.load_state_dict(old)
    assert bn.num_batches_tracked == 0


@pytest.mark.parametrize("kind", ["conv", "bn"])
def test_frozen_batch_norm_survives_train(kind):
    module = randomise(fr.ConvBNAct2d(8, 8, 3) if kind == "conv" else fr.BNAct2d(8))
    x = torch.randn(2, 8, 5, 5)
    y = module.eval()(x)
    fr.freeze_batch_norm(module)
    before = copy.deepcopy(module.state_dict())
    assert torch.equal(module.train()(x), y)
    module(x.requires_grad_()).sum().backward()
    bn = module.bn if kind == "conv" else module
    assert x.grad.abs().sum() > 0
    assert bn.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    fr.freeze_batch_norm(module, False).train()(x)
    assert bn.num_batches_tracked == 1
    assert bn.weight.requires_grad


def test_freezing_a_foreign_batch_norm_is_an_error():
    with pytest.raises(TypeError, match="freeze_batch_norm: 1 is a SyncBatchNorm, which has no frozen flag"):
        fr.freeze_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3)))


@pytest.mark.parametrize("block", [fr.BasicBlock, fr.Bottleneck], ids=["basic", "bottleneck"])
@pytest.mark.parametrize(
    "norm",
    [nn.SyncBatchNorm, lambda c: nn.GroupNorm(2, c), nn.Identity, nn.InstanceNorm2d, nn.BatchNorm2d],
    ids=["sync", "group", "identity", "instance", "torch"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_block_with_another_norm(training, norm, block):
    """Norms that are not fused run by themselves, with the activation and the residual behind them."""
    if norm is nn.SyncBatchNorm and training:
        pytest.skip("torch's SyncBatchNorm trains on a GPU only")
    module = randomise(block(8, 8 // block.expansion, norm_layer=norm)).train(training)
    x = LAYOUTS["channels_last"](torch.randn(3, 8, 7, 5))

    def plain(m, x):
        m = copy.deepcopy(m).to(x.dtype)
        y = F.relu(m.bn1(m.conv1(x)))
        if block is fr.BasicBlock:
            return F.relu(m.bn2(m.conv2(y)) + x)
        return F.relu(m.bn3(m.conv3(F.relu(m.bn2(m.conv2(y))))) + x)

    truth, eager = plain(module, x.double()), plain(module, x)
    assert_two_times(module(x).detach(), eager.detach(), truth.detach())


def test_conversion_to_sync_batch_norm_keeps_the_activation():
    """reliability.md, SyncBN (p187298), as far as it goes without a second process."""
    module = randomise(fr.ConvBNAct2d(8, 8, 3, act="silu")).eval()
    x = torch.randn(2, 8, 5, 5)
    y = module(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(converted.bn, nn.SyncBatchNorm)
    torch.testing.assert_close(converted.eval()(x), y)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("child", ["conv", "bn"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_children_fire(kind, child, training):
    module, seen = randomise(fr.ConvBNAct2d(8, 8, 3)).train(training), []
    x = torch.randn(2, 8, 5, 5).requires_grad_()
    y = module(x).detach()
    handle = getattr(getattr(module, child), f"register_{kind}_hook")(lambda m, *args: seen.append(m))
    hooked = module(x)
    hooked.sum().backward()
    assert seen == [getattr(module, child)]
    torch.testing.assert_close(hooked.detach(), y)
    handle.remove()
    module(x)
    assert len(seen) == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_module_is_copied_and_saved(how):
    module, x = randomise(fr.ConvBNAct2d(8, 8, 3, act="silu")).eval(), torch.randn(2, 8, 5, 5)
    y = module(x)  # with its caches filled
    if how == "deepcopy":
        found = copy.deepcopy(module)
    elif how == "pickle":
        found = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module if how == "torch.save" else module.state_dict(), file)
        file.seek(0)
        found = torch.load(file, weights_only=how == "state_dict")
        if how == "state_dict":
            state, found = found, fr.ConvBNAct2d(8, 8, 3, act="silu").eval()
            found.load_state_dict(state)
    assert torch.equal(found(x), y)
    found.conv.weight.data.zero_()
    found.eval()
    assert torch.equal(module(x), y)
    assert not torch.equal(found(x), y)


def test_module_repr_says_the_activation():
    assert "act='silu'" in repr(fr.ConvBNAct2d(3, 4, 1, act="silu"))
    assert "act='silu'" in repr(fr.BNAct2d(4, act="silu"))
    assert isinstance(fr.ConvBNAct2d(3, 4, 1).bn, BatchNorm2d)


@pytest.mark.parametrize(
    ("kernel", "dilation", "explicit", "expected"),
    [
        (3, 1, None, (1, 1)),
        (5, 2, None, (4, 4)),
        ((1, 7), 1, None, (0, 3)),
        (3, 1, 0, (0, 0)),
        (3, 1, "valid", "valid"),
    ],
    ids=["3x3", "5x5_dilated", "1x7", "explicit_zero", "valid"],
)
def test_conv_bn_act_padding_default(kernel, dilation, explicit, expected):
    assert fr.ConvBNAct2d(3, 4, kernel, dilation=dilation, padding=explicit).conv.padding == expected


@pytest.mark.parametrize("make", [fr.BNAct2d, lambda n, act: fr.ConvBNAct2d(n, n, 1, act=act)], ids=["bn", "conv"])
def test_module_unknown_act(make):
    with pytest.raises(ValueError, match="unknown act 'gelu', expected one of 'none', 'relu'"):
        make(4, act="gelu")


def test_depthwise_separable_is_its_twin():
    module = randomise(fr.DepthwiseSeparableConv2d(8, 16, stride=2)).eval()
    x = LAYOUTS["channels_last"](torch.randn(2, 8, 9, 7))
    plain = nn.Sequential(*map(twin, module)).eval()
    eager = plain(x)
    assert_two_times(module(x), eager, plain.double()(x.double()))


class _Louder(fr.ConvBNAct2d):
    def forward(self, x, residual=None):
        return super().forward(x, residual) * 100


def test_forward_of_a_subclass_is_called():
    separable = DepthwiseSeparableConv2d(4, 4)
    separable[1] = _Louder(4, 4, 1)
    x = torch.randn(2, 4, 6, 6)
    for training in (True, False):
        separable.train(training)
        expected = separable[1](separable[0](x))
        assert expected.abs().max() > 50
        torch.testing.assert_close(separable(x), expected)


def test_forward_of_an_instance_is_called():
    block, calls = fr.BasicBlock(4, 4).train(), []
    plain = block.conv2.forward
    block.conv2.forward = lambda x: calls.append(x.shape) or plain(x)
    block(torch.randn(2, 4, 6, 6))
    assert len(calls) == 1
