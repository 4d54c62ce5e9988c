"""A kernel earns its place: before it is chosen by itself it runs once, on a tiny problem, on that GPU.

On whole numbers its result must be the reference's, bit by bit; where batch statistics round, to within that. The
verdict is kept on disk, for the GPU's architecture and the version of the backend's kernels; a kernel that fails is
left out, with one warning.
"""

import contextlib
import json
import math
import re
import threading
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fused_resnet.backends import plan, reference
from fused_resnet.backends.norm import Norm
from fused_resnet.backends.problem import Problem, windows
from fused_resnet.files import cache_folder, write_atomically

FORMAT = 1
EXACT_ACTS = ("none", "relu", "relu6")  # no rounding of their own
MOST_CHANNELS, MOST_PIXELS = 192, 12

# Operators of training, which a backend runs in one way, with the backward that goes with it.
TRAINING = ("bn_act", "conv_bn_act", "add_act_backward", "max_pool2d")

# What batch norm may round, relative to the largest value: the result, once, to its dtype (in units in the last place),
# and fp32 sums of some hundred whole numbers with what is made of them. A value in a wrong place is 0.1 away and more.
ROUNDED, SUMMED = 1.0, 1e-5
EPS = 1e-5
TWELVE_BITS = 2049
POOLING = (3, 3), (2, 2), (1, 1)  # kernel, stride and padding, of a ResNet

_lock = threading.RLock()
_verdicts: dict[Path, dict[str, bool]] = {}


def verdict(backend, problem: Problem, kernel, device: torch.device) -> bool | None:
    """Whether the kernel's first run on this architecture was right; None: it was not tried, and cannot be now."""
    small = tiny(problem)
    key = f"{plan.key_of(small)} {kernel}".strip()
    with _lock:
        path = _path(backend, device)
        known = _verdicts.get(path)
        if known is None:
            known = _verdicts[path] = _read(path)
        if key not in known:
            if capturing(device):
                return None
            right, reason, lasts = _try(backend, small, kernel, device)
            if right is None:
                return None
            if not right:
                name = str(kernel) or backend.NAME
                warnings.warn(f"kernel {name} failed its first run on {small} and is left out: {reason}", stacklevel=2)
            known[key] = right
            if lasts:
                _write(path, key, right)
        return known[key]


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured, where nothing may be tried."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def tiny(problem: Problem) -> Problem:
    """A small problem of the same kind: the same window, strides, alignment and parity of sizes."""
    n, c, h, w = problem.x
    problem = problem._replace(act=_exact(problem.act))
    if problem.op in ("bn_act", "conv_bn_act"):  # which are asked for without what follows the statistics
        problem = problem._replace(residual=True, act="relu")
    if not problem.weight:
        return problem._replace(x=(min(n, 3), min(c, MOST_CHANNELS), min(h, 5), min(w, 7)))
    k, group_c, r, s = problem.weight
    groups = min(problem.groups, max(MOST_CHANNELS // max(group_c, k // problem.groups), 2))
    # All input channels: a configuration may split their sum in parts that another number does not have.
    k = _fewer(k) if groups == 1 else k // problem.groups * groups
    size = []
    for i, (have, window) in enumerate(((h, r), (w, s))):
        least = max(MOST_PIXELS, problem.dilation[i] * (window - 1) + 1)
        size.append(min(have, least + (have - least) % 2))
    x = (min(n, 3), group_c * groups, *size)
    return problem._replace(x=x, weight=(k, group_c, r, s), groups=groups)


def _exact(act: str) -> str:
    return act if act in EXACT_ACTS else "relu"


def _fewer(channels: int) -> int:
    """No more channels than it takes to see several tiles, where the rest is but more of them."""
    return MOST_CHANNELS if channels > MOST_CHANNELS and channels % 64 == 0 else channels


def _try(backend, problem: Problem, kernel, device: torch.device) -> tuple[bool | None, str, bool]:
    """Whether it is right, why not, and whether that will be so tomorrow: a full disk or a missing compiler may not."""
    try:
        pairs = train(backend, problem, device) if problem.op in TRAINING else [run(backend, problem, kernel, device)]
    except torch.OutOfMemoryError:
        return None, "", False
    except Exception as error:  # the compiler's, the driver's: whatever it is, the kernel does not run here
        first = (str(error).strip() or "?").splitlines()[0]
        return False, f"{type(error).__name__}: {first}", backend.lasting(error)
    for expected, out in pairs:
        wrong = int(differ(expected, out, rounds=problem.op in ("bn_act", "conv_bn_act")).sum())
        if wrong:
            return False, f"{wrong} of {out.numel()} values are wrong", True
    return True, "", True


def differ(expected: Tensor, out: Tensor, *, rounds: bool) -> Tensor:
    """Where two tensors differ, by more than batch norm `rounds`; NaN always does."""
    if not rounds or not expected.numel() or not out.is_floating_point():
        return out != expected.to(out.dtype)
    bound = (ROUNDED * torch.finfo(out.dtype).eps + SUMMED) * expected.abs().max()
    return ~((out.to(expected.dtype) - expected).abs() <= bound)


@torch.inference_mode(False)
@torch.no_grad()
def run(backend, problem: Problem, kernel, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a problem of inference with integers for values must give, and what the kernel gives; both on the CPU."""
    tensors = integers(problem)
    x, weight, scale, shift, residual = (None if t is None else t.double() for t in tensors)
    if backend.convolves_by_torch(kernel):  # what is tried is the launch behind it
        there = [t.to(device, memory_format=torch.channels_last) for t in tensors[:2]]
        z = reference.convolution(*there, None, problem).cpu().double()
        expected = reference.scale_act(z, scale, shift, residual, problem.act)
    else:
        expected = reference.compute(problem, x, weight, scale, shift, residual)
    x, weight, scale, shift, residual = (None if t is None else t.to(device) for t in tensors)
    out = torch.full(problem.output, float("nan"), dtype=problem.dtype, device=device)
    out = out.contiguous(memory_format=torch.channels_last)
    out = backend.runner(problem, kernel, weight, scale, shift)(x, residual, out)
    return expected.to(problem.dtype), out.cpu()


@torch.inference_mode(False)
@torch.no_grad()
def train(backend, problem: Problem, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """What an operator of training and its backward must give for integers, and what the backend gives.

    Each step of the reference, in fp64, starts from what the backend's steps before it gave: a ReLU whose input is
    rounded to the other side of zero is no fault of the backward's.
    """
    tensors = (None if t is None else t.to(device) for t in integers(problem))
    tensors = (reference.channels_last(t) if t is not None and t.dim() == 4 else t for t in tensors)
    x, weight, scale, shift, residual = tensors
    grad = reference.channels_last((x if residual is None else residual).flip(0, 2, 3))
    pairs = []

    def step(name: str, *args):
        found = getattr(backend, name)(*args)
        expected = getattr(reference, name)(*map(_wide, args))
        both = ((expected, found),) if isinstance(found, Tensor) else zip(expected, found, strict=True)
        pairs.extend((e, f.cpu()) for e, f in both if e is not None and f is not None)
        return found

    if problem.op == "max_pool2d":
        step("max_pool2d", x, *POOLING, windows(problem.x[2:], *POOLING))
    elif problem.op == "add_act_backward":
        step("add_act_backward", grad, reference.add_act(x, x, problem.act), None, None, problem.act)
    elif problem.op == "bn_act":
        _train_norm(step, x, Norm(*step("moments", x), scale, shift, EPS), residual, grad, problem.act)
        norm = _exact_norm(x)._replace(weight=scale, bias=shift)
        pairs.extend((e, f.cpu()) for e, f in _train_pool(step, backend, x, norm, problem.act))
    else:
        layer = (x, _exact_norm(x), problem.act, weight)
        for norm in (None, layer[1]):
            step("conv_moments", x, norm, problem.act, weight, None, problem.args)
        step("convolve", *layer, None, problem.args)
        step("convolution_backward", grad, *layer, problem.args, (True, True, False), x)
    return pairs


def _wide(value):
    """A tensor, or a norm, on the CPU and in fp64."""
    if isinstance(value, Norm):
        return Norm(*map(_wide, value))
    return value.cpu().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _exact_norm(x: Tensor) -> Norm:
    """One that rounds nothing."""
    vector = torch.zeros(x.shape[1], device=x.device)
    return Norm(vector, vector + 1, None, None, 0.0)


def _train_norm(step, x: Tensor, norm: Norm, residual: Tensor, grad: Tensor, act: str) -> None:
    for residual_norm in (None, norm):
        y, mask = step("norm_act", x, norm, residual, residual_norm, act)
        source = (residual, residual_norm, act, y if residual_norm is None else None, mask)
        _, *sums = step("norm_act_reduce", grad, x, norm, *source, True)
        step("norm_act_input_grad", grad, x, norm, *source, *sums, _count(x))


def _count(x: Tensor) -> float:
    """Values a channel."""
    return float(x.numel() // x.shape[1])


def _train_pool(step, backend, x: Tensor, norm: Norm, act: str) -> Iterable[tuple[Tensor, Tensor]]:
    y, argmax = step("norm_act_max_pool2d", x, norm, act, *POOLING, windows(x.shape[2:], *POOLING))
    source, count = (reference.channels_last(y.flip(0, 2, 3)), argmax, x, norm, act, *POOLING), _count(x)
    return zip(
        _pool_backward(reference, map(_wide, source), count), _pool_backward(backend, source, count), strict=True
    )


def _pool_backward(backend, source: Iterable, count: float) -> tuple[Tensor, ...]:
    """Both steps at once: what the first leaves for the second is the backend's own affair."""
    source = list(source)
    g, *sums = backend.norm_act_max_pool2d_reduce(*source)
    return *sums, backend.norm_act_max_pool2d_input_grad(*source, g, *sums, count)


def integers(problem: Problem) -> tuple:
    """x, weight, scale, shift and residual, or None, of whole numbers (scale: powers of two) that no sum rounds."""
    generator = torch.Generator().manual_seed(0)

    def whole(size, most, dtype=problem.dtype):
        return torch.randint(-most, most + 1, size, generator=generator, device="cpu").to(dtype)

    k, weight = problem.output[1], None
    if problem.weight:  # sparse, so that no sum leaves the whole numbers that 16 bits hold
        few = torch.rand(problem.weight, generator=generator, device="cpu") < 256 / math.prod(problem.weight[1:])
        weight = whole(problem.weight, 1) * few
    x = whole(problem.x, 1)
    if weight is not None and problem.dtype == torch.float32 and not plan.tf32():
        # Twelve bits, one more than TF32 has, in every other channel of x, and in the weights of the channels between.
        inputs = torch.arange(x.shape[1]).view(problem.groups, 1, -1).expand(-1, len(weight) // problem.groups, -1)
        x[:, 1::2] *= TWELVE_BITS
        weight[inputs.reshape(weight.shape[:2]) % 2 == 0] *= TWELVE_BITS
    vectors = (
        (None, None)
        if problem.op == "add_act"
        else (2.0 ** whole((k,), 1, torch.float32), whole((k,), 4, torch.float32))
    )
    return (
        x,
        weight,
        *vectors,
        whole(problem.output, 4) if problem.residual else None,
    )


# --- the file ---------------------------------------------------------------------------------------------------------


@cache
def _path(backend, device: torch.device) -> Path:
    arch = "sm_{}{}".format(*backend.capability(device)) if device.type == "cuda" else device.type
    version = re.sub(r"[^\w.+-]+", "_", backend.version())
    return cache_folder() / f"verdicts-{arch}-{version}-torch{torch.__version__}.json"


def _parse(path: Path) -> dict[str, bool]:
    """The verdicts of a file; OSError, ValueError, KeyError, TypeError or AttributeError where there are none."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["format"] != FORMAT or not all(type(value) is bool for value in found["verdicts"].values()):
        raise ValueError("another format")
    return found["verdicts"]


BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError)


def _read(path: Path) -> dict[str, bool]:
    try:
        return _parse(path)
    except FileNotFoundError:
        return {}
    except BROKEN as error:
        warnings.warn(f"{path} is broken and is ignored: {error!r}", stacklevel=2)
        return {}


def _write(path: Path, key: str, right: bool) -> None:
    """With what other processes have found since; where it cannot be written, the next run has to try again."""
    verdicts = {key: right}
    with contextlib.suppress(*BROKEN):  # of a broken one `_read` has warned
        verdicts = {**_parse(path), **verdicts}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"format": FORMAT, "verdicts": verdicts}, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        warnings.warn(f"{path} cannot be written, so that kernels are tried in every run: {error}", stacklevel=2)
