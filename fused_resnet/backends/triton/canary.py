"""A kernel earns its place: before it is chosen by itself it runs once, on a tiny problem of integers, on that GPU.

Its result must be the reference's, bit by bit. The verdict is kept on disk, for the GPU's architecture, the versions
and the sources of the kernels; a kernel that fails is left out, with one warning.
"""

import contextlib
import hashlib
import json
import math
import threading
import warnings
from functools import cache
from pathlib import Path

import torch
import triton

from fused_resnet.backends import reference
from fused_resnet.backends.problem import Problem
from fused_resnet.backends.triton import capability, run_launches
from fused_resnet.backends.triton.launch import Config, Family
from fused_resnet.files import cache_folder, write_atomically

FORMAT = 1
LASTING = (triton.CompilationError, triton.runtime.errors.OutOfResources)
EXACT_ACTS = ("none", "relu", "relu6")  # no rounding of their own
MOST_CHANNELS, MOST_PIXELS = 192, 12

_lock = threading.RLock()
_verdicts: dict[Path, dict[str, bool]] = {}


def verdict(problem: Problem, family: Family, config: Config, device: torch.device) -> bool | None:
    """Whether the kernel's first run on this architecture was right; None: it was not tried, and cannot be now."""
    small = tiny(problem)
    key = f"{small} {config}"
    with _lock:
        path = _path(device)
        known = _verdicts.get(path)
        if known is None:
            known = _verdicts[path] = _read(path)
        if key not in known:
            if capturing(device):
                return None
            right, reason, lasts = _try(small, family, config, device)
            if right is None:
                return None
            if not right:
                warnings.warn(
                    f"kernel {config} failed its first run on {small} and is left out: {reason}", stacklevel=2
                )
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
    if not problem.weight:
        return problem._replace(x=(min(n, 3), min(c, MOST_CHANNELS), min(h, 5), min(w, 7)), act=_exact(problem.act))
    k, group_c, r, s = problem.weight
    groups = min(problem.groups, max(MOST_CHANNELS // max(group_c, k // problem.groups), 2))
    # All input channels: a configuration may split their sum in parts that another number does not have.
    k = _fewer(k) if groups == 1 else k // problem.groups * groups
    size = []
    for i, (have, window) in enumerate(((h, r), (w, s))):
        least = max(MOST_PIXELS, problem.dilation[i] * (window - 1) + 1)
        size.append(min(have, least + (have - least) % 2))
    x = (min(n, 3), group_c * groups, *size)
    return problem._replace(x=x, weight=(k, group_c, r, s), groups=groups, act=_exact(problem.act))


def _exact(act: str) -> str:
    return act if act in EXACT_ACTS else "relu"


def _fewer(channels: int) -> int:
    """No more channels than it takes to see several tiles, where the rest is but more of them."""
    return MOST_CHANNELS if channels > MOST_CHANNELS and channels % 64 == 0 else channels


def _try(problem: Problem, family: Family, config: Config, device: torch.device) -> tuple[bool | None, str, bool]:
    """Whether it is right, why not, and whether that will be so tomorrow: a full disk or a missing compiler may not."""
    try:
        expected, out = run(problem, family, config, device)
    except torch.OutOfMemoryError:
        return None, "", False
    except Exception as error:  # the compiler's, the driver's: whatever it is, the kernel does not run here
        first = (str(error).strip() or "?").splitlines()[0]
        return False, f"{type(error).__name__}: {first}", isinstance(error, LASTING)
    wrong = int((out != expected).sum())
    return wrong == 0, f"{wrong} of {out.numel()} values are wrong" if wrong else "", True


@torch.inference_mode(False)
@torch.no_grad()
def run(problem: Problem, family: Family, config: Config, device: torch.device):
    """What the problem with integers for values must give, and what the kernel gives; both on the CPU."""
    tensors = integers(problem)
    x, weight, scale, shift, residual = (None if t is None else t.double() for t in tensors)
    if family.name == "cudnn":  # whose algorithms may round integers: what is tried is the launch behind it
        there = [t.to(device, memory_format=torch.channels_last) for t in tensors[:2]]
        z = reference.convolution(*there, None, problem).cpu().double()
        expected = reference.scale_act(z, scale, shift, residual, problem.act)
    else:
        expected = reference.compute(problem, x, weight, scale, shift, residual)
    x, weight, scale, shift, residual = (None if t is None else t.to(device) for t in tensors)
    weights = None if weight is None else family.pack(weight, problem, config)
    out = torch.full(problem.output, float("nan"), dtype=problem.dtype, device=device)
    out = out.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else reference.channels_last(residual)
    x = reference.channels_last(x)
    run_launches(family.launches(problem, config, x, weights, scale, shift, residual, out), device)
    return expected.to(problem.dtype), out.cpu()


def integers(problem: Problem) -> tuple:
    """x, weight, scale, shift and residual, or None, of whole numbers (scale: powers of two) that no sum rounds."""
    generator = torch.Generator().manual_seed(0)

    def whole(size, most, dtype=problem.dtype):
        return torch.randint(-most, most + 1, size, generator=generator, device="cpu").to(dtype)

    k, weight = problem.output[1], None
    if problem.weight:  # sparse, so that no sum leaves the whole numbers that 16 bits hold
        few = torch.rand(problem.weight, generator=generator, device="cpu") < 256 / math.prod(problem.weight[1:])
        weight = whole(problem.weight, 1) * few
    vectors = (
        (None, None)
        if problem.op == "add_act"
        else (2.0 ** whole((k,), 1, torch.float32), whole((k,), 4, torch.float32))
    )
    return (
        whole(problem.x, 1),
        weight,
        *vectors,
        whole(problem.output, 4) if problem.residual else None,
    )


# --- the file ---------------------------------------------------------------------------------------------------------


@cache
def _sources() -> str:
    """A digest of the kernels' sources."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@cache
def _path(device: torch.device) -> Path:
    arch = "sm_{}{}".format(*capability(device)) if device.type == "cuda" else "interpreter"
    return cache_folder() / f"verdicts-{arch}-triton{triton.__version__}-torch{torch.__version__}-{_sources()}.json"


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
