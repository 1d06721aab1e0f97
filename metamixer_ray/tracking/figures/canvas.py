"""What all figures share: colours and the one way a figure becomes a PNG. No pyplot, no global state."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

# Wong (2011), Points of view: Color blindness, Nature Methods 8:441; black is kept for the ensemble.
PEER_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C7A00", "#7F7F7F")
PEER_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
ENSEMBLE_COLOUR = "#000000"
RIGHT_COLOUR = "#0072B2"
WRONG_COLOUR = "#D55E00"
MUTED = "#555555"
GRID = "#DDDDDD"

_MOST_PIXELS = 4000


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, without pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def figure_png(figure: Figure, dpi: float = 140) -> bytes:
    """The figure as PNG bytes; a very large one gets fewer dots per inch: no side exceeds 4000 pixels."""
    most = _MOST_PIXELS / max(figure.get_size_inches())

    def drawn() -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=min(dpi, most), facecolor="white")
        return buffer.getvalue()

    try:
        return drawn()
    except ValueError:
        # Names are whatever a data set calls its classes; between dollar signs they are taken for mathematics.
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        return drawn()


def style_curves(axes: Axes, *, title: str, ylabel: str) -> None:
    """Look of a panel of curves over epochs."""
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel("epoch", fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def clipped(text: str, length: int) -> str:
    """``text``, shortened to ``length`` characters with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def colour_of(index: int) -> str:
    """A peer's colour."""
    return PEER_COLOURS[index % len(PEER_COLOURS)]


def stage_colours(stages: int) -> Sequence[Any]:
    """Colours of ordered stages, dark (early) to light (late)."""
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0.05, 0.85, max(stages, 1))]
