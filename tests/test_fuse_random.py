"""Random networks through `fuse`: whatever they are made of, they compute what they did before.

In fp64 the fused operators are plain PyTorch, so that only what was fused, and in which order, can make a difference.
"""

import contextlib
import copy
import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from networks import relative
from random_networks import networks
from random_parts import Dropped
from small_networks import assert_near
from tolerances import tolerance
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet as fr

pytestmark = pytest.mark.usefixtures("one_thread")

SOME, FEW, MANY, REST = 110, 20, 1500, 250  # networks in each test: 150 here, 2,000 in the sweep
COMMON = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}


@dataclass
class Seen:
    """What a network does with its input: all that could differ."""

    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)  # after the forward
    gradients: list[Tensor | None] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    hooks: list[Tensor] = field(default_factory=list)
    form: object = None
    error: str = ""  # where it fails, and how


class SameChance(TorchDispatchMode):
    """Dropout by position: its numbers are drawn in the order of memory, and fused outputs are channels_last."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].copy_(torch.empty(args[0].shape).bernoulli_(*args[1:]))
        return func(*args, **(kwargs or {}))


class Recorder:
    """A hook that keeps what it saw."""

    def __init__(self, seen: list):
        self.seen = seen

    def __call__(self, module, args, output=None):
        self.seen += [t.detach().clone() for t in pytree.tree_leaves((args, output)) if isinstance(t, Tensor)]


@contextlib.contextmanager
def _watched(model: nn.Module, names: list[tuple[str, str]]):
    """Hooks on the modules of these names, each of the kind "forward" or "pre"."""
    seen, modules, handles = [], dict(model.named_modules()), []
    for name, kind in names:
        register = modules[name].register_forward_hook if kind == "forward" else modules[name].register_forward_pre_hook
        handles.append(register(Recorder(seen)))
    yield seen
    for handle in handles:
        handle.remove()


def observe(model: nn.Module, images: list[Tensor], gradients: bool) -> Seen:
    torch.manual_seed(1)
    random.seed(1)
    leaves = [x.clone().requires_grad_(gradients) for x in images]
    given = [x * 1.0 for x in leaves]  # no leaves: a network may write to them
    found = Seen()
    step = "forward"
    drops = any(isinstance(m, Dropped) for m in model.modules()) and model.training
    try:
        with torch.set_grad_enabled(gradients), SameChance() if drops else contextlib.nullcontext():
            result = model(*given)
        step = "backward"
        tensors, found.form = pytree.tree_flatten(result)
        found.outputs = [t.detach().clone() for t in tensors]
        found.inputs = [t.detach().clone() for t in given]
        if gradients:
            torch.manual_seed(2)
            sum((t * torch.randn(t.shape, dtype=torch.double).to(t.dtype)).sum() for t in tensors).backward()
            found.gradients = [leaf.grad for leaf in leaves] + [p.grad for p in model.parameters()]
    except (RuntimeError, ValueError) as error:
        found.error = f"{step}: {type(error).__name__}"
    found.buffers = [b.clone() for b in model.buffers()]
    model.zero_grad()
    return found


def finite(seen: Seen) -> bool:
    tensors = [*seen.outputs, *seen.buffers, *[g for g in seen.gradients if g is not None]]
    return all(torch.isfinite(t).all() and (t.abs() < 1e9).all() for t in tensors)


@st.composite
def watched(draw, model: nn.Module) -> list[tuple[str, str]]:
    """Up to three modules with hooks, in one of two networks."""
    names = [name for name, _ in model.named_modules()]
    pair = st.tuples(st.sampled_from(names), st.sampled_from(("forward", "pre")))
    return draw(st.lists(pair, max_size=3)) if draw(st.booleans()) else []


def images(data, dtype: torch.dtype) -> list[Tensor]:
    size = data.draw(st.sampled_from(((6, 6), (7, 9), (8, 8))), "size")
    found = [torch.randn(2, 3, *size, dtype=dtype) for _ in range(data.draw(st.integers(1, 2), "inputs"))]
    if data.draw(st.booleans(), "channels_last"):
        found = [x.to(memory_format=torch.channels_last) for x in found]
    return found


def check_fp64(model: nn.Module, data) -> None:
    model = model.double()
    hooks, before = data.draw(watched(model), "hooks"), data.draw(st.booleans(), "hooks before fuse")
    batch, lean = images(data, torch.double), data.draw(st.booleans(), "lean")
    with _watched(model, hooks if before else []):
        fused = fr.fuse(model, lean=lean)  # a copy: with copies of the hooks, whose records are not read
    with _watched(model, hooks) as eager_hooks, _watched(fused, hooks) as fused_hooks:
        for training, gradients in ((True, True), (False, False), (False, True), (True, False)):
            model.train(training), fused.train(training)
            eager_hooks.clear(), fused_hooks.clear()
            expected = observe(model, batch, gradients)
            assume(finite(expected))
            found = observe(fused, batch, gradients)
            where = f"{'train' if training else 'eval'}, {'with' if gradients else 'without'} gradients"
            if expected.error.startswith("forward"):
                assert found.error == expected.error, where
                return
            # Eager refuses gradients where what it kept was written to; fused may have kept something else.
            assert not found.error or expected.error, f"{where}: {found.error}, and eager does it"
            assert found.form == expected.form, where
            for kind in ("outputs", "inputs", "buffers", *([] if expected.error else ["gradients"])):
                assert_near(getattr(found, kind), getattr(expected, kind), f"{where}: {kind}")
            assert_near(fused_hooks, eager_hooks, f"{where}: hooks")
    assert_unfused(fused, model, batch)


def assert_unfused(fused: nn.Module, model: nn.Module, batch: list[Tensor]) -> None:
    """Unfused, and with the eager network's state, it is that network, to the bit."""
    fused.load_state_dict(model.state_dict())
    fr.unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    for training in (True, False):
        pair = [observe(m.train(training), batch, training) for m in (fused, model)]
        for kind in ("outputs", "inputs", "gradients", "buffers"):
            for mine, eager in zip(getattr(pair[0], kind), getattr(pair[1], kind), strict=True):
                assert (mine is None and eager is None) or torch.equal(mine, eager), kind


def check_fp32(model: nn.Module, data, gradients: bool) -> None:
    """The two-times rule, as for other networks, for what is a continuous function of the values: gradients only of a
    smooth network. Eager in channels_last, in which PyTorch's group norm is a few times less precise.
    """
    model = model.to(memory_format=torch.channels_last)
    batch = [x.to(memory_format=torch.channels_last) for x in images(data, torch.float)]
    for training in (True, False):
        nets = [copy.deepcopy(model).double(), copy.deepcopy(model), fr.fuse(model)]
        batches = [[x.double() for x in batch], batch, batch]
        truth, plain, mine = (observe(m.train(training), x, gradients) for m, x in zip(nets, batches, strict=True))
        assume(not truth.error and finite(truth))
        assert mine.error == plain.error == ""
        for kind in ("outputs", "buffers", "gradients"):
            mine_all, plain_all, exact = (flat(getattr(seen, kind)) for seen in (mine, plain, truth))
            if exact.numel():
                bound = tolerance("two_times") * relative(plain_all, exact) + tolerance("model_floor")
                assert relative(mine_all, exact) <= bound, f"{kind}: {relative(mine_all, exact):.2e}, bound {bound:.2e}"


def flat(tensors: list[Tensor | None]) -> Tensor:
    """All in a row, so that those that cancel to nothing but rounding weigh nothing."""
    return torch.cat([t.double().flatten() for t in tensors if t is not None] or [torch.empty(0)])


def sampled(few: int, many: int):
    """The test with so many networks, and, for the sweep, with many."""

    def wrap(check):
        return pytest.mark.parametrize(
            "count", [few, pytest.param(many, marks=[pytest.mark.sweep, pytest.mark.slow])], ids=["few", "sweep"]
        )(check)

    return wrap


@sampled(SOME, MANY)
def test_fuse_random_fp64(count):
    @settings(max_examples=count, **COMMON)
    @given(model=networks(), data=st.data())
    def check(model, data):
        check_fp64(model, data)

    check()


@sampled(FEW, REST)
def test_fuse_random_fp32(count):
    @settings(max_examples=count, **COMMON)
    @given(model=networks(), data=st.data())
    def check(model, data):
        check_fp32(model, data, gradients=False)

    check()


@sampled(FEW, REST)
def test_fuse_random_fp32_gradients(count):
    @settings(max_examples=count, **COMMON)
    @given(model=networks(smooth=True), data=st.data())
    def check(model, data):
        check_fp32(model, data, gradients=True)

    check()
