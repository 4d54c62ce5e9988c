"""What the tests of a training's log share: a clock, rows of a history, and a log."""

import csv
import io

from fused_resnet.training.log import Log

STATE = {"images_per_second": 1234.4, "loss": 0.1234, "top1": 0.952, "lr": 0.01, "waited": 0.02}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def row(epoch, **values):
    known = {
        "epoch": epoch, "step": 10 * epoch, "lr": 0.1 / epoch, "train_loss": 1 / epoch, "train_top1": 0.5,
        "val_loss": 2 / epoch, "val_top1": 0.9 - 0.1 / epoch, "val_top5": 0.99,
        "ema_loss": None, "ema_top1": None, "ema_top5": None,
        "images_per_second": 100.0 * epoch, "waited": 0.25, "seconds": 60.0, "unreadable": 0,
    }  # fmt: skip
    return {**known, **values}


def log_of(folder, history=None, step=0, **options):
    options.setdefault("epochs", 90)
    options.setdefault("stream", io.StringIO())
    return Log(folder, history=[] if history is None else history, step=step, **options)


def read_csv(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))
