"""The figures of a device, drawn once and written as SVG for the page and as PNG."""

import io
import re
from dataclasses import dataclass
from pathlib import Path

from bench.record import slug
from bench.report import bars
from bench.report.records import Device, grouped
from bench.report.roofline import roofline
from bench.report.style import STYLE, VARIABLES
from fused_resnet.options import UsageError


@dataclass(frozen=True)
class Drawn:
    """A figure: the file's name without its ending, what it shows, and the text of its SVG."""

    name: str
    title: str
    svg: str


def draw(device: Device, folder: Path) -> dict[str, list[Drawn]]:
    """The figures of a device by suite; PNGs go to the folder."""
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install matplotlib") from error
    found: dict[str, list[Drawn]] = {}

    def keep(suite, what, title, figure):
        if figure is not None:
            drawn = _write(figure, slug(f"{device.name} {suite} {what}"), title, folder)
            found.setdefault(suite, []).append(drawn)

    with rc_context(STYLE):
        for (batch,), cases in grouped(device.of("layers"), "batch").items():
            keep("layers", f"roofline batch {batch}", f"Roofline of the layers at batch {batch}", roofline(cases))
        for suite, what in {"models": "inference", "training": "a training step"}.items():
            keep(suite, "ratios", f"Time of each peer over ours, {what}", bars.ratios(device.of(suite)))
        for (mode,), cases in grouped(device.of("memory"), "mode").items():
            keep("memory", str(mode), f"Memory of {mode}", bars.memory(cases))
    return found


def _write(figure, name: str, title: str, folder: Path) -> Drawn:
    from matplotlib import rc_context

    figure.savefig(folder / f"{name}.png", dpi=150)
    text = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # ids that no other figure of the page has, and that stay the same
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Drawn(name, title, _inline(text.getvalue()))


def _inline(svg: str) -> str:
    """An SVG as a part of a page: no prologue, no namespaces, the page's colours, and as wide as its container."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    head, rest = svg.split(">", 1)
    svg = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest
    for fixed, variable in VARIABLES.items():
        svg = svg.replace(fixed, variable)
    return svg
