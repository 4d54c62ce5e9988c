"""Loss, top-1 and learning rate of a run, epoch by epoch, as a picture."""

import io
import math
import statistics
import sys
from pathlib import Path

from fused_resnet.files import write_atomically

MISSING = "no curves.png: pip install matplotlib, or 'fused_resnet[train]'"

TRAIN, VAL, EMA, LR = "#8a939e", "#2f74c0", "#c1832d", "#3f9c96"

# Of each panel: its name, its scale, and of each curve column, label and colour.
PANELS = (
    ("loss", 1.0, (("train_loss", "train", TRAIN), ("val_loss", "val", VAL))),
    (
        "top-1 (%)",
        100.0,
        (("train_top1", "train", TRAIN), ("val_top1", "val", VAL), ("ema_top1", "val, averaged weights", EMA)),
    ),
    ("learning rate", 1.0, (("lr", "learning rate", LR),)),
)


def draw(history: list[dict], path: Path, title: str) -> None:
    """Write the picture whole, or a line on stderr where there is no matplotlib; values of None are left out.

    Raises:
        OSError: it cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        print(MISSING, file=sys.stderr)
        return

    figure = Figure(figsize=(8, 8), dpi=120, layout="constrained")  # pyplot's state is the caller's
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.5))
    for axes, panel in zip(panels, PANELS, strict=True):
        _draw_panel(axes, history, *panel)
    first, last = (history[0]["epoch"], history[-1]["epoch"]) if history else (1, 1)
    margin = 0.5 if last - first < 10 else 0.02 * (last - first)
    panels[-1].set(xlabel="epoch", xlim=(first - margin, last + margin))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[-1].set_ylim(bottom=0)
    figure.align_ylabels(panels)
    figure.suptitle(title, fontsize=11, fontweight="bold", wrap=True)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())


def _draw_panel(axes, history: list[dict], name: str, scale: float, lines) -> None:
    for column, label, colour in lines:
        points = [(row["epoch"], row.get(column)) for row in history]
        points = [(epoch, scale * value) for epoch, value in points if value is not None and math.isfinite(value)]
        if points:
            marker = "o" if len(points) <= 30 else None  # one point alone has no line
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.8, label=label, color=colour)
    values = [value for drawn in axes.lines for value in drawn.get_ydata()]
    if name == "loss" and _spread(values) > 100:  # one loss of the beginning would flatten all others
        axes.set_yscale("log")
    axes.set_ylabel(name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines and len(lines) > 1:
        axes.legend(frameon=False)


def _spread(values: list[float]) -> float:
    """The largest over the median, of values above 0."""
    return max(values) / statistics.median(values) if values and min(values) > 0 else 1.0
