"""`tune`: which problems, which candidates, checked before they are timed, and what is written and kept."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from problems import BACKEND_NAMES, randomised
from tolerances import assert_two_times
from torch import nn

import fused_resnet as fr
from fused_resnet import candidates, cli, tuning
from fused_resnet.backends import backend_report, plan, tunable_backends

if "triton" not in BACKEND_NAMES:
    pytest.skip(backend_report()["triton"], allow_module_level=True)

from fused_resnet.backends.cuda import registry as cuda_registry
from fused_resnet.backends.triton import registry

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    plan.reload()
    yield tmp_path
    monkeypatch.undo()
    plan.reload()


class Unit(nn.Module):
    """Three problems, one of them twice."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([fr.ConvBNAct2d(8, 8, 3) for _ in range(2)])
        self.norm = fr.BNAct2d(8)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return fr.ops.add_act(self.norm(x, residual=x), x)


def unit():
    return randomised(Unit()).to(DEVICE), torch.randn(1, 8, 4, 4, device=DEVICE)


@pytest.fixture
def clock(monkeypatch):
    """Each candidate takes less time than the one before it."""
    ticks = itertools.count()
    monkeypatch.setattr(tuning, "measure", lambda run, device, limit=0: 1000.0 - next(ticks))


def entries(report):
    return json.loads(Path(report.path).read_text())["problems"]


def test_problems_are_distinct_and_in_order():
    assert [p.op for p in tuning.problems_of(*unit())] == ["conv_scale_act", "scale_act", "add_act"]


def test_stem_with_its_pooling_is_a_problem_of_its_own(clock):
    """Its reference is the two of them, with the convolution's own best kernel."""
    model = nn.Sequential(fr.ConvBNAct2d(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1)).to(DEVICE).eval().half()
    x = torch.randn(1, 3, 9, 9, device=DEVICE).half()
    report = fr.tune(model, x, most=1)
    assert [row.problem.split()[0] for row in report.rows] == ["conv_scale_act", "conv_scale_act_max_pool2d"]
    assert [row.best.split()[:2] for row in report.rows] == [["triton", "stem"], ["triton", "stem_pool"]]
    assert not any(row.wrong for row in report.rows)
    model[1] = nn.MaxPool2d(2)
    assert len(tuning.problems_of(model, x)) == 1


def test_tune_writes_what_select_reads(clock, cache, monkeypatch, capsys):
    model, x = unit()
    report = fr.tune(model, x, most=2)
    assert report.path == str(plan.user_path(plan.device_name(DEVICE)))
    assert [row.tried for row in report.rows] == [1 + min(2, count) for count in counts(model, x)]
    assert all(row.best == min(e["candidates"], key=e["candidates"].get) != "reference" for row, e in zip_rows(report))
    found = json.loads(Path(report.path).read_text())
    assert found["versions"]["fused_resnet"] == fr.__version__
    assert set(found["versions"]) == {"fused_resnet", "torch", "triton", "cuda"}
    plan.reload()
    monkeypatch.setenv("FUSED_RESNET_LOG", "1")
    with torch.no_grad():
        y = model(x)
        with fr.use_backend("reference"):
            assert_two_times(y, model(x), copy.deepcopy(model).double()(x.double()))
    text = capsys.readouterr().err
    log = [line for line in text.splitlines() if line.endswith("; tuned plan")]
    assert len(log) == 3, text
    assert all(f": {row.best}" in line.replace(" (", " ") for row, line in zip(report.rows, log, strict=True))


def counts(model, x):
    """How many kernels there are for each problem."""
    backends = tunable_backends(DEVICE.type).values()
    return [sum(len(b.candidates(p, DEVICE)) for b in backends) for p in tuning.problems_of(model, x)]


def zip_rows(report):
    found = entries(report)
    keys = [plan.key_of(p) for p in tuning.problems_of(*unit())]
    return zip(report.rows, [found[key] for key in keys], strict=True)


def test_tune_keeps_the_reference_where_nothing_is_faster(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(tuning, "measure", lambda run, device, limit=0: 1.0 + next(ticks))
    report = fr.tune(*unit(), most=1)
    assert {row.best for row in report.rows} == {"reference"}
    assert {entry["backend"] for entry in entries(report).values()} == {"reference"}


@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_tune_leaves_out_what_is_wrong(clock, monkeypatch, how):
    def pack(family):
        def packed(*args):
            if how == "raises":
                raise RuntimeError("ptxas: no\nmore")
            return family.pack(*args) * 2

        return family._replace(pack=packed)

    broken = tuple(map(pack, registry.FAMILIES["conv_scale_act"]))
    monkeypatch.setitem(registry.FAMILIES, "conv_scale_act", broken)
    monkeypatch.setattr(cuda_registry, "FAMILIES", tuple(map(pack, cuda_registry.FAMILIES)))
    report = fr.tune(*unit(), most=2)
    row = report.rows[0]
    assert row.best == "reference"
    assert len(row.wrong) == 2
    text = "RuntimeError: ptxas: no" if how == "raises" else "error "
    assert all(why.startswith(text) for why in row.wrong.values())
    assert "left out: conv_scale_act 3x3 8->8 1x4x4" in str(report)


def test_interrupted_tune_keeps_what_it_measured(clock):
    def interrupted(problems):
        yield from problems[:2]
        raise KeyboardInterrupt

    model, x = unit()
    with pytest.raises(KeyboardInterrupt):
        fr.tune(model, x, most=1, progress=interrupted)
    path = plan.user_path(plan.device_name(DEVICE))
    assert len(json.loads(path.read_text())["problems"]) == 2
    assert len(fr.tune(model, x, most=1).rows) == 3
    assert len(json.loads(path.read_text())["problems"]) == 3


def test_tune_adds_to_a_plan(clock):
    model, x = unit()
    report = fr.tune(model, x, most=1)
    fr.tune(model, torch.randn(1, 8, 3, 3, device=DEVICE), most=1)
    assert len(entries(report)) == 6


def test_tune_overwrites_nothing_else(tmp_path):
    model, x = unit()
    for text, error in (('{"mine": 1}', "is there and is not a plan"), ("", "is there and is not a plan")):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(ValueError, match=error):
            fr.tune(model, x, path=tmp_path / "mine.json")
        assert (tmp_path / "mine.json").read_text() == text
    plan.write(tmp_path / "other.json", "another GPU", tuning.versions(), {})
    with pytest.raises(ValueError, match="is the plan of 'another GPU', and this is"):
        fr.tune(model, x, path=tmp_path / "other.json")
    with pytest.raises(ValueError, match="is there and is not a plan: IsADirectoryError"):
        fr.tune(model, x, path=tmp_path)
    with pytest.raises(OSError):
        fr.tune(model, x, path=tmp_path / "mine.json" / "plan.json")


def test_the_two_switches_of_tf32(monkeypatch):
    """`tune` works whichever of them was used, and leaves it as it was."""
    problem, switch = tuning.problems_of(*unit())[0], torch.backends.cudnn.conv
    before = switch.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            switch.fp32_precision = precision
            candidates.truth(problem, candidates.random_tensors(problem, DEVICE))
            assert switch.fp32_precision == precision
            assert plan.tf32() == (precision == "tf32")
    finally:
        switch.fp32_precision = before


def test_tune_errors(tmp_path):
    model, x = unit()
    with pytest.raises(ValueError, match="tune: the model is in training mode"):
        fr.tune(model.train(), x)
    with pytest.raises(ValueError, match="tune: the model has no fused operator"):
        fr.tune(nn.Conv2d(8, 8, 3).to(DEVICE).eval(), x)
    with pytest.raises(RuntimeError, match=r"tune: nothing can be tuned here: triton: torch\.float64 input"):
        fr.tune(model.eval().double(), x.double())


def test_hopeless_candidates_are_not_measured_again():
    if DEVICE.type == "cuda":
        pytest.skip("the host's clock is the CPU's")
    calls = []
    candidates.measure(lambda: calls.append(0), DEVICE, limit=-1.0)
    assert len(calls) == 1
    candidates.measure(lambda: calls.append(0), DEVICE)
    assert len(calls) == 4


def test_command_tune(clock, tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = ["tune", "--model", "cifar_resnet20", "--size", "8", "--batch", "1", "--dtype", "fp32", "--most", "1"]
    assert cli.main([*command, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "speed-up" in text
    assert "conv_scale_act 3x3 3->16 1x8x8 relu float32" in text
    assert len(json.loads(out.read_text())["problems"]) == len(text.splitlines()) - 3
    assert cli.main([*command, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(out)


def test_command_tune_bad_usage(capsys):
    assert cli.main(["tune", "--model", "resnet17"]) == 2
    assert "unknown model 'resnet17'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as bad:
        cli.main(["tune", "--most", "0"])
    assert bad.value.code == 2
