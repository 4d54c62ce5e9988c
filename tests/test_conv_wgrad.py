"""The compiled gradient of a convolution's weight: exactness, the norm on the way, NaN, repeatability, and errors."""

import pytest
import torch
from problems import ACTS, CONV_CASES, EXACT_ACTS, LAYOUTS, ConvCase, cases, integers, layouts
from tolerances import assert_two_times

from fused_resnet.backends import cpu, reference
from fused_resnet.backends.cpu.extension import ACT_CODES, extension_missing
from fused_resnet.backends.norm import Norm
from fused_resnet.backends.reference import channels_last
from fused_resnet.ops.conv_args import normalise

pytestmark = pytest.mark.skipif(bool(extension_missing()), reason=extension_missing() or "it is there")

# Beside those of all convolutions: whole panels and their tails, chunks of output channels, several bands and slabs.
WGRAD_CASES = [case for case in CONV_CASES if case.groups == 1] + [
    ConvCase("1x1_65_to_29", (3, 65, 9, 11), 29, (1, 1)),
    ConvCase("1x1_chunks", (2, 33, 7, 7), 600, (1, 1)),
    ConvCase("1x1_bands", (4, 64, 40, 40), 64, (1, 1)),
    ConvCase("1x1_stride3", (2, 48, 10, 11), 15, (1, 1), stride=3),
    ConvCase("1x1_stride2_padded", (2, 32, 6, 7), 14, (1, 1), stride=2, padding=2),
    ConvCase("3x3_images_in_a_slab", (9, 40, 5, 5), 43, (3, 3), padding=1),
    ConvCase("3x3_bands", (3, 64, 41, 37), 32, (3, 3), padding=1),
    ConvCase("3x3_stride2_whole_panels", (2, 64, 9, 10), 64, (3, 3), stride=2, padding=1),
    ConvCase("3x3_stride2_dilated", (2, 33, 13, 12), 17, (3, 3), stride=2, padding=3, dilation=2),
    ConvCase("3x3_more_padding_than_image", (1, 34, 2, 1), 3, (3, 3), padding=3),
    ConvCase("3x3_folded_stride2_dilated", (2, 3, 13, 12), 20, (3, 3), stride=2, padding=3, dilation=(1, 2)),
    ConvCase("2x1_column", (2, 35, 6, 5), 8, (2, 1), stride=(1, 2), padding=(1, 0)),
    ConvCase("1x3_row", (2, 35, 6, 5), 8, (1, 3), stride=(2, 1), padding=(0, 1)),
]
BY_ID = {case.id: case for case in WGRAD_CASES}
WHOLE, TAIL = BY_ID["3x3_stride2_whole_panels"], BY_ID["3x3_images_in_a_slab"]


def problem(case, draw):
    """dy, x, the norm's vectors, and an uninitialised weight: its gradient needs no more than its layout."""
    x, weight = channels_last(draw(*case.x)), torch.full(case.weight, torch.nan)
    _, args = normalise("wgrad", x, weight, **case.geometry)
    c = case.x[1]
    norm = Norm(mean=draw(c), var=draw(c) ** 2 + 0.5, weight=draw(c), bias=draw(c), eps=0.5)
    return channels_last(draw(*args.output_size(x, weight))), x, norm, weight, args


def integer_norm(channels):
    """With 1 / sqrt(var + eps) = 1 or 1/2."""
    var = torch.tensor([0.5, 3.5]).repeat(channels)[:channels]
    weight, bias = 2 * integers(channels), integers(channels)
    return Norm(mean=integers(channels), var=var, weight=weight, bias=bias, eps=0.5)


def activated(x, norm, act):
    if norm is None:
        return x
    weight = torch.ones_like(norm.mean) if norm.weight is None else norm.weight
    bias = torch.zeros_like(norm.mean) if norm.bias is None else norm.bias
    x_hat = reference.normalise(x, norm._replace(mean=norm.mean.to(x.dtype), var=norm.var.to(x.dtype)))
    return reference.act_forward(reference.affine(x_hat, weight, bias, None), act)


def plain(dy, x, norm, act, weight, args, dtype=torch.float64):
    dy, y = dy.to(dtype), activated(x.to(dtype), norm, act)
    return reference.convolution_backward(dy, y, None, "none", weight.to(dtype), args, (False, True, False), None)[1]


def compiled(dy, x, norm, act, weight, args):
    vectors = [None] * 4 if norm is None else [norm.mean, norm.var, norm.weight, norm.bias]
    found = torch.full_like(weight, torch.nan)
    geometry = (*weight.shape[2:], *args.stride, *args.padding, *args.dilation)
    eps = 0.0 if norm is None else norm.eps
    torch.ops.fused_resnet_C.conv_wgrad(dy, x, *vectors, eps, ACT_CODES[act], geometry, found)
    return found


@cases(WGRAD_CASES)
def test_conv_wgrad_exact(case):
    dy, x, _, weight, args = problem(case, integers)
    truth = plain(dy, x, None, "none", weight, args)
    for layout in ("nchw", "channels_last", "transposed"):
        found = compiled(dy, x, None, "none", LAYOUTS[layout](weight), args)
        assert torch.equal(found.double(), truth), layout


@cases(WGRAD_CASES)
def test_conv_wgrad_exact_with_norm(case):
    dy, x, _, weight, args = problem(case, integers)
    norm = integer_norm(case.x[1])
    for act in EXACT_ACTS:
        truth = plain(dy, x, norm, act, weight, args)
        assert torch.equal(compiled(dy, x, norm, act, weight, args).double(), truth), act


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("without", ["", "weight", "bias"])
@cases([WHOLE, TAIL, BY_ID["3x3_stride2_odd"], BY_ID["1x1_bands"]])
def test_conv_wgrad_two_times(case, without, act):
    dy, x, norm, weight, args = problem(case, torch.randn)
    norm = norm._replace(**({without: None} if without else {}))
    truth = plain(dy, x, norm, act, weight, args)
    eager = plain(dy, x, norm, act, weight, args, torch.float32)
    assert_two_times(compiled(dy, x, norm, act, weight, args), eager, truth, floor="floor_ulps_gradient")


@pytest.mark.parametrize("channels", [16, 64])
def test_conv_wgrad_two_times_of_long_sums(channels):
    """50176 pixels a sum."""
    case = ConvCase("long", (16, channels, 56, 56), 32, (3, 3), padding=1)
    dy, x, _, weight, args = problem(case, torch.randn)
    truth, eager = (plain(dy, x, None, "none", weight, args, dtype) for dtype in (torch.float64, torch.float32))
    assert_two_times(compiled(dy, x, None, "none", weight, args), eager, truth, floor="floor_ulps_gradient")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@cases([WHOLE, TAIL, BY_ID["7x7_stem"], BY_ID["1x1_65_to_29"]])
def test_conv_wgrad_keeps_nan_to_its_channel(case, value):
    dy, x, _, weight, args = problem(case, torch.randn)
    clean = compiled(dy, x, None, "none", weight, args)
    n, c, h, w = (size // 2 for size in x.shape)
    spoilt = x.clone()
    spoilt[n, c, h, w] = value
    found = compiled(dy, spoilt, None, "none", weight, args)
    others = torch.arange(case.x[1]) != c
    assert not torch.isfinite(found[:, c]).all()
    assert torch.equal(found[:, others], clean[:, others])
    k, p, q = (size // 2 for size in dy.shape[1:])
    spoilt = dy.clone()
    spoilt[n, k, p, q] = value
    found = compiled(spoilt, x, None, "none", weight, args)
    others = torch.arange(case.out_channels) != k
    assert not torch.isfinite(found[k]).any()
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("act", ACTS)
def test_conv_wgrad_nan_passes_the_activation(act):
    dy, x, norm, weight, args = problem(TAIL, torch.randn)
    x[4, 3, 2, 2] = torch.nan
    found = compiled(dy, x, norm, act, weight, args)
    assert found[:, 3].isnan().all()
    assert torch.isfinite(found[:, torch.arange(TAIL.x[1]) != 3]).all()


@cases([BY_ID["1x1_chunks"], BY_ID["1x1_bands"], BY_ID["3x3_bands"], BY_ID["7x7_stem"]])
def test_conv_wgrad_repeats_itself(case):
    """The same bits with as many threads; any number of threads, more than there are rows too, is right."""
    dy, x, norm, weight, args = problem(case, torch.randn)
    truth, eager = (plain(dy, x, norm, "silu", weight, args, dtype) for dtype in (torch.float64, torch.float32))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4, 64):
            torch.set_num_threads(threads)
            first, second = (compiled(dy, x, norm, "silu", weight, args) for _ in range(2))
            assert torch.equal(first, second)
            assert_two_times(first, eager, truth, f"{threads} threads", floor="floor_ulps_gradient")
    finally:
        torch.set_num_threads(before)


def test_conv_wgrad_splits_exactly():
    """Every way to share the work among threads, on a problem whose sums are exact."""
    before = torch.get_num_threads()
    try:
        for case in WGRAD_CASES:
            dy, x, _, weight, args = problem(case, integers)
            truth = plain(dy, x, None, "none", weight, args)
            for threads in (1, 5, 8, 33):
                torch.set_num_threads(threads)
                found = compiled(dy, x, None, "none", weight, args)
                assert torch.equal(found.double(), truth), (case.id, threads)
    finally:
        torch.set_num_threads(before)


@layouts
def test_conv_wgrad_is_the_backends(layout):
    """convolution_backward takes inputs, gradients and weights as they lie."""
    dy, x, _, _, args = problem(TAIL, integers)
    weight = LAYOUTS[layout](torch.zeros(TAIL.weight))
    found = cpu.convolution_backward(
        LAYOUTS[layout](dy), LAYOUTS[layout](x), None, "none", weight, args, (False, True, True), None
    )
    expanded = layout == "expanded"
    dy, x = (LAYOUTS[layout](t) if expanded else t for t in (dy, x))
    inputs = (dy.double(), x.double(), None, "none", weight.double(), args)
    truth = reference.convolution_backward(*inputs, (False, True, True), None)
    assert found[0] is None
    assert torch.equal(found[1].double(), truth[1])
    assert torch.equal(found[2].double(), truth[2])


def wrong_calls():
    dy, x, norm, weight, _ = problem(TAIL, torch.randn)
    good = [dy, x, norm.mean, norm.var, norm.weight, norm.bias, 0.5, 1, (3, 3, 1, 1, 1, 1, 1, 1), weight]
    k, c = TAIL.out_channels, TAIL.x[1]
    return {
        "flat dy": (good, 0, dy[0], "4-d"),
        "bf16 x": (good, 1, x.bfloat16(), "fp32"),
        "fp64 dweight": (good, 9, weight.double(), "fp32"),
        "nchw dy": (good, 0, dy.contiguous(), "channels_last"),
        "nchw x": (good, 1, x.contiguous(), "channels_last"),
        "sliced x": (good, 1, LAYOUTS["sliced"](x), "channels_last"),
        "other batch": (good, 1, channels_last(x[:5]), "wrong size"),
        "too small dy": (good, 0, channels_last(dy[:, :, :, :4]), "wrong size"),
        "no images": (good, 0, dy[:0], "empty"),
        "short geometry": (good, 8, (3, 3, 1, 1), "geometry"),
        "stride 0": (good, 8, (3, 3, 0, 1, 1, 1, 1, 1), "out of range"),
        "negative padding": (good, 8, (3, 3, 1, 1, -1, 1, 1, 1), "out of range"),
        "kernel larger than image": (good, 8, (9, 9, 1, 1, 1, 1, 1, 1), "wrong size"),
        "other dweight": (good, 9, torch.empty(k, c, 3, 1), r"\[K, C, R, S\]"),
        "unknown activation": (good, 7, 5, "activation"),
        "mean without var": (good, 3, None, "together"),
        "weight without mean": ([*good[:2], None, None, *good[4:]], 7, 1, "together"),
        "short mean": (good, 2, norm.mean[1:], r"fp32 \[C\]"),
        "bf16 weight": (good, 4, norm.weight.bfloat16(), r"fp32 \[C\]"),
        "strided bias": (good, 5, torch.zeros(2 * c)[::2], r"fp32 \[C\]"),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_conv_wgrad_refuses(name):
    call, at, value, message = wrong_calls()[name]
    call = [*call[:at], value, *call[at + 1 :]]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_resnet_C.conv_wgrad(*call)
