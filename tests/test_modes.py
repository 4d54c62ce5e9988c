"""The pieces of ReLU and ReLU6 are noted, or taken as given, however a network spells the activation; no dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet.modes import FusedPieces, Pieces, Settled, in_order_of
from fused_resnet.modules import unit

RELU = {
    "F.relu": F.relu,
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu by name": lambda x: torch.relu(input=x),
    "torch.relu_": torch.relu_,
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.relu_(),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU inplace": nn.ReLU(inplace=True),
}
RELU6 = {
    "F.relu6": F.relu6,
    "F.relu6 inplace": lambda x: F.relu6(x, inplace=True),
    "F.hardtanh": lambda x: F.hardtanh(x, 0, 6),
    "F.hardtanh by name": lambda x: F.hardtanh(x, max_val=6.0, min_val=0.0, inplace=True),
    "F.hardtanh_": lambda x: F.hardtanh_(x, 0.0, 6.0),
    "nn.ReLU6": nn.ReLU6(),
    "nn.Hardtanh": nn.Hardtanh(0, 6, inplace=True),
}
OTHERS = {
    "F.hardtanh": F.hardtanh,
    "F.hardtanh of another range": lambda x: F.hardtanh(x, 0, 1),
    "nn.Hardtanh": nn.Hardtanh(0.0),
    "F.hardswish": F.hardswish,
    "nn.SiLU": nn.SiLU(inplace=True),
    "F.leaky_relu": F.leaky_relu,
    "torch.clamp": lambda x: torch.clamp(x, 0, 1),
}
ALL = [pytest.param(function, 2, id=name) for name, function in RELU.items()]
ALL += [pytest.param(function, 3, id=name) for name, function in RELU6.items()]


@pytest.mark.parametrize(("function", "pieces"), ALL)
def test_pieces_are_noted_and_nothing_else_changes(function, pieces):
    values = torch.tensor([-1.0, 0.0, 2.0, 6.0, 7.0, float("nan")])
    expected = function(values.clone())
    leaf = values.clone().requires_grad_()
    x = leaf.clone()
    with Pieces() as noted:
        y = function(x)
    y.sum().backward()
    assert torch.equal(torch.nan_to_num(y, 9.0), torch.nan_to_num(expected, 9.0))
    assert [p.tolist() for p in noted.taken] == [[0, 0, 1, 1, 1, 1] if pieces == 2 else [0, 0, 1, 2, 2, 1]]
    assert torch.equal(leaf.grad, (noted.taken[0] == 1).float())


@pytest.mark.parametrize(("function", "pieces"), ALL)
def test_pieces_are_taken_as_given(function, pieces):
    leaf = torch.tensor([-1.0, 2.0, 7.0], requires_grad=True)
    x, plain = leaf.clone(), leaf.detach().clone()
    function(plain)
    inplace = not torch.equal(plain, leaf)
    with Pieces([torch.tensor([1, 0, pieces - 1], dtype=torch.int8)]) as noted:
        y = function(x)
    y.sum().backward()
    assert y.tolist() == [-1.0, 0.0, 7.0 if pieces == 2 else 6.0]
    assert leaf.grad.tolist() == [1.0, 0.0, 1.0 if pieces == 2 else 0.0]
    assert torch.equal(x, y if inplace else leaf)
    assert (y.data_ptr() == x.data_ptr()) == inplace
    assert len(noted.taken) == 1


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS)
def test_other_functions_have_no_pieces(function):
    x = torch.randn(9)
    with Pieces() as plain, FusedPieces() as fused:
        function(x.clone())
    assert plain.taken == fused.taken == []


@pytest.mark.parametrize("function", [p.values[0] for p in ALL], ids=[p.id for p in ALL])
def test_fused_and_plain_runs_note_the_same(function):
    x = torch.randn(99) * 5
    with FusedPieces() as fused, Pieces() as plain:
        function(x.clone())
    assert len(fused.taken) == len(plain.taken) == 1
    assert torch.equal(fused.taken[0], plain.taken[0])


def test_pieces_of_other_activations_are_not_put_in_order():
    first, second = torch.zeros(2, dtype=torch.int8), torch.ones(3, dtype=torch.int8)
    assert in_order_of([first, second], [second, first])[0] is first
    assert in_order_of([first, second], [first]) is None
    assert in_order_of([first], [first, second]) is None
    assert in_order_of([first, first], [first, second]) is None


# --- nothing is random ---------------------------------------------------------------------------------------------


DROPOUTS = [
    nn.Dropout(0.9),
    nn.Dropout(0.9, inplace=True),
    nn.Dropout2d(0.9),
    nn.AlphaDropout(),
    nn.FeatureAlphaDropout(),
]


@pytest.mark.parametrize("module", DROPOUTS, ids=str)
def test_settled_dropout_drops_nothing(module):
    x = torch.randn(2, 3, 4, 5)
    with Settled():
        y = module.train()(x)
    assert torch.equal(y, x)
    assert (y.data_ptr() == x.data_ptr()) == module.inplace


def test_settled_attention_drops_nothing():
    q, k, v = torch.randn(3, 2, 4, 8)
    with Settled():
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.9)
    assert torch.equal(y, F.scaled_dot_product_attention(q, k, v))


def test_bernoulli_of_a_tensor_is_the_likelier_value():
    chances = torch.tensor([0.1, 0.9, 0.4])
    with Settled():
        assert torch.bernoulli(chances).tolist() == [0.0, 1.0, 0.0]
        assert torch.empty(3).bernoulli_(chances).tolist() == [0.0, 1.0, 0.0]
        assert torch.empty(2).bernoulli_().tolist() == [1.0, 1.0]


def _timm():
    options = {"drop_rate": 0.5, "drop_path_rate": 0.5, "drop_block_rate": 0.5}
    return pytest.importorskip("timm").create_model("resnet18", num_classes=5, **options)


def _torchvision():
    depth = pytest.importorskip("torchvision.ops.stochastic_depth").StochasticDepth(0.5, "row")
    return nn.Sequential(nn.Conv2d(3, 5, 1), depth, nn.Dropout2d(0.5))


@pytest.mark.parametrize("build", [_timm, _torchvision])
def test_settled_networks_are_not_random(build):
    model, image = build().train(), torch.randn(4, 3, 32, 32)

    def result():
        return model(image)

    assert not torch.equal(result(), result())
    with Settled():
        assert torch.equal(result(), result())
        assert result().count_nonzero() == result().numel()


# --- max pooling ----------------------------------------------------------------------------------------------------


POOLS = {
    "F": lambda x: F.max_pool2d(x, 3, 2, 1),
    "torch": lambda x: torch.max_pool2d(x, 2),
    "nn": nn.MaxPool2d(3, 1, ceil_mode=True),
    "dilated": nn.MaxPool2d(2, dilation=2),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (3, 9, 8)], ids=len)
def test_pooling_notes_and_takes_indices(pool, shape):
    x = torch.randn(shape, requires_grad=True)
    expected = pool(x)
    with FusedPieces() as fused, Pieces() as noted:
        found = pool(x)
    assert torch.equal(found, expected)
    assert torch.equal(noted.taken[0], fused.taken[-1])
    with Pieces(noted.taken):
        taken = pool(x)
    assert torch.equal(taken, expected)
    grad = torch.randn_like(expected)
    assert torch.allclose(*(torch.autograd.grad(y, x, grad)[0] for y in (taken, expected)))
    with Pieces([torch.zeros_like(noted.taken[0])]):
        first = pool(x)
    assert torch.equal(first, x[..., :1, :1].expand_as(first))


@pytest.mark.parametrize("lean", [False, True])
def test_block_with_pooling_notes_what_the_plain_one_does(lean):
    x = torch.randn(2, 3, 16, 13)
    conv, bn = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
    options = {"max_pool": ((3, 3), (2, 2), (1, 1)), "lean": lean}
    with FusedPieces() as fused:
        unit.train([unit.Layer(conv, bn)], x.contiguous(memory_format=torch.channels_last), **options)
    with Pieces() as plain:
        F.max_pool2d(F.relu(bn(conv(x))), 3, 2, 1)
    assert [p.dtype for p in fused.taken] == [torch.int8, torch.int64]
    assert torch.equal(fused.taken[0], plain.taken[0])
    positive = fused.taken[0].flatten(2).gather(2, fused.taken[1].flatten(2)).view_as(fused.taken[1]) == 1
    assert positive.any()
    assert torch.equal(fused.taken[1][positive], plain.taken[1][positive])  # among zeros any is the largest
