"""Arithmetic intensity against arithmetic speed, under the ceilings that were measured in the same run."""

from statistics import median

from bench.report.findings import loses, lost_ms
from bench.report.records import Case, grouped, systems
from bench.report.style import INK, LOSS, MUTED, PAPER, axes, colour
from bench.report.words import number
from bench.systems import OURS, is_ours

MARKS = ("^", "s", "D", "v", "P")  # of the peers
NEEDED = ("flops", "bytes", "median_ms", "peak_tflops", "copy_gb_per_s")


def roofline(cases: list[Case]):
    """A panel for each dtype; None where nothing was measured."""
    panels = grouped([case for case in cases if all(case.value(OURS, key) for key in NEEDED)], "dtype")
    if not panels:
        return None
    figure, found = axes(len(panels), 4.7)
    for ax, ((dtype,), members) in zip(found, panels.items(), strict=True):
        _ceilings(ax, members)
        peers = [name for name in systems(members) if not is_ours(name)]
        for i, name in enumerate([*peers, OURS]):
            _points(ax, members, name, "o" if name == OURS else MARKS[i % len(MARKS)])
        _losses(ax, [case for case in members if loses(case)])
        ax.set(xscale="log", yscale="log", title=dtype, xlabel="arithmetic intensity, FLOP/byte", ylabel="FLOP/s")
        _ticks(ax)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=7.5, columnspacing=1.5)
    return figure


def _ticks(ax) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x < 1000 else f"{x / 1000:g}k")
    ax.yaxis.set_major_formatter(EngFormatter())
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    ax.grid(True)


def _point(case: Case, system: str) -> tuple[float, float]:
    flops = case.value(OURS, "flops")
    return flops / case.value(OURS, "bytes"), flops / (case.value(system, "median_ms") * 1e-3)


def _points(ax, cases: list[Case], system: str, mark: str) -> None:
    points = [_point(case, system) for case in cases if case.value(system, "median_ms")]
    if not points:
        return
    full = {"s": 34, "facecolors": colour(system), "edgecolors": PAPER, "linewidths": 0.6, "zorder": 3}
    hollow = {"s": 24, "facecolors": "none", "edgecolors": colour(system), "linewidths": 1.1, "zorder": 2}
    ax.scatter(*zip(*points, strict=True), marker=mark, label=system, **(full if system == OURS else hollow))


def _losses(ax, cases: list[Case]) -> None:
    """Rings around what is slower than a peer, and the name of what loses most time."""
    if not cases:
        return
    points = [_point(case, OURS) for case in cases]
    ring = {"s": 95, "facecolors": "none", "edgecolors": LOSS, "linewidths": 1.3, "zorder": 4}
    ax.scatter(*zip(*points, strict=True), label=f"slower than a peer ({len(cases)})", **ring)
    worst = max(cases, key=lost_ms)
    where = {"xy": _point(worst, OURS), "xytext": (0.98, 0.03), "textcoords": "axes fraction", "ha": "right"}
    line = {"arrowstyle": "-", "color": LOSS, "linewidth": 0.8, "shrinkB": 6}
    text = f"loses most time: {worst.fields['layer'].get('label', '?')}"
    ax.annotate(text, **where, color=LOSS, fontsize=7.5, arrowprops=line, zorder=2)


def _ceilings(ax, cases: list[Case]) -> None:
    """The median of the ceilings; the band is what they drifted by during the run."""
    peaks = sorted(case.value(OURS, "peak_tflops") * 1e12 for case in cases)
    copies = sorted(case.value(OURS, "copy_gb_per_s") * 1e9 for case in cases)
    peak, copied = median(peaks), median(copies)
    intensities = [_point(case, OURS)[0] for case in cases]
    low, high = min(*intensities, peak / copied) / 1.6, max(*intensities, peak / copied) * 1.6
    xs = [low * (high / low) ** (i / 200) for i in range(201)]

    def roof(peak, copied):
        return [min(peak, x * copied) for x in xs]

    ax.fill_between(xs, roof(peaks[0], copies[0]), roof(peaks[-1], copies[-1]), color=MUTED, alpha=0.15, linewidth=0)
    label = f"measured: {number(peak / 1e12)} TFLOP/s, {number(copied / 1e9)} GB/s"
    ax.plot(xs, roof(peak, copied), color=INK, linewidth=1.2, label=label)
