"""What an epoch, and a whole run, came to."""

import math
import statistics
from pathlib import Path

from fused_resnet.parity import table
from fused_resnet.training.live import duration, number, share


def top1(row: dict) -> float | None:
    """By which epochs are compared: that of the averaged weights where there are any."""
    return row.get("val_top1") if row.get("ema_top1") is None else row["ema_top1"]


def best(history: list[dict]) -> dict | None:
    """The row of the highest top-1, the first of equals; None where nothing was validated."""
    rows = [row for row in history if top1(row) is not None and math.isfinite(top1(row))]
    return max(rows, key=top1, default=None)


def line(row: dict, epochs: int) -> str:
    """One epoch in one line."""
    trained = [number(row.get("train_loss"), ".4f", "loss "), share(row.get("train_top1"), "top-1 ", ".2f")]
    validated = [
        number(row.get("val_loss"), ".4f", "loss "),
        share(row.get("val_top1"), "top-1 ", ".2f"),
        share(row.get("val_top5"), "top-5 ", ".2f"),
        share(row.get("ema_top1"), "top-1 of the average ", ".2f"),
    ]
    seconds, unreadable = row.get("seconds"), row.get("unreadable")
    parts = [
        f"epoch {row['epoch']}/{epochs}",
        _together("train", trained),
        _together("val", validated),
        number(row.get("lr"), ".3g", "lr "),
        number(row.get("images_per_second"), ",.0f", after=" images/s"),
        share(row.get("waited"), "waited "),
        "" if seconds is None else duration(seconds),
        f"{unreadable} unreadable" if unreadable else "",
    ]
    return "  ".join(part for part in parts if part)


def _together(name: str, parts: list[str]) -> str:
    present = [part for part in parts if part]
    return f"{name}: {', '.join(present)}" if present else ""


def results(history: list[dict]) -> dict:
    """What the history comes to; None: not known."""
    found = best(history)
    last = history[-1] if history else {}
    return {
        "epochs": len(history),
        "best_top1": found and top1(found),
        "best_epoch": found and found["epoch"],
        "train_loss": last.get("train_loss"),
        "val_loss": last.get("val_loss"),
        "images_per_second": _median(history, "images_per_second"),
        "waited": _median(history, "waited"),
        "seconds": sum(row.get("seconds") or 0.0 for row in history),
    }


def _median(history: list[dict], column: str) -> float | None:
    values = [row[column] for row in history if row.get(column) is not None]
    return statistics.median(values) if values else None


def text(about: dict, history: list[dict], folder: Path) -> str:
    """The table of a run, and what its folder holds."""
    found = results(history)
    best_one = share(found["best_top1"], decimals=".2f")
    lines = [
        *((str(name), str(value)) for name, value in about.items() if not isinstance(value, dict | list)),
        ("epochs", str(found["epochs"])),
        ("best top-1", f"{best_one} (epoch {found['best_epoch']})" if best_one else ""),
        ("last loss, train", number(found["train_loss"], ".4f")),
        ("last loss, val", number(found["val_loss"], ".4f")),
        ("images/s (median)", number(found["images_per_second"], ",.1f")),
        ("waited for data", share(found["waited"], decimals=".1f")),
        ("time", duration(found["seconds"])),
        ("written", f"{folder}: {', '.join(_files(folder))}"),
    ]
    return "\n".join(table(("run", ""), [line for line in lines if line[1]]))


def _files(folder: Path) -> list[str]:
    """What people look for in a run's folder; the digests beside it and the older checkpoints are left out."""
    names = sorted(path.name for path in folder.glob("[!.]*") if path.suffix != ".sha256")
    checkpoints = [name for name in names if name.startswith("checkpoint-")]
    return [name for name in names if name not in checkpoints[:-1]]


def finite(value):
    """The same for JSON, which has no NaN and no infinity: they are null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
