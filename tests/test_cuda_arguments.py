"""What the operators of csrc/cuda refuse before they launch or divide anything; each good call beside it works."""

import re

import pytest
import torch
from cuda_good_arguments import (
    GOOD,
    NAN,
    POOL,
    WINDOW,
    add_act_bwd,
    add_act_fwd,
    bn_apply,
    bn_finalize,
    bn_input_grad,
    bn_max_pool,
    bn_max_pool_input_grad,
    bn_max_pool_reduce,
    bn_reduce,
    bn_reduce_added,
    bn_reduce_finalize,
    bn_stats,
    conv,
    conv_split,
    depthwise_dgrad,
    depthwise_fwd,
    depthwise_wgrad,
    goods,
    image,
    mask,
    max_pool,
    max_pool_bwd,
    name_of,
    operator,
    out,
    scale_act,
    stem,
    vector,
    written,
)
from cuda_kernels import FENCES, IN_EMULATOR, library, placed

pytestmark = pytest.mark.skipif(bool(library()), reason=library() or "it is there")


def refusal(good, args):
    """What the operator says; it must not have written anything."""
    before = {name: t.clone() for name, t in written(good, args).items()}
    with pytest.raises(RuntimeError) as error:
        operator(good)(**args)
    for name, t in written(good, args).items():
        assert torch.equal(t.nan_to_num(7), before[name].nan_to_num(7)), name
    return str(error.value).splitlines()[0]


@goods
def test_cuda_arguments_that_are_good(good):
    args = good()
    operator(good)(**args)
    for name, t in written(good, args).items():
        assert t.isfinite().all(), name


@pytest.mark.skipif(not IN_EMULATOR, reason="a GPU's memory has no such pages")
@goods
@pytest.mark.parametrize("at", FENCES)
def test_cuda_arguments_and_nothing_beside_them(at, good):
    """Each tensor at a page that cannot be touched, which changes no bit."""
    args = good()
    fenced = {name: placed(t, at) if isinstance(t, torch.Tensor) else t for name, t in args.items()}
    for call in (args, fenced):
        operator(good)(**call)
    for name, t in written(good, fenced).items():
        assert torch.equal(t, args[name]), name


def test_cuda_arguments_every_operator_is_in_the_table():
    prefix, others = "fused_resnet_C::cuda_", ("architectures", "driver_lacking")
    names = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    assert {name_of(good) for good in GOOD} == names - set(others)


# What no tensor argument may be; each is a change of the good one.


def moved(t):
    """The same values at an address that is not aligned."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return memory[1:].as_strided(t.shape, t.stride(), memory.storage_offset() + 1).copy_(t)


def longer(t):
    return torch.cat([t, t]).contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format)


def broadcast(t):
    return t[:1, :1, :1, :1].expand(t.shape) if t.dim() == 4 else t.flatten()[:1].expand(t.numel())


CHANGES = {
    "shorter": lambda t: t[:-1] if t.shape[0] > 1 else t[:, :-1],
    "longer": longer,
    "empty": lambda t: t[:0],
    "of_integers": lambda t: t.to(torch.int32),
    "of_doubles": lambda t: t.double(),
    "spread": lambda t: torch.stack([t, t], -1)[..., 0],
    "broadcast": broadcast,
}

# Those of any number of tiles.
TILES = {
    ("conv_split", "sums"),
    ("depthwise_wgrad", "workspace"),
    ("bn_reduce_finalize", "partials"),
    ("bn_reduce_finalize_added", "partials"),
}


@pytest.mark.parametrize("change", CHANGES)
@goods
def test_cuda_arguments_wrong_tensors(good, change):
    """Of each argument in turn; the message names the operator, and the argument or one that should be as it is."""
    for name, t in good().items():
        tiles = (good.__name__, name) in TILES and change in ("shorter", "longer")
        if isinstance(t, torch.Tensor) and not tiles:
            args = good()
            args[name] = CHANGES[change](t)
            message = refusal(good, args)
            assert re.match(rf"{name_of(good)}: .* is .*; expected ", message), (name, message)


@goods
def test_cuda_arguments_addresses(good):
    """Images, and vectors that are read in 16 bytes, are aligned; a convolution reads its vectors one by one."""
    for name, t in good().items():
        if (
            isinstance(t, torch.Tensor)
            and name != "mask"
            and not (name in ("scale", "shift") and "conv" in good.__name__)
        ):
            args = good()
            args[name] = moved(t)
            assert re.match(rf"{name_of(good)}: {name} is .* not at a multiple of 16 bytes", refusal(good, args)), name


@pytest.mark.skipif(IN_EMULATOR, reason="there is one device")
@goods
def test_cuda_arguments_on_another_device(good):
    for name, t in good().items():
        if isinstance(t, torch.Tensor):
            args = good()
            args[name] = t.cpu()
            assert "on cuda" in refusal(good, args), name


WRONG = [
    (add_act_fwd, {"residual": lambda: image(2, 16, 5, 2)}, "residual is Float [2, 16, 5, 2] with strides [160, 1,"),
    (add_act_fwd, {"residual": lambda: image(2, 16, 5, 3, dtype=torch.float16)}, "residual is Half [2, 16, 5, 3]"),
    (add_act_fwd, {"residual": lambda: image(2, 16, 3, 5)}, "expected a dense channels_last Float [2, 16, 5, 3] on"),
    (add_act_fwd, {"x": lambda: torch.zeros(2, 16, 5, 3)}, "x is Float [2, 16, 5, 3] with strides [240, 15, 3, 1]"),
    (add_act_fwd, {"act": 5}, "act is 5; expected 0 to 4"),
    (add_act_bwd, {"act": 0}, "act is 0; expected 1 to 4"),
    (add_act_bwd, {"act": 1, "y": None}, "y is None; expected the output"),
    (add_act_bwd, {"act": 3, "x": None}, "x is None; expected the inputs"),
    (add_act_bwd, {"residual": None}, "residual is None; expected the inputs"),
    (conv, {"tile_m": 0}, "tile is 0 x 64; expected"),
    (conv, {"tile_m": 96}, "tile is 96 x 64; expected"),
    (conv, {"geometry": (3, 3, 1, 1, 1, 1, 1, 1)}, "geometry is 8 numbers; expected 9"),
    (conv, {"geometry": (3, 3, 0, 1, 1, 1, 1, 1, 1)}, "geometry's stride is 0; expected 1 to"),
    (conv, {"geometry": (3, 3, 1, 1, -1, 1, 1, 1, 1)}, "geometry's padding is -1; expected 0 to"),
    (conv, {"geometry": (3, 3, 1, 1, 1, 1, 1, 1, 0)}, "geometry's groups is 0; expected 1 to"),
    (conv, {"geometry": (3, 3, 1, 1, 1, 1, 1, 1, 3)}, "x is Float [2, 16, 6, 5]"),
    (conv, {"geometry": (3, 3, 1, 1, 1, 1, 1, 1, 16)}, "weight is Float [24, 144]"),
    (conv, {"geometry": (3, 3, 2, 1, 1, 1, 1, 1, 1)}, "expected a dense channels_last Float [2, 24, 3, 5]"),
    (conv, {"geometry": (9, 3, 1, 1, 1, 1, 1, 1, 1)}, "the reach of geometry's window is 9; expected 1 to 8"),
    (conv, {"geometry": (3, 3, 1, 1, 1 << 15, 1, 1, 1, 1)}, "x's padded height or width is 65542; expected 1 to"),
    (conv, {"geometry": (3, 3, 1, 1, 1 << 40, 1, 1, 1, 1)}, "geometry's padding is 1099511627776"),
    (conv, {"weight": lambda: vector(24, 142)}, "weight is Float [24, 142]"),
    (conv, {"sums": lambda: vector(2, 60, 24)}, "partials is given; expected None beside sums"),
    (conv_split, {"sums": lambda: vector(9, 60, 24)}, "the splits of sums is 9; expected 1 to 5"),
    (conv_split, {"act": -1}, "act is -1; expected 0 to 4"),
    (depthwise_fwd, {"geometry": WINDOW[:6]}, "geometry is 6 numbers; expected 8"),
    (depthwise_fwd, {"tile": (4, 4)}, "tile is 2 numbers; expected 3"),
    (depthwise_fwd, {"tile": (0, 4, 4)}, "tile's rows is 0; expected 1 to"),
    (depthwise_fwd, {"tile": (4, 0, 4)}, "tile's channels is 0; expected 1 to"),
    (depthwise_fwd, {"tile": (4, 4, 5)}, "tile's warps is 5; expected 1 to 4"),
    (depthwise_fwd, {"tile": (1 << 32, 4, 4)}, "tile's rows is 4294967296"),
    (depthwise_fwd, {"weight": lambda: vector(8, 16)}, "weight is Float [8, 16]"),
    (depthwise_fwd, {"weight": lambda: vector(9, 16).half()}, "expected contiguous Float [9, 16]"),
    (depthwise_dgrad, {"geometry": (3, 3, 0, 2, 1, 1, 1, 1)}, "geometry's stride is 0; expected 1 to"),
    (depthwise_dgrad, {"geometry": (3, 3, 2, 2, 1, 1, 0, 1)}, "geometry's dilation is 0; expected 1 to"),
    (depthwise_dgrad, {"dx": lambda: image(2, 16, 7, 5)}, "grad is Float [2, 16, 3, 3]"),
    (depthwise_wgrad, {"dweight": lambda: vector(16, 1, 3, 2)}, "dweight is Float [16, 1, 3, 2]"),
    (depthwise_wgrad, {"workspace": lambda: vector(2, 9, 15)}, "expected contiguous Float [144]"),
    (stem, {"tile": (0, 5, 2, 32)}, "tile's rows or columns is 0; expected 1 to"),
    (stem, {"tile": (2, 3, 2, 32)}, "tile's columns is 3; expected a whole row, or even"),
    (stem, {"tile": (2, 5, 3, 32)}, "tile's times is 3; expected 2 or 4"),
    (stem, {"tile": (2, 5, 2, 16)}, "tile's channels is 16; expected 32 or 64"),
    (stem, {"tile": ()}, "tile is 0 numbers; expected 4"),
    (stem, {"geometry": (3, 3, 1, 1, 2, 2, 2, 2)}, "geometry's dilation is 2; expected 1"),
    (stem, {"weight": lambda: vector(1, 1)}, "weight is Float [1, 1]"),
    (stem, {"x": lambda: image(2, 5, 6, 5)}, "the channels of x is 5; expected 1 to 4"),
    (bn_stats, {"tile_rows": 0}, "tile_rows is 0; expected 1 to"),
    (bn_stats, {"tile_rows": 1}, "expected contiguous Float [30, 48]"),
    (bn_finalize, {"tile_rows": 0}, "tile_rows is 0; expected 1 to"),
    (bn_finalize, {"rows": 0}, "rows is 0; expected 1 to"),
    (bn_finalize, {"rows": (1 << 63) - 1}, "partials is Float [2, 3, 16]"),
    (bn_finalize, {"var": lambda: vector(15)}, "var is Float [15] with strides [1] on"),
    (bn_apply, {"act": 4}, "mask is given; expected None"),
    (bn_apply, {"act": 7}, "act is 7; expected 0 to 4"),
    (bn_apply, {"mask": lambda: mask()[1:]}, "expected contiguous Byte [120]"),
    (bn_apply, {"weight": lambda: vector(1).expand(16)}, "weight is Float [16] with strides [0]"),
    (bn_apply, {"residual": None}, "residual is None; expected what residual_mean is the mean of"),
    (bn_apply, {"residual_mean": None}, "residual_mean is None; expected a number for each channel"),
    (bn_apply, {"residual_var": None}, "residual_var is None; expected a number for each channel"),
    (bn_apply, {"residual_bias": lambda: vector(17)}, "residual_bias is Float [17]"),
    (bn_reduce, {"tile_rows": -1}, "tile_rows is -1; expected 1 to"),
    (bn_reduce, {"partials": lambda: vector(2, 2, 16)}, "expected contiguous Float [2, 48]"),
    (bn_reduce_added, {"partials": lambda: vector(2, 3, 16)}, "expected contiguous Float [2, 32]"),
    (bn_reduce_finalize, {"var": lambda: vector(0)}, "the size of var is 0; expected 1 to"),
    (bn_reduce_finalize, {"partials": lambda: vector(0)}, "expected contiguous Float [48]"),
    (bn_reduce_finalize, {"dresidual_weight": None}, "dresidual_weight is None; expected a number for each channel"),
    (bn_input_grad, {"act": -1}, "act is -1; expected 0 to 4"),
    (bn_input_grad, {"count": 0.5}, "count is 0.500000; expected a number from 1 on"),
    (bn_input_grad, {"count": NAN}, "count is nan; expected a number from 1 on"),
    (bn_input_grad, {"dresidual": None}, "dresidual is None; expected"),
    (bn_input_grad, {"dresidual_weight": None}, "dresidual_weight is None; expected"),
    (scale_act, {"x": lambda: image(2, 16, 0, 3)}, "x is Float [2, 16, 0, 3]"),
    (max_pool, {"argmax": lambda: image(2, 16, 3, 3)}, "expected a dense channels_last Byte [2, 16, 3, 3]"),
    (max_pool, {"geometry": (6, 5, 2, 2, 1, 1)}, "the number of windows is 3; expected 1 to 2"),
    (max_pool, {"geometry": (5, 6, 1, 1, 2, 3)}, "geometry's window is 30; expected 1 to 25"),
    (max_pool, {"geometry": (3, 3, 2, 2, 2, 1)}, "geometry's padding is 2; expected 0 to 1"),
    (max_pool_bwd, {"geometry": (3, 3, 0, 2, 1, 1)}, "geometry's stride is 0; expected 1 to"),
    (max_pool_bwd, {"geometry": POOL[:4]}, "geometry is 4 numbers; expected 6"),
    (bn_max_pool, {"act": 3}, "act is 3; expected 0 to 2"),
    (bn_max_pool_reduce, {"tile_rows": 0}, "tile_rows is 0; expected 1 to"),
    (bn_max_pool_input_grad, {"dbias": lambda: vector(17)}, "dbias is Float [17]"),
    (bn_max_pool_input_grad, {"count": -1.0}, "count is -1.000000; expected a number from 1 on"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "change", "message"), WRONG, ids=[f"{w[0].__name__}-{'-'.join(w[1])}" for w in WRONG])
def test_cuda_arguments_wrong(good, change, message):
    found = refusal(good, good() | {name: to() if callable(to) else to for name, to in change.items()})
    assert found.startswith(f"{name_of(good)}: ")
    assert message in found


def test_cuda_arguments_too_much_shared_memory():
    """The bytes that a block asks for, and those that the device has."""
    args = stem() | {
        "x": image(1, 3, 400, 400),
        "residual": None,
        "out": out(1, 24, 400, 400),
        "tile": (60, 400, 2, 32),
    }
    message = refusal(stem, args)
    assert re.search(r"a block takes \d{6} bytes of shared memory, of \d{5,6}", message), message
