"""`fused-resnet train` on a GPU: it learns, in every precision; a run that goes on is the one that was not stopped."""

import pytest
from train_runs import Run, assert_same_state, final, wait_for_checkpoint

pytest.importorskip("sklearn")

DIGITS = ("--dataset", "digits", "--model", "cifar_resnet20", "--batch-size", 64, "--epochs", 3, "--lr", "0.05")


def train(folder, *argv) -> Run:
    folder.mkdir(exist_ok=True)
    return Run("train", *DIGITS, "--device", "cuda", "--output", folder, *argv, output=folder.parent / "said.txt")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [(), ("--amp",), ("--amp", "--amp-dtype", "fp16"), ("--fsdp",)])
def test_learns(kind, tmp_path):
    run = train(tmp_path / "run", *kind)
    assert run.wait() == 0, run.said()
    assert final(tmp_path / "run")["best"]["top1"] > 0.9


@pytest.mark.gpu
def test_goes_on_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options = ("--deterministic", "--save-steps", 3, "--model-ema")
    whole = train(tmp_path / "whole", *options)
    assert whole.wait() == 0, whole.said()
    run = train(tmp_path / "run", *options)
    wait_for_checkpoint(tmp_path / "run")
    run.kill()
    run = train(tmp_path / "run", *options, "--resume", "auto")
    assert run.wait() == 0, run.said()
    assert_same_state(final(tmp_path / "run"), final(tmp_path / "whole"))


@pytest.mark.gpu
def test_out_of_memory_is_said(tmp_path):
    run = train(tmp_path / "run", "--size", 4096, "--batch-size", 1024, "--val-size", 16)
    assert run.wait() == 1
    assert "out of memory" in run.said()
    assert "--grad-checkpointing" in run.said()
    assert "Traceback" not in run.said()
