"""The figure of a comparison: each method's accuracy over the seeds, and what it gains."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metamixer_ray.tracking.figures.canvas import (
    ENSEMBLE_COLOUR,
    GRID,
    MUTED,
    PEER_COLOURS,
    RIGHT_COLOUR,
    WRONG_COLOUR,
    clipped,
    new_figure,
)

_APART = 0.16


@dataclass(frozen=True, kw_only=True)
class MethodBar:
    """What the figure needs of a method; all in % or points."""

    name: str
    means: Sequence[float]
    """The peers' mean, a value per seed."""
    ensembles: Sequence[float]
    mean: tuple[float, float | None] | None
    """Of ``means``, with its standard deviation; None where nothing was trained to the end."""
    ensemble: tuple[float, float | None] | None
    gain: tuple[float, float | None] | None
    """Over training alone, with half of its confidence interval."""


def comparison_sheet(bars: Sequence[MethodBar], *, title: str, confidence: float) -> Figure:
    """Methods from top to bottom; left the top-1, right the gain over training alone."""
    figure = new_figure(10.5, 1.7 + 0.44 * len(bars))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, bar in enumerate(bars):
        _points(left, place - _APART, bar.means, bar.mean, RIGHT_COLOUR, "o")
        _points(left, place + _APART, bar.ensembles, bar.ensemble, ENSEMBLE_COLOUR, "D")
        if bar.gain is not None:
            gain, half = bar.gain
            sure = half is not None and abs(gain) > half
            colour = MUTED if not sure else PEER_COLOURS[2] if gain > 0 else WRONG_COLOUR
            right.errorbar(gain, place, xerr=half, fmt="o", color=colour, capsize=3, markersize=6)
    left.set_yticks(range(len(bars)), [clipped(bar.name, 40) for bar in bars])
    left.invert_yaxis()
    right.axvline(0, color=ENSEMBLE_COLOUR, linewidth=0.8)
    spread, interval = "one seed", ""
    if any(len(bar.means) > 1 for bar in bars):
        spread = "large: mean and standard deviation over the seeds; small: each seed"
        interval = f"mean and {confidence:.0%} interval, paired by seed"
    _style(left, "Top-1 on the test set (%)", spread)
    _style(right, "Gain over training alone (points)", interval)
    handles = [
        left.plot([], [], "o", color=RIGHT_COLOUR, label="mean of the peers")[0],
        left.plot([], [], "D", color=ENSEMBLE_COLOUR, label="ensemble")[0],
    ]
    figure.legend(handles=handles, fontsize=9, frameon=False, loc="outside lower left", ncols=2)
    figure.suptitle(title, fontsize=10, color=MUTED, x=0.01, ha="left")
    return figure


def _points(
    axes: Axes, place: float, values: Sequence[float], mean: tuple[float, float | None] | None, colour: str, marker: str
) -> None:
    if mean is None:
        return
    axes.plot(values, [place] * len(values), marker, color=colour, markersize=3, alpha=0.45, linestyle="none")
    axes.errorbar(mean[0], place, xerr=mean[1], fmt=marker, color=colour, capsize=3, markersize=6)


def _style(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(label, fontsize=8.5)
    axes.tick_params(labelsize=9)
    axes.grid(True, axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
