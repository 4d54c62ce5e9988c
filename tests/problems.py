"""Problems that all operator tests share: shapes, layouts, backends, and the same formulas in plain PyTorch."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_two_times, tolerance
from torch import Tensor

import fused_resnet as fr
from fused_resnet.backends.selection import BACKENDS
from fused_resnet.ops.conv_args import normalise

ACTS = ("none", "relu", "relu6", "hardswish", "silu")
EXACT_ACTS = ("none", "relu", "relu6")  # no rounding of their own
KINKS = {"none": (), "relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0), "silu": ()}
ACT_FUNCTIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}
LOW = (torch.float32, torch.bfloat16, torch.float16)
FEW, SIGNS = 4, 8  # see usual_sizes

BACKEND_NAMES = fr.available_backends()


class ConvCase(NamedTuple):
    id: str
    x: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int]
    stride: object = 1
    padding: object = 0
    dilation: object = 1
    groups: int = 1
    residual: bool = False
    act: str = "relu"

    @property
    def geometry(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return (self.out_channels, self.x[1] // self.groups, *self.kernel)


CONV_CASES = (
    ConvCase("1x1", (2, 64, 8, 8), 64, (1, 1)),
    ConvCase("1x1_one_pixel", (1, 17, 1, 1), 5, (1, 1), residual=True),
    ConvCase("1x1_padded", (2, 8, 4, 5), 16, (1, 1), padding=1, residual=True),
    ConvCase("1x1_to_one_channel", (2, 3, 5, 7), 1, (1, 1), act="none"),
    ConvCase("1x1_stride2_odd", (2, 17, 7, 9), 33, (1, 1), stride=2, act="silu"),
    ConvCase("3x3_residual", (2, 64, 9, 7), 64, (3, 3), padding=1, residual=True),
    ConvCase("3x3_one_channel", (3, 1, 5, 5), 3, (3, 3), padding=1, act="relu6"),
    ConvCase("3x3_stride2_odd", (2, 17, 11, 13), 31, (3, 3), stride=2, padding=1, act="hardswish"),
    ConvCase("3x3_valid", (1, 3, 3, 3), 17, (3, 3), padding="valid", residual=True, act="none"),
    ConvCase("3x3_same_dilated", (2, 8, 10, 9), 16, (3, 3), padding="same", dilation=2, residual=True, act="silu"),
    ConvCase("2x4_same_lopsided", (2, 5, 6, 7), 9, (2, 4), padding="same"),
    ConvCase("3x5_pairs", (1, 16, 13, 12), 24, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2), act="relu6"),
    ConvCase("5x5_padding_over_half", (1, 17, 6, 5), 7, (5, 5), padding=4),
    ConvCase("7x7_stem", (2, 3, 15, 17), 64, (7, 7), stride=2, padding=3),
    ConvCase("3x3_grouped", (2, 12, 8, 7), 18, (3, 3), padding=1, groups=3, residual=True, act="relu6"),
    ConvCase("3x3_depthwise", (2, 17, 9, 9), 17, (3, 3), stride=2, padding=1, groups=17, act="hardswish"),
    ConvCase("3x3_depthwise_twice", (1, 8, 5, 6), 16, (3, 3), padding=1, groups=8, act="silu"),
    ConvCase("1x7_row", (1, 16, 4, 9), 16, (1, 7), padding=(0, 3), residual=True, act="hardswish"),
)

# N, C, H, W of the operators without a convolution, by id.
PLANES = {
    "one_channel": (2, 1, 3, 5),
    "three_channels": (2, 3, 7, 5),
    "seventeen": (3, 17, 5, 3),
    "sixty_four": (2, 64, 8, 8),
    "two_values": (2, 5, 1, 1),
    "wide_row": (1, 20, 1, 257),
    "one_image": (1, 33, 9, 11),
}


def _sliced(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    around = x.new_full((n, c + 2, h + 1, 2 * w), float("nan"))  # what a kernel must not read
    return around[:, 1 : c + 1, :h, ::2].copy_(x)


# Each gives a tensor of x's shape and other strides; `expanded` also repeats the first image.
LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "expanded": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def image(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return LAYOUTS["channels_last"](torch.randn(*size).to(dtype))


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """`module` in eval mode, with vectors (batch norm's, biases) that are not 0 and 1."""
    for t in [*module.parameters(), *module.buffers()]:
        if t.is_floating_point() and t.dim() == 1:
            t.data.uniform_(0.5, 1.5)
    return module.eval()


def cases(table=CONV_CASES):
    return pytest.mark.parametrize("case", table, ids=lambda case: case.id)


def planes(without: str = ""):
    table = {name: shape for name, shape in PLANES.items() if name != without}
    return pytest.mark.parametrize("shape", table.values(), ids=table.keys())


def dtypes(*found: torch.dtype):
    return pytest.mark.parametrize("dtype", found or LOW, ids=lambda dtype: str(dtype).removeprefix("torch."))


backends = pytest.mark.parametrize("backend", BACKEND_NAMES)
acts = pytest.mark.parametrize("act", ACTS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def require(backend: str, op: str, x: Tensor, weight: Tensor | None = None, **geometry) -> None:
    """Skip, with the backend's own reason, where it cannot run the problem."""
    args = None
    if weight is not None:
        geometry = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | geometry
        x, args = normalise(op, x, weight, **geometry)
    reason = BACKENDS[backend].unsupported(op, x, weight, args)
    if reason:
        pytest.skip(f"{backend}: {reason}")


def poisoned():
    """Body of a fixture: torch.empty is filled with NaN, so that what a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def integers(*size: int, low: int = -1, high: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(low, high + 1, size).to(dtype)


def representable(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """`truth` in `dtype`, after making sure that nothing is rounded: a test of exactness must be one."""
    assert torch.equal(truth.to(dtype).double(), truth.double()), "the problem is not exact in this dtype"
    return truth.to(dtype)


# --- the same formulas in plain PyTorch ---


def finish(y: Tensor, residual: Tensor | None, act: str) -> Tensor:
    return ACT_FUNCTIONS[act](y if residual is None else y + residual)


def eager_scale_act(x, scale, shift, residual=None, *, act):
    """`batch_norm` with mean 0, variance 1 and eps 0 is a scale and a shift."""
    mean, var = torch.zeros_like(scale), torch.ones_like(scale)
    return finish(plain_batch_norm(x, mean, var, scale, shift, eps=0.0), residual, act)


def plain_batch_norm(x, mean, var, weight=None, bias=None, *, eps):
    """`F.batch_norm` in eval mode without its check of eps: torch 2.11 refuses 0, which the operator itself takes."""
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)


def eager_conv_scale_act(x, weight, scale, shift, residual=None, *, act, **geometry):
    return eager_scale_act(F.conv2d(x, weight, **geometry), scale, shift, residual, act=act)


def eager_bn_act(x, weight=None, bias=None, residual=None, *, act, eps=1e-5, running=(None, None), momentum=0.1):
    """In training; `running` is updated as in `torch.nn.BatchNorm2d`."""
    return finish(F.batch_norm(x, *running, weight, bias, True, momentum, eps), residual, act)


def eager_conv_bn_act(x, weight, bn_weight, bn_bias, conv_bias=None, residual=None, *, act, eps=1e-5, **geometry):
    z = F.conv2d(x, weight, conv_bias, **geometry)
    return eager_bn_act(z, bn_weight, bn_bias, residual, act=act, eps=eps)


def eager_add_act(x, residual, *, act):
    return ACT_FUNCTIONS[act](x + residual)


def run(function, tensors: dict, grad: Tensor | None, dtype: torch.dtype | None = None, **options):
    """Output and gradients, by name, of `function(**tensors)`; `dtype` casts every tensor first."""
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(grad is not None)
        for name, t in tensors.items()
    }
    y = function(**leaves, **options)
    if grad is None:
        return y, {}
    wanted = {name: t for name, t in leaves.items() if t is not None}
    found = torch.autograd.grad(y, list(wanted.values()), grad.to(y.dtype) if dtype else grad)
    return y.detach(), dict(zip(wanted, found, strict=True))


def on_cpu(tensors: dict) -> dict:
    """Where the truth is computed: no error of another device is in it."""
    return {name: None if t is None else t.cpu() for name, t in tensors.items()}


def smooth_gradient(eager, tensors: dict, act: str, layout: str = "nchw", **options) -> Tensor:
    """A random grad_output, zero where the pre-activation is too close to a kink to have one gradient."""
    x, tensors = tensors["x"], on_cpu(tensors)
    pre, _ = run(eager, tensors, None, torch.float64, act="none", **options)
    margin = tolerance("kink_margin") * max(1.0, pre.abs().max().item())
    keep = torch.ones_like(pre, dtype=torch.bool)
    for kink in KINKS[act]:
        keep &= (pre - kink).abs() > margin
    if layout == "expanded":
        keep = keep.all(0, keepdim=True).expand(pre.shape)
    return LAYOUTS[layout]((torch.randn(pre.shape).to(x.dtype) * keep).to(x.device))


def usual_sizes(eager, tensors: dict, grad: Tensor, true_grads: dict, **options) -> dict[str, float]:
    """The root mean square of the gradients that have fewer than `FEW` values, over grad_outputs of other signs.

    Such a sum may by chance be much smaller than its terms, whose roundings are in it all the same; among many sums
    the largest is not.
    """
    few = [name for name, value in true_grads.items() if 0 < value.numel() < FEW]
    if not few:
        return {}
    squares = dict.fromkeys(few, 0.0)
    for _ in range(SIGNS):
        signs = torch.randint(0, 2, grad.shape) * 2 - 1
        _, found = run(eager, tensors, grad * signs, torch.float64, **options)
        for name in few:
            squares[name] += found[name].square().mean().item() / SIGNS
    return {name: value**0.5 for name, value in squares.items()}


def compare_with_eager(
    fused,
    eager,
    tensors: dict,
    act: str,
    layout: str = "nchw",
    fused_options=None,
    dtype=None,
    floor="floor_ulps_gradient",
    **options,
):
    """The two-times rule for the output and for the gradient of every tensor; grad_output has the given layout.

    The truth is computed on the CPU, everything else on the device of the tensors. Eager runs in channels_last, the
    native layout: for NCHW oneDNN sums a convolution in another order, which may be three times as precise in fp32.
    `dtype`: of the maps between several layers, whose rounding is in gradients of another dtype too; `floor`: the
    tolerance of gradients where eager happens to be exact.
    """
    grad = smooth_gradient(eager, tensors, act, layout, **options)
    truth, true_grads = run(eager, on_cpu(tensors), grad.cpu(), torch.float64, act=act, **options)
    native = {name: t if t is None or t.dim() != 4 else LAYOUTS["channels_last"](t) for name, t in tensors.items()}
    plain, plain_grads = run(eager, native, LAYOUTS["channels_last"](grad), act=act, **options)
    out, grads = run(fused, tensors, grad, act=act, **options, **(fused_options or {}))
    assert_two_times(out.cpu(), plain.cpu(), truth)
    sizes = usual_sizes(eager, on_cpu(tensors), grad.cpu(), true_grads, act=act, **options)
    for name, found in grads.items():
        what = f"gradient of {name}"
        assert_two_times(found.cpu(), plain_grads[name].cpu(), true_grads[name], what, floor, dtype, sizes.get(name, 0))
