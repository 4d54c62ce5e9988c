"""Every suite runs, checks its results and says what it is to say; the command line refuses what it cannot do."""

import json

import pytest
import torch

from bench.__main__ import main
from bench.runner import SUITES
from bench.suites import common, memory, ops
from bench.suites.training import Step

# What a row of each suite holds, beside its median where it is timed.
NUMBERS = {
    "layers": {"median_ms", "floor_ms", "of_floor", "error", "eager_error", "fused_is_faster_by"},
    "ops": {"median_ms", "gb_per_s", "copy_gb_per_s", "error", "eager_error", "fused_is_faster_by"},
    "models": {"median_ms", "images_per_s", "ready_s", "floor_ms", "error", "fused_is_faster_by"},
    "training": {"median_ms", "images_per_s", "floor_ms", "error", "fused_is_faster_by"},
    "memory": {"first_peak_mb", "peak_mb"},
    "startup": {"import_s", "first_s", "new_batch_s", "new_size_s"},
    "accuracy": {"max_error", "rms_error"},
}
MORE = {
    "layers": ["--only", "+residual"],
    "ops": ["--only", "forward+backward  2x256"],
    "models": ["--backends", "reference"],
}
SMALL = [
    "--device", "cpu", "--quick", "--models", "cifar_resnet20", "--size", "32", "--batch", "2",
    "--window", "0.002", "--rounds", "2", "--dtype", "fp32",
]  # fmt: skip


def rows(folder) -> list[dict]:
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.mark.parametrize("suite", SUITES)
def test_suite_gives_its_numbers(suite, tmp_path, capsys):
    assert main([suite, *SMALL, *MORE.get(suite, []), "--peers", "eager", "--out", str(tmp_path)]) == 0
    found = rows(tmp_path)
    assert {row["suite"] for row in found} == {suite}
    assert {row["status"] for row in found} == {"ok"}
    assert {"eager", "fused_resnet"} <= {row["system"] for row in found}
    CHECKS.get(suite, lambda found: None)(found)
    for row in found:
        assert set(row) >= NUMBERS[suite]
        assert all(row[key] > 0 for key in NUMBERS[suite] if "error" not in key)
        assert row["case"]["dtype"] == "fp32"
    shown = capsys.readouterr().out
    assert all(system in shown for system in ("eager", "* fused_resnet"))


def _check_memory(found: list[dict]) -> None:
    kept = {row["system"]: row["kept_mb"] for row in found if row["case"]["mode"] == "training"}
    assert 0 < kept["fused_resnet-lean"] < min(kept["fused_resnet"], kept["eager"])


def _check_backends(found: list[dict]) -> None:
    assert [row["system"] for row in found] == ["eager", "fused_resnet", "fused_resnet@reference"]


CHECKS = {"memory": _check_memory, "models": _check_backends}


def test_kept_for_backward_by_hand():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 10)
    )
    call = Step(model, model, torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), "fp32")
    # ReLU's output, which the linear layer keeps too; the log-softmax; the loss and the sum of its weights. Not the
    # convolution's output, and not what was there before: the image and the weights.
    by_hand = 4 * (2 * 4 * 64 + 2 * 10 + 1 + 1)
    assert memory.kept_for_backward(call, compiled=False) == by_hand


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "--models", "nothing50"], "--models: unknown nothing50"),
        (["models", "--device", "tpu"], "--device tpu"),
        (["models", "--device", "cuda:99"], "CUDA devices"),
        (["models", "--backends", "nothing"], "--backends: unknown nothing"),
        (["layers", "--device", "cpu", "--only", "nothing"], "such as '7x7 /2 3->64 224px  batch 16 fp32'"),
    ],
)
def test_what_cannot_be_done_is_bad_usage(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["models", "--dtype", "int8"], ["models", "--batch", "0"]])
def test_wrong_arguments_exit_with_2(arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2


@pytest.mark.parametrize("command", [*SUITES, "all", "report", "compare"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert "usage: python -m bench" in capsys.readouterr().out


# --- a result that is wrong is found ---


def test_relative_error_finds_what_is_not_finite_or_of_another_shape():
    truth = torch.tensor([1.0, -2.0])
    assert common.relative_error(torch.tensor([1.0, -1.0]), truth) == 0.5
    assert common.relative_error(torch.tensor([1.0, float("nan")]), truth) == float("inf")
    assert common.relative_error(torch.ones(3), truth) == float("inf")


def test_operator_limit_is_bounded():
    eps = torch.finfo(torch.float32).eps
    assert common.operator_limit(1e-7, "fp32") == pytest.approx(2e-7 + 4 * eps)
    assert common.operator_limit(1.0, "fp32") == common.OPERATOR_LIMITS["fp32"]


def test_wrong_operator_is_above_its_limit(monkeypatch):
    case = {
        "device": "cpu",
        "dtype": "fp32",
        "batch": 2,
        "op": "add+relu",
        "shape": [2, 8, 4, 4],
        "direction": "forward",
    }
    right = ops.prepare(case, "fused_resnet")
    assert right.error <= right.limit
    monkeypatch.setattr(ops, "_ours", lambda case: lambda x, residual: torch.relu(x - residual))
    wrong = ops.prepare(case, "fused_resnet")
    assert wrong.error > wrong.limit
