"""Every tolerance of the tests, with its reason. A test names its entry; no number stands in a test."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """A relative bound on an error, and why it is what it is."""

    value: float
    reason: str


TOLERANCES = {
    "model_eval_fp32": Tolerance(
        2e-5,
        "max|out - eager| / max|eager| of a whole network in eval mode: fp32 rounding (6e-8) over up to 152 layers, "
        "where sums are taken in another order and batch norm is applied as one multiply-add",
    ),
    "model_fp64": Tolerance(
        1e-9,
        "the same formula in fp64, so that only the order of sums differs: 1e-16, amplified by up to 1e5 through batch "
        "norm over few values; a ReLU whose sign depends on it is as good as impossible",
    ),
    "learning_rate": Tolerance(
        1e-13,
        "|rate - closed form| / largest rate of a schedule: torch makes each step's rate from the one before it, with "
        "a rounding of 1e-16 in each of a few hundred steps",
    ),
    "loss_of_processes": Tolerance(
        1e-4,
        "|loss of several processes - loss of one| / loss over an epoch of five steps: rounding (6e-8), grown "
        "to 4e-6 of the weights, and activations near 0 whose sign it changes",
    ),
    "accumulated_step": Tolerance(
        1e-5,
        "|difference| / |step| of a step from one batch and from its two halves: gradients in fp32 (6e-8) whose sums "
        "are taken in another order, after a few steps",
    ),
    "clipped_step": Tolerance(
        1e-3,
        "of the length of a step that is the difference of two checkpoints in fp32: weights (6e-8) thousands of times "
        "larger than what they moved by",
    ),
    "summed_loss": Tolerance(1e-6, "of a mean of a few hundred losses in fp32, each with a rounding of 6e-8"),
    "averaged_weights": Tolerance(1e-6, "relative to each tensor's largest value: a dozen fp32 roundings of 6e-8"),
    "two_times": Tolerance(
        2.0,
        "the two-times rule: an error, against fp64 truth, of at most twice the one that PyTorch itself makes in the "
        "same precision",
    ),
    "model_floor": Tolerance(
        1e-6,
        "added to the two-times rule for the gradients and running statistics of a network, relative to each tensor: "
        "eager may hit the truth by luck",
    ),
    "model_fp64_floor": Tolerance(
        1e-12,
        "added to model_fp64, relative to the largest tensor of all: a gradient that is zero in exact arithmetic, as "
        "a bias's in front of a batch norm, is what rounding (1e-16, in up to twenty layers) leaves of larger ones",
    ),
    "source_flops": Tolerance(
        0.02,
        "the papers' multiply-adds are rounded to one decimal (1.8, 3.6, 3.8, 7.6, 11.3 x 10^9)",
    ),
    "floor_ulps": Tolerance(
        2.0,
        "Units in the last place of the largest value, added to the two-times rule of an operator: eager may hit "
        "the truth exactly; convolution, scale, shift and residual are four roundings of half a unit each.",
    ),
    "floor_ulps_gradient": Tolerance(
        4.0,
        "The same for gradients: they are made of the forward's values, with their four roundings of half a unit, and "
        "add four of their own: the slope, two products and the sum.",
    ),
    "floor_ulps_moments": Tolerance(
        8.0,
        "The same for running statistics: a mean of values of both signs is a few times smaller than they are, and the "
        "roundings of its sum are theirs, in another order than eager's.",
    ),
    "floor_ulps_block": Tolerance(
        12.0,
        "The same for gradients of a block of up to three layers, which the roundings of all three are in.",
    ),
    "kink_margin": Tolerance(
        2.0**-5,
        "Where a pre-activation lies this close to a kink of its activation, relative to the largest one, bf16's eight "
        "bits and three roundings may put it on the other side, where the slope is another: grad_output is zero there.",
    ),
    "probabilities": Tolerance(
        1e-5,
        "probabilities in fp32, relative: another batch size sums a small network's products in another order, and a "
        "sum over classes of averages of ten softmaxes rounds a hundred times by 6e-8",
    ),
    "loss_autocast": Tolerance(
        2.0**-6,
        "a loss under autocast, relative to eager's: the logits of both are in bf16, with errors of 2^-8 of the "
        "largest, and the cross entropy changes by at most twice as much as a logit",
    ),
    "training_curve": Tolerance(
        5e-3,
        "a loss in 50 steps at lr = 0.1, relative to the first: 1e-6 where no sign changes; a ReLU that rounding "
        "decides moves it by 1e-3, in eager's own layouts as well; a term left out of a gradient by 1e-1",
    ),
    "curve_spread": Tolerance(
        3.0,
        "The farthest that a chaotic curve is from the nearest of three of eager's, in units of those three's largest "
        "spread: the range of three is a rough measure of what rounding does; a loss that diverges is far outside.",
    ),
    "sum_of_many": Tolerance(
        1e-4,
        "max|sum - truth| / max|truth| of sums over 131072 values of either sign: as many roundings of 6e-8 add up to "
        "360 of them at random, in partial sums a few times as large; a block of values left out shows at 1e-2",
    ),
    "other_backend": Tolerance(
        1e-5,
        "fp32 of one backend beside another's, relative to the largest value: sums of a few hundred products in "
        "another order; a weight or a vector that is not the right one shows at 1e-1",
    ),
    "tile_moments": Tolerance(
        2e-6,
        "the mean, relative to the deviation, and the variance of the rows of tiles in fp32, about the first of them: "
        "their differences and sums round by 6e-8 of a few deviations, at random; tiles are merged in fp64",
    ),
    "cancellation": Tolerance(
        4.0,
        "At mean / std = r the mean is a number whose last place is r * eps of the deviation, and so is the error of "
        "what its subtraction leaves; four of them cover the sum behind it. E[x^2] - E[x]^2 would be wrong by r^2.",
    ),
}


def tolerance(name: str) -> float:
    return TOLERANCES[name].value


def ulp(dtype: torch.dtype, at: float) -> float:
    """The distance of neighbouring numbers of `dtype` at the magnitude `at`."""
    return torch.finfo(dtype).eps * at


def assert_two_times(
    out: Tensor,
    eager: Tensor,
    truth: Tensor,
    what: str = "output",
    floor: str = "floor_ulps",
    dtype: torch.dtype | None = None,
    size: float = 0.0,
) -> None:
    """max|out - truth| <= 2 * max|eager - truth| + a few ulps of `dtype`, the computation's (None: of `eager`).

    The ulps are those of the largest value, or of `size` where that is larger.
    """
    assert truth.dtype == torch.float64, f"{what}: the truth must be fp64"
    assert out.shape == truth.shape == eager.shape, f"{what}: {out.shape}, {eager.shape}, {truth.shape}"
    assert out.dtype == eager.dtype, f"{what}: {out.dtype}, but eager gives {eager.dtype}"
    assert torch.isfinite(out).all(), f"{what}: not finite"
    if not truth.numel():
        return
    error, plain = ((found.double() - truth).abs().max().item() for found in (out, eager))
    largest = max(truth.abs().max().item(), size)
    bound = tolerance("two_times") * plain + tolerance(floor) * ulp(dtype or eager.dtype, largest)
    assert error <= bound, f"{what}: error {error:.3e}, the two-times rule allows {bound:.3e}"


def assert_moments(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """The channels' mean and biased variance are those of x in fp64, rounded to fp32: where that overflows, Inf."""
    variance, centre = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    allowed = tolerance("tile_moments")
    assert mean.dtype == var.dtype == torch.float32
    wrong = (mean - centre).abs() - allowed * variance.sqrt() - ulp(torch.float32, 1.0) * centre.abs()
    assert (wrong <= 0).all(), f"mean: error {(mean - centre).abs().max():.3e}"
    right = ((var - variance).abs() <= allowed * variance) | (var == variance.float())
    assert right.all(), f"variance: error {(var / variance - 1).abs().max():.3e}"
