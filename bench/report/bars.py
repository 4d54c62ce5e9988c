"""Bars: every peer's time over ours, and memory. A row is a network at a batch size, a panel is a dtype."""

from bench.report.records import Case, grouped, systems
from bench.report.style import INK, LOSS, LOST, MUTED, PAPER, axes, colour
from bench.report.words import in_order, megabytes, ratio
from bench.systems import is_ours

BAR, GAP = 0.19, 1.0  # inches; bars between two rows
ROW = ("model", "batch", "size")
TICKS = {20: (1, 1.5, 2, 3, 5, 7), 200: (1, 2, 5), float("inf"): (1,)}  # of each decade, up to a range
FONT = 7.5


def _panels(cases: list[Case], bars: int):
    """The figure, and for each panel: axes, dtype, and its cases with the place of their first bar."""
    cases = in_order(cases)
    rows = grouped(cases, *ROW)
    starts = {key: i * (bars + GAP) for i, key in enumerate(rows)}
    panels = grouped(sorted(cases, key=lambda case: str(case.fields.get("dtype")), reverse=True), "dtype")
    figure, found = axes(len(panels), 0.9 + BAR * (bars + GAP) * len(rows))
    placed = []
    for ax, ((dtype,), members) in zip(found, panels.items(), strict=True):
        members = [(case, starts[tuple(case.fields.get(key) for key in ROW)]) for case in members]
        placed.append((ax, members))
        ax.set_title(dtype)
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.set_axisbelow(True)
        ax.grid(True, axis="x")
    labels = [_label(*key) for key in rows]
    found[0].set_yticks([start + (bars - 1) / 2 for start in starts.values()], labels)
    found[0].set_ylim(len(rows) * (bars + GAP) - GAP / 2, -GAP)
    return figure, placed


def _label(model, batch, size) -> str:
    return f"{model}\nbatch {batch}" + ("" if size in (None, 224) else f", {size} px")


def ratios(cases: list[Case]):
    """On a logarithmic scale: bars to the left of 1 are lost."""
    shown = [name for name in systems(cases) if not is_ours(name)]
    values = [found for case in cases for name in shown if (found := case.ratio(name))]
    if not values:
        return None
    figure, panels = _panels(cases, len(shown))
    # Room for the text beside the longest bar, and for a bar that loses.
    low, high = min(*values, 0.8) * 0.85, max(*values, 1.5)
    low, high = low, high * (high / low) ** 0.55
    for ax, members in panels:
        for case, start in members:
            for i, name in enumerate(shown):
                _ratio_bar(ax, start + i, case, name)
        ax.set(xscale="log", xlim=(low, high), xlabel="peer's time / time of fused_resnet; right of 1: fused is faster")
        ax.set_xticks(_ticks(low, high))
        ax.set_xticks([], minor=True)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.axvline(1, color=INK, linewidth=1.1)
    return figure


def _ticks(low: float, high: float) -> list[float]:
    of_decade = next(ticks for most, ticks in TICKS.items() if high / low <= most)
    return [tick for e in range(-4, 5) for t in of_decade if low <= (tick := t * 10.0**e) <= high]


def _ratio_bar(ax, y: float, case: Case, system: str) -> None:
    found = case.ratio(system)
    if found is None:
        status = case.rows.get(system, {}).get("status", "not measured")
        why = "no time of ours" if status == "ok" else status
        _beside(ax, 1, y, f"{system}: {why}", color=MUTED, style="italic")
        return
    lost = found < 1
    style = {"hatch": "/////", "edgecolor": LOST, "linewidth": 1.0} if lost else {"linewidth": 0}
    ax.barh(y, found - 1, left=1, height=0.82, color=colour(system), **style)
    text = f"{system} {ratio(found)}{', fused is slower' if lost else ''}"
    _beside(ax, max(found, 1), y, text, color=LOSS if lost else INK, weight="bold" if lost else "normal")


def _beside(ax, x: float, y: float, text: str, **style) -> None:
    """Text just to the right of a point."""
    ax.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=FONT, **style)


def memory(cases: list[Case]):
    """The peak after the first call, and within it what the forward pass keeps for the backward pass."""
    shown = [name for name in systems(cases, numbers=False) if any(case.value(name, "peak_mb") for case in cases)]
    if not shown:
        return None
    figure, panels = _panels(cases, len(shown))
    high = max(case.value(name, "peak_mb") or 0 for case in cases for name in shown)
    for ax, members in panels:
        for case, start in members:
            for i, name in enumerate(shown):
                _memory_bar(ax, start + i, case, name)
        ax.set(xlim=(0, high * 1.75), xlabel="MB")
        ax.set_xticks([tick for tick in ax.get_xticks() if tick <= high * 1.05])
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    return figure


def _memory_bar(ax, y: float, case: Case, system: str) -> None:
    peak, kept = case.value(system, "peak_mb"), case.value(system, "kept_mb")
    if peak is None:
        status = case.rows.get(system, {}).get("status", "not measured")
        _beside(ax, 0, y, f"{system}: {status}", color=MUTED, style="italic")
        return
    ax.barh(y, peak, height=0.82, color=PAPER, linewidth=0)  # no grid shines through
    ax.barh(y, peak, height=0.82, color=colour(system), alpha=0.5 if kept else 1, linewidth=0)
    text = f"{system} {megabytes(peak)}"
    if kept:
        ax.barh(y, kept, height=0.5, color=colour(system), linewidth=0)
        text += f", kept {megabytes(kept)}"
    _beside(ax, max(peak, kept or 0), y, text, color=INK)
