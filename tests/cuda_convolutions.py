"""Problems of the convolution kernels, and what they should give."""

import math
from unittest import mock

import torch
import torch.nn.functional as F
from cuda_kernels import DEVICE, FENCES, placed
from problems import ACT_FUNCTIONS, integers, representable
from tolerances import assert_two_times
from torch import Tensor

from fused_resnet.backends.problem import Problem
from fused_resnet.backends.reference import channels_last

MODES = {"bf16": (torch.bfloat16, False), "fp16": (torch.float16, False)}
MODES |= {"tf32": (torch.float32, True), "fp32": (torch.float32, False)}


def tf32(module, allowed: bool):
    """A context in which the kernels of `module` may round to TF32, or not, wherever they run."""
    return mock.patch.object(module, "tf32_allowed", return_value=allowed)


def problem(x, k, window=3, stride=1, padding=None, dilation=1, groups=1, residual=False, act="relu"):
    """A `Problem` in fp16, padded by half of the window where nothing else is said; pairs may be single numbers."""
    window, stride, dilation = ((v, v) if isinstance(v, int) else v for v in (window, stride, dilation))
    padding = tuple(d * (w // 2) for d, w in zip(dilation, window, strict=True)) if padding is None else padding
    padding = (padding, padding) if isinstance(padding, int) else padding
    weight = (k, x[1] // groups, *window)
    return Problem("conv_scale_act", x, torch.float16, weight, stride, padding, dilation, groups, residual, act)


def whole_numbers(case: Problem):
    """x, weight, scale, shift and residual (or None) of whole numbers, few enough that no sum is rounded."""
    n, k, p, q = case.output
    x, weight = integers(*case.x, low=-2, high=2), integers(*case.weight)
    residual = integers(n, k, p, q, low=-4, high=4) if case.residual else None
    return _placed(case, x, weight, 2.0 ** integers(k), integers(k, low=-4, high=4), residual)


def random_numbers(case: Problem):
    n, k, p, q = case.output
    weight = torch.randn(case.weight) / math.prod(case.weight[1:]) ** 0.5
    residual = torch.randn(n, k, p, q) if case.residual else None
    return _placed(case, torch.randn(case.x), weight, torch.rand(k) + 0.5, torch.randn(k), residual)


def _placed(case, x, weight, scale, shift, residual):
    images = [None if t is None else channels_last(t.to(case.dtype)).to(DEVICE) for t in (x, residual)]
    return images[0], weight.to(case.dtype).to(DEVICE), scale.to(DEVICE), shift.to(DEVICE), images[1]


def plain(case: Problem, x, weight, scale, shift, residual, dtype=torch.float64) -> Tensor:
    """The same in plain PyTorch on the CPU: the convolution in `dtype`, what follows in at least fp32."""
    x, weight = x.cpu().to(dtype), weight.cpu().to(dtype)
    y = F.conv2d(x, weight, None, case.stride, case.padding, case.dilation, case.groups)
    wide = torch.promote_types(dtype, torch.float32)
    y = y.to(wide) * scale.cpu().to(wide).view(1, -1, 1, 1) + shift.cpu().to(wide).view(1, -1, 1, 1)
    y = y if residual is None else y + residual.cpu().to(wide)
    return ACT_FUNCTIONS[case.act](y).to(dtype)


def compute(family, case: Problem, config, x, weight, scale, shift, residual, out=None) -> Tensor:
    """The kernel's result, on the CPU."""
    if out is None:
        out = channels_last(torch.empty(case.output, dtype=case.dtype, device=DEVICE))
    family.run(case, config, x, family.pack(weight, case, config), scale, shift, residual, out)
    return out.cpu()


def check_exact(family, case: Problem, configs) -> None:
    """The result is right in every configuration, also where the output takes the residual's place; on the CPU nothing
    outside of a tensor is touched."""
    inputs = whole_numbers(case)
    expected = representable(plain(case, *inputs), case.dtype)
    for at in FENCES:
        x, weight, scale, shift, residual = (placed(t, at) for t in inputs)
        for config in configs:
            out = placed(channels_last(torch.empty(case.output, dtype=case.dtype, device=DEVICE)), at)
            assert torch.equal(compute(family, case, config, x, weight, scale, shift, residual, out), expected), config
            if residual is not None:
                place = placed(residual.clone(memory_format=torch.preserve_format), at)
                found = compute(family, case, config, x, weight, scale, shift, place, place)
                assert torch.equal(found, expected), config


def check_two_times(family, case: Problem, configs) -> None:
    inputs = random_numbers(case)
    truth, eager = plain(case, *inputs), plain(case, *inputs, dtype=case.dtype)
    for config in configs:
        assert_two_times(compute(family, case, config, *inputs), eager, truth, str(config))


def check_not_finite(family, case: Problem, configs) -> None:
    """NaN and infinities of the input come out where PyTorch has them, and nowhere else."""
    x, weight, scale, shift, _ = random_numbers(case)
    n, c, h, w = (size - 1 for size in case.x)
    inf, nan = torch.inf, torch.nan
    for at, value in {(0, 0, 0, 0): nan, (0, c, 0, w): inf, (n, 0, h, 0): -inf, (n, c, h, w): inf}.items():
        x[at] = value
    expected = plain(case, x, weight, scale, shift, None)
    assert expected.isnan().any()
    assert expected.isinf().any()
    for config in configs:
        found = compute(family, case, config, x, weight, scale, shift, None)
        assert torch.equal(found.isnan(), expected.isnan()), config
        assert torch.equal(found == inf, expected == inf), config
        assert torch.equal(found == -inf, expected == -inf), config


def check_largest(family, case: Problem, configs) -> None:
    """fp32 numbers whose nearest TF32 is infinite, in the image and in the weight, which zeros meet."""
    x, weight, scale, shift, _ = whole_numbers(case)
    x.zero_()
    weight.zero_()
    x[0, 0, 1, 1], weight[0, 0] = torch.finfo(torch.float32).max, 0.5
    weight[1, 0], x[0, 0, 1, 2] = torch.finfo(torch.float32).max, 2.0**-20
    scale.fill_(1)
    shift.fill_(0)
    expected = plain(case, x, weight, scale, shift, None, torch.float32)
    assert expected.isfinite().sum() == expected.numel() - 1  # the one of the largest times the largest
    for config in configs:
        assert torch.equal(compute(family, case, config, x, weight, scale, shift, None), expected), config


def check_orders(orders, what, *arguments) -> None:
    """The same bits whichever warp and block runs first."""
    first, second = (order(lambda: what(*arguments)) for order in orders)
    assert torch.equal(first, second)
