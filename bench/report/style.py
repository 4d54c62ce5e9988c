"""Colours, marks and axes of the figures; the page takes its colours from here too."""

# Text and lines take the page's colours, light or dark; PNGs have these.
INK, MUTED, GRID, PAPER, LOSS = "#1c2127", "#5f6a76", "#dfe3e8", "#ffffff", "#c62f2f"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)", LOSS: "var(--loss)"}

# One colour a system in all figures and tables; families share a hue. All stand out from white and from black.
COLOURS = {
    "eager": "#8a939e", "eager-nchw": "#a9b1ba", "eager-graph": "#6d7783",
    "compile": "#d9a441", "compile-max-autotune": "#c1832d", "compile-freezing": "#a9661c",
    "openvino": "#8d6bb8", "onnxruntime": "#3f9c96", "tensorrt": "#6a9f3f", "torch-tensorrt": "#8fbf68",
    "cudnn-frontend": "#b5638c", "fused_resnet": "#2f74c0", "fused_resnet-graph": "#5b97d6",
    "fused_resnet-lean": "#86b4e3", "fused_resnet-fuse": "#1f4f86",
}  # fmt: skip
OTHER = "#77808a"
LOST = "#8f1d1d"  # lines across a bar that loses: dark, whatever the page's colours
WIDTH = 11  # inches
STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "svg.fonttype": "none",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "grid.color": GRID, "grid.linewidth": 0.6, "hatch.linewidth": 0.8,
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip


def colour(system: str) -> str:
    return COLOURS.get(system.partition("@")[0], OTHER)


def axes(panels: int, height: float):
    """A figure with at least so many panels, two side by side, which share their y axis; pyplot is left alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if panels < 3 else 3
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, height * rows))
    FigureCanvasAgg(figure)
    found = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for unused in found[panels:]:
        unused.set_visible(False)
    return figure, found[:panels]
