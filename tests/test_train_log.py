"""What a run of training writes down: after a resume, and where nothing can be written."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from training_logs import STATE, Clock, log_of, read_csv, row

from fused_resnet.training import curves, events
from fused_resnet.training.live import Standing
from fused_resnet.training.log import COLUMNS, Silent

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
pytest.importorskip("matplotlib")


def recorded(folder):
    """What TensorBoard reads: tag -> [(step, value)]."""
    reader = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_csv_after_a_resume_has_every_epoch_once(tmp_path):
    log = log_of(tmp_path)
    for epoch in (1, 2, 3):
        log.epoch(row(epoch, ema_top1=None, lr=1e-7))
    log.close()
    history = [row(1)]
    log = log_of(tmp_path, history, step=10)
    assert [r["epoch"] for r in read_csv(tmp_path)] == ["1"]  # what was not resumed from is not of this run
    log.epoch(row(2))
    found = read_csv(tmp_path)
    assert tuple(found[0]) == COLUMNS
    assert [(r["epoch"], r["ema_top1"], r["val_loss"]) for r in found] == [("1", "", "2"), ("2", "", "1")]
    assert [r["epoch"] for r in history] == [1, 2]


def train(log, clock, steps, of_images=10):
    """One image a step, a step a second; the loss is the step."""
    for step in steps:
        clock.now += 1.5
        log.batch(Standing(epoch=1 + (step - 1) // 10, images=1 + (step - 1) % 10, of_images=of_images, step=step,
                           **{**STATE, "loss": float(step)}))  # fmt: skip
        if step % of_images == 0:
            log.epoch(row(step // of_images, train_loss=1000.0 + step))


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    clock, history = Clock(), []
    log = log_of(tmp_path, history, clock=clock)
    train(log, clock, range(1, 28))
    log.close()
    first = recorded(tmp_path)
    assert first["train/loss"] == [(s, float(s + 1000 * (s % 10 == 0))) for s in range(1, 27)]
    assert [(step, round(value, 6)) for step, value in first["val/top1"]] == [(10, 0.8), (20, 0.85)]
    assert set(first) == {tag for tag in events.TAGS.values() if "ema" not in tag}

    log = log_of(tmp_path, history[:1], step=15, clock=clock)  # as after a loss of power: the checkpoint is older
    train(log, clock, range(16, 31))
    log.close()
    again = recorded(tmp_path)
    assert [step for step, _ in again["train/loss"]] == list(range(1, 31))
    assert dict(again["train/loss"])[20] == 1020.0
    assert [step for step, _ in again["val/loss"]] == [10, 20, 30]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_tensorboard_leaves_out_what_is_no_number(tmp_path):
    log = log_of(tmp_path)
    log.epoch(row(1, train_loss=math.nan, val_loss=math.inf, ema_top1=0.5))
    log.close()
    found = recorded(tmp_path)
    assert "train/loss" not in found
    assert "val/loss" not in found
    assert found["val/ema_top1"] == [(10, 0.5)]


def test_accumulated_batches_are_one_value_of_tensorboard(tmp_path):
    clock = Clock()
    log = log_of(tmp_path, clock=clock)
    for batch in range(1, 9):
        clock.now += 2
        log.batch(Standing(epoch=1, images=batch, of_images=8, step=batch // 4, **STATE))
    log.epoch(row(1, step=2))
    log.close()
    assert [step for step, _ in recorded(tmp_path)["train/loss"]] == [1, 2]


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr(events.importlib.util, "find_spec", lambda name: None)
    stream = io.StringIO()
    log = log_of(tmp_path, stream=stream)
    log.epoch(row(1))
    log.epoch(row(2))
    log.close()
    assert stream.getvalue().count("pip install") == 1
    assert not (tmp_path / "tensorboard").exists()


def test_a_broken_tensorboard_ends_no_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    stream = io.StringIO()
    log_of(tmp_path, stream=stream).epoch(row(1))
    assert "no TensorBoard log: ModuleNotFoundError" in stream.getvalue()
    assert len(read_csv(tmp_path)) == 1


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    curves.draw([row(1)], tmp_path / "curves.png", "a run")
    assert capsys.readouterr().err == f"{curves.MISSING}\n"
    assert not (tmp_path / "curves.png").exists()


def test_folder_that_is_gone(tmp_path):
    stream = io.StringIO()
    gone = tmp_path / "file"
    gone.write_text("no folder")
    log = log_of(gone, stream=stream)
    for epoch in (1, 2):
        log.epoch(row(epoch))
    assert "best top-1" in log.finish({"network": "resnet18"})
    said = stream.getvalue()
    for what in ("log.csv", "tensorboard", "curves.png", "summary.json"):
        assert said.count(f"{what} cannot be written") == 1
    assert len(log.history) == 2


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from training_logs import log_of, row
log = log_of(Path(sys.argv[1]), stream=sys.stderr)
log.epoch(row(1))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))  # as a disk that is full
for epoch in (2, 3):
    log.epoch(row(epoch))
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
log.epoch(row(4))
log.finish({})
"""


def test_full_disk_is_said_once_and_logs_go_on_when_there_is_room(tmp_path):
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(tests)], capture_output=True, text=True, cwd=tests.parent
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("log.csv cannot be written") == 1
    assert done.stderr.count("tensorboard cannot be written") == 1
    assert [r["epoch"] for r in read_csv(tmp_path)] == ["1", "2", "3", "4"]
    assert [step for step, _ in recorded(tmp_path)["val/top1"]] == [10, 40]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("epochs", [0, 1, 5, 40])
def test_curves_are_drawn_without_touching_pyplot(tmp_path, epochs):
    history = [row(e, train_top1=None, val_loss=None if e % 2 else 1.0) for e in range(1, epochs + 1)]
    for broken in history[2:3]:
        broken["train_loss"] = math.nan
    pyplot = "matplotlib.pyplot" in sys.modules
    curves.draw(history, tmp_path / "curves.png", "a run")
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (960, 960)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    for colour, there in ((curves.TRAIN, epochs > 0), (curves.VAL, epochs > 0), (curves.EMA, False)):
        assert (tuple(bytes.fromhex(colour[1:])) in colours) == there


def test_summary_of_a_run(tmp_path):
    for name in ("checkpoint-00000010.pth", "checkpoint-00000020.pth", "best.pth", "best.pth.sha256"):
        (tmp_path / name).write_text("")
    log = log_of(tmp_path)
    tops = (0.5, 0.8, 0.8, 0.7)
    for epoch, top1 in enumerate(tops, 1):
        log.epoch(row(epoch, ema_top1=top1, train_loss=math.nan if epoch == 4 else 1.0))
    lines = log.finish({"network": "resnet18", "data": "cifar10"}).splitlines()
    found = {line[:17].strip(): line[17:].strip() for line in lines[2:]}
    files = "best.pth, checkpoint-00000020.pth, curves.png, log.csv, summary.json, tensorboard"
    assert found == {
        "network": "resnet18", "data": "cifar10", "epochs": "4", "best top-1": "80.00 % (epoch 2)",
        "last loss, train": "nan", "last loss, val": "0.5000", "images/s (median)": "250.0",
        "waited for data": "25.0 %", "time": "4:00", "written": f"{tmp_path}: {files}",
    }  # fmt: skip
    found = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert (found["network"], found["best_epoch"], found["best_top1"], found["train_loss"]) == (
        "resnet18",
        2,
        0.8,
        None,
    )
    assert [r["step"] for r in found["history"]] == [10, 20, 30, 40]


def test_summary_before_an_epoch_has_ended(tmp_path):
    assert "best" not in log_of(tmp_path).finish({"network": "resnet18"})


def test_silent_processes_keep_the_history(tmp_path, capfd):
    quiet = Silent([])
    quiet.batch(Standing(epoch=1, images=1, of_images=2, step=1, **STATE))
    quiet.phase("validating")
    quiet.epoch(row(1))
    quiet.close()
    assert quiet.finish({}) == ""
    assert [r["epoch"] for r in quiet.history] == [1]
    assert capfd.readouterr() == ("", "")
