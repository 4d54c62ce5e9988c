"""The automatic choice: plans, first runs of kernels (canaries), what is kept on disk, and the log."""

import itertools
import json
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from problems import BACKEND_NAMES, LAYOUTS

import fused_resnet as fr
from fused_resnet._version import __version__
from fused_resnet.backends import backend_report, canary, plan, selection, triton, tunable
from fused_resnet.backends.problem import Problem
from fused_resnet.ops import conv_scale_act

if "triton" not in BACKEND_NAMES:
    pytest.skip(backend_report()["triton"], allow_module_level=True)

from fused_resnet.backends.triton import registry

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
KERNEL = "general 64x16x32 w4 s4"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder, and nothing remembered."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    monkeypatch.delenv("FUSED_RESNET_BACKEND", raising=False)
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def forget():
    plan.reload()
    canary._verdicts.clear()
    canary._path.cache_clear()
    selection._logged.clear()


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randint(-1, 2, s, generator=generator).float() for s in ((2, 8, 5, 5), (16, 8, 3, 3)))
    x = LAYOUTS["channels_last"](x)
    return [t.to(DEVICE) for t in (x, weight, torch.ones(16), torch.zeros(16))]


def convolve(**options):
    return conv_scale_act(*tensors(), padding=1, **options)


def problem():
    x, weight, *_ = tensors()
    return Problem.of("conv_scale_act", x, weight, ((1, 1), (1, 1), (1, 1), 1), None, "relu")


def write_plan(backend="triton", kernel=KERNEL, path=None, versions=None):
    path = path or plan.user_path(plan.device_name(DEVICE))
    entries = {plan.key_of(problem()): {"backend": backend, "kernel": kernel}}
    plan.write(path, "a GPU", versions or {"fused_resnet": __version__}, entries)
    plan.reload()
    return path


@pytest.fixture
def ran(monkeypatch):
    """The kernels that convolutions ran; nothing of the canary's."""
    found = []
    original = tunable.prepare

    def prepare(backend, problem, device, *rest):
        found.append(str(tunable.choose(backend, problem, device)[0]))
        return original(backend, problem, device, *rest)

    monkeypatch.setattr(tunable, "prepare", prepare)
    return found


# --- which plan ---


def test_without_a_plan_no_kernel_of_triton_is_chosen(ran):
    """They have run on no GPU yet."""
    convolve()
    assert ran == []
    assert not selection.PREFERRED["cuda"]


def test_plan_chooses_the_kernel(ran):
    write_plan()
    y = convolve()
    assert ran == [KERNEL]
    assert torch.equal(y, F.conv2d(*tensors()[:2], padding=1).relu())


def test_plan_names_the_reference(ran):
    write_plan("reference", "")
    convolve()
    assert ran == []


def test_users_plan_goes_before_the_shipped_one(ran, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SHIPPED", tmp_path / "shipped")
    write_plan(path=plan.shipped_path(plan.device_name(DEVICE)))
    convolve()
    assert ran == [KERNEL]
    write_plan("reference", "")
    convolve()
    assert ran == [KERNEL]


def test_explicit_choices_go_before_the_plan(ran, monkeypatch):
    write_plan()
    convolve(backend="reference")
    with fr.use_backend("reference"):
        convolve()
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "reference")
    convolve()
    assert ran == []
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "auto")
    convolve()
    assert ran == [KERNEL]


def test_explicit_backend_takes_the_plans_kernel(ran):
    convolve(backend="triton")
    write_plan()
    convolve(backend="triton")
    assert ran[0] != KERNEL == ran[1]


def test_plan_with_a_kernel_that_is_gone(ran):
    write_plan(kernel="general 1024x1024x1024 w4 s4")
    convolve()
    first = registry.heuristic(problem(), triton.capability(DEVICE))
    assert ran == [str(first)]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "versions": {"fused_resnet": 3}}']
)
def test_broken_plan_is_ignored_with_a_warning(ran, text):
    path = write_plan()
    path.write_text(text)
    plan.reload()
    with pytest.warns(UserWarning, match="is ignored"):
        convolve()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convolve()
    assert ran == []


def test_plan_of_another_version_is_ignored(ran):
    write_plan(versions={"fused_resnet": "0.0.1"})
    with pytest.warns(UserWarning, match="made for other kernels and is ignored; tune again"):
        convolve()
    assert ran == []


sizes = st.integers(1, 9)
pairs = st.tuples(sizes, sizes)


@given(
    st.lists(
        st.builds(
            Problem,
            st.just("conv_scale_act"),
            st.tuples(sizes, st.sampled_from([4, 8]), sizes, sizes),
            st.sampled_from([torch.float16, torch.float32]),
            st.tuples(st.sampled_from([4, 8]), st.sampled_from([1, 2, 4]), sizes, sizes),
            pairs,
            pairs,
            pairs,
            st.sampled_from([1, 2, 4, 8]),
            st.booleans(),
            st.sampled_from(["none", "relu"]),
        ).filter(lambda p: p.x[1] == p.weight[1] * p.groups),
        min_size=2,
        max_size=40,
        unique=True,
    )
)
def test_no_two_problems_have_one_key(problems):
    assert len({plan.key_of(p) for p in problems}) == len(problems)


# --- the canary ---


def break_kernels(monkeypatch, **changes):
    """Every kernel of the family gives something else."""
    family = next(f for f in registry.FAMILIES["conv_scale_act"] if f.name == "general")
    broken = tuple(f._replace(**changes) if f is family else f for f in registry.FAMILIES["conv_scale_act"])
    monkeypatch.setitem(registry.FAMILIES, "conv_scale_act", broken)
    plan.reload()


def test_canary_runs_once_and_is_kept_on_disk(cache, monkeypatch):
    runs = []
    original = canary.run
    monkeypatch.setattr(canary, "run", lambda *args: runs.append(args) or original(*args))
    write_plan()
    for _ in range(2):
        convolve()
    assert len(runs) == 1
    (path,) = cache.glob("verdicts-*.json")
    assert list(json.loads(path.read_text())["verdicts"].values()) == [True]
    forget()  # as a new process
    convolve()
    assert len(runs) == 1


@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_canary_that_fails_leaves_the_kernel_out(ran, monkeypatch, how):
    family = next(f for f in registry.FAMILIES["conv_scale_act"] if f.name == "general")

    def pack(*args):
        if how == "raises":
            raise RuntimeError("ptxas: no")
        return family.pack(*args) * 2

    break_kernels(monkeypatch, pack=pack)
    write_plan()
    with pytest.warns(UserWarning, match=f"kernel {KERNEL} failed its first run on .* and is left out"):
        y = convolve()
    assert torch.equal(y, F.conv2d(*tensors()[:2], padding=1).relu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convolve()
        if how == "wrong":
            forget()
            convolve()
    if how == "raises":  # a disk that was full, a compiler that was missing: a new process tries again
        forget()
        with pytest.warns(UserWarning, match="is left out"):
            convolve()
    assert ran == []


@pytest.mark.parametrize(
    "big",
    [
        ((1, 512, 7, 7), (512, 512, 3, 3), (1, 1)),
        ((1, 2048, 7, 7), (512, 2048, 1, 1), (0, 0)),
        ((1, 128, 28, 28), (128, 128, 3, 3), (1, 1)),
    ],
    ids=["3x3", "1x1", "28px"],
)
def test_canary_of_a_split_sum_passes(big):
    """The tiny problem must not have another number of parts."""
    x, weight, padding = big
    whole = Problem("conv_scale_act", x, torch.float16, weight, padding=padding, act="relu")
    kernel = registry.heuristic(whole, (9, 0))
    assert kernel.config.blocks[-1] > 1
    small = canary.tiny(whole)
    expected, out = canary.run(triton, small, kernel, DEVICE)
    assert torch.equal(out, expected)


def test_canary_out_of_memory_is_no_verdict(cache, ran, monkeypatch):
    def pack(*args):
        raise torch.OutOfMemoryError("none left")

    write_plan()
    with monkeypatch.context() as broken:
        break_kernels(broken, pack=pack)
        convolve()
    assert ran == []
    assert not list(cache.glob("verdicts-*"))
    plan.reload()
    convolve()
    assert ran == [KERNEL]


def test_canary_does_not_try_while_a_graph_is_captured(ran, monkeypatch):
    write_plan()
    with monkeypatch.context() as capturing:
        capturing.setattr(canary, "capturing", lambda device: True)
        convolve()
        assert ran == []
    convolve()
    assert ran == [KERNEL]


@pytest.mark.parametrize("text", ["", "{", '{"format": 1}', '{"format": 1, "verdicts": {"a": "yes"}}', '{"format": 2}'])
def test_broken_verdicts_are_ignored_with_a_warning(cache, ran, text):
    write_plan()
    convolve()
    (path,) = cache.glob("verdicts-*.json")
    path.write_text(text)
    forget()
    with pytest.warns(UserWarning, match="is broken and is ignored"):
        convolve()
    assert ran == [KERNEL, KERNEL]
    assert json.loads(path.read_text())["verdicts"]


def test_cache_folder_that_cannot_be_written(ran, monkeypatch, tmp_path):
    write_plan()
    (tmp_path / "file").write_text("")
    (path,) = [canary._path(triton, DEVICE)]
    monkeypatch.setattr(canary, "_path", lambda *_: tmp_path / "file" / path.name)
    with pytest.warns(UserWarning, match="cannot be written, so that kernels are tried in every run"):
        convolve()
    assert ran == [KERNEL]


def test_tiny_problem_is_small_and_of_the_same_kind():
    big = Problem(
        "conv_scale_act", (256, 512, 56, 57), torch.bfloat16, (2048, 512, 3, 3), (2, 2), (1, 1), (1, 1), 1, True, "silu"
    )
    small = canary.tiny(big)
    assert small.x == (3, 512, 12, 13)
    assert small.weight == (192, 512, 3, 3)
    wide = canary.tiny(big._replace(x=(8, 64, 32, 32), weight=(64, 64, 3, 3), dilation=(6, 6), padding=(6, 6)))
    assert wide.x[2:] == (14, 14)
    assert (small.stride, small.residual, small.act) == (big.stride, True, "relu")
    for groups, width in ((32, 4), (960, 1), (2, 256)):
        grouped = canary.tiny(
            big._replace(groups=groups, x=(8, groups * width, 28, 28), weight=(groups * width, width, 3, 3))
        )
        assert grouped.x[1] == grouped.weight[0] == grouped.groups * width <= max(192, 2 * width)
        assert grouped.groups > 1
    assert min(canary.tiny(big._replace(dilation=(9, 9), padding=(0, 0))).size) >= 1


def test_threads_choose_the_same_kernel(monkeypatch):
    """t11494: eight threads, cold caches: one canary, one choice."""
    write_plan()
    tries = itertools.count()
    original = canary.run
    monkeypatch.setattr(canary, "run", lambda *args: (next(tries) and None) or original(*args))
    start, results = threading.Barrier(8), [None] * 8

    def work(i):
        start.wait()
        results[i] = convolve()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert next(tries) == 1
    assert all(torch.equal(y, results[0]) for y in results)


# --- the log ---


def test_log_tells_each_problem_once(capsys, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_LOG", "1")
    write_plan()
    for _ in range(2):
        convolve()
        convolve(backend="reference")
    lines = capsys.readouterr().err.splitlines()
    about = f"fused_resnet: conv_scale_act 3x3 8->16 2x5x5 relu float32 on {DEVICE}: "
    assert lines == [f"{about}triton ({KERNEL}, by the tuned plan); tuned plan", f"{about}reference; asked for"]


def test_log_is_off(capsys, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_LOG", "0")
    convolve()
    assert capsys.readouterr().err == ""
