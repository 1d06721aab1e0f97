"""What stands behind a run's scores: accuracy by class, calibration, who agrees with whom, spoilt images."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metamixer_ray.tracking.figures.canvas import (
    ENSEMBLE_COLOUR,
    GRID,
    MUTED,
    PEER_MARKERS,
    WRONG_COLOUR,
    clipped,
    colour_of,
    new_figure,
)
from metamixer_ray.tracking.rows import peer_names
from metamixer_ray.tracking.summary import percent

Scores = Mapping[str, Any]
"""What ``metamixer_ray.evaluate.evaluate_run`` returns."""

MOST_CLASSES = 40
_MOST_NUMBERS = 20  # with more peers, the cells of the agreement have no room for numbers
_LEGEND_COLUMNS = 5
_MOST_ACROSS = 5
_DOTS_HEIGHT = 12.0  # inches
_TITLE_LETTERS = 9.5  # to an inch
_LEAST_RANGE = 5.0  # points, so that next to equal shares look so

EVALUATION_FIGURES = ("per_class", "calibration", "agreement", "corruptions")
"""Names of all that there can be."""


def evaluation_figures(scores: Scores) -> dict[str, Figure]:
    """All figures of an evaluation by name: those that need several peers or spoilt images only where there are."""
    figures = {"per_class": class_accuracies(scores), "calibration": reliability_diagrams(scores)}
    if len(scores["peers"]) > 1:
        figures["agreement"] = agreement_matrix(scores)
    if "corruptions" in scores:
        figures["corruptions"] = corruption_chart(scores)
    return figures


def class_accuracies(scores: Scores) -> Figure:
    """Top-1 of each peer and the ensemble by class, the hardest class at the top; of many classes the hardest only."""
    names = _names(scores)
    rows = [(row, [*row["peers"], row["ensemble"]][: len(names)]) for row in scores["per_class"] if row["images"]]
    rows.sort(key=lambda pair: float(np.mean(pair[1])))
    shown = rows[:MOST_CLASSES]
    # Few classes have room for all dots below each other.
    each = max(0.3, min(0.11 * len(names), _DOTS_HEIGHT / max(len(shown), 1)))
    width, height = 8.5, 2.4 + each * len(shown) + 0.25 * math.ceil(len(names) / _LEGEND_COLUMNS)
    figure = new_figure(width, height)
    axes = figure.subplots()
    values = 100 * np.array([top1 for _, top1 in shown])
    places = np.arange(len(shown))
    for place in places[::2]:
        axes.axhspan(place - 0.5, place + 0.5, color="#F4F4F4", zorder=0)
    for at in range(len(names)):
        # A little below each other, so that equal ones can be told apart.
        shifted = places + 0.72 * ((at + 0.5) / len(names) - 0.5)
        axes.scatter(values[:, at], shifted, zorder=2, clip_on=False, **_dot(at, scores))
        axes.axvline(100 * _each(scores)[at]["top1"], color=_colour(at, scores), linewidth=0.9, linestyle=":", zorder=0)
    labels = [f"{clipped(str(row['class']), 24)}  ({row['images']:,})" for row, _ in shown]
    axes.set_yticks(places, labels)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    hidden = f", the {len(shown)} hardest of {len(rows)} classes" if len(shown) < len(rows) else ""
    _title(figure, f"Top-1 by class{hidden}", scores)
    axes.set_xlim(*_widened(*axes.get_xlim()))
    axes.set_xlabel("top-1 (%); dotted: over all images.  In brackets: images", fontsize=9)
    _plain(axes, "x")
    _legend(figure, scores)
    return figure


def reliability_diagrams(scores: Scores) -> Figure:
    """Per peer and for the ensemble: accuracy over confidence (Guo et al. 2017, fig. 1), and how often is which.

    Dots, as large as the share of the images, below the diagonal tell of overconfidence, above it of the contrary.
    """
    names, calibration = _names(scores), scores["calibration"]
    found = [*calibration["peers"], calibration["ensemble"]][: len(names)]
    across = math.ceil(len(names) / math.ceil(len(names) / _MOST_ACROSS))
    down = math.ceil(len(names) / across)
    figure = new_figure(max(3.1 * across, 5.5), 4.1 * down + 0.6)
    _title(figure, "Calibration", scores)
    # A row of diagrams, a row of their histograms, and a gap before the next.
    panels = figure.subplots(2 * down, across, sharex=True, squeeze=False, height_ratios=(3, 1) * down)
    for axes in panels.flat:
        axes.set_visible(False)
    for at, (name, bins) in enumerate(zip(names, found, strict=True)):
        row, column = divmod(at, across)
        diagram, histogram = panels[2 * row, column], panels[2 * row + 1, column]
        _diagram(diagram, bins, _colour(at, scores))
        _histogram(histogram, bins, _colour(at, scores))
        diagram.set_title(clipped(name, 30), fontsize=10, fontweight="bold", color=_colour(at, scores))
        facts = _each(scores)[at]
        told = f"ECE {percent(facts['ece'])} %\ntop-1 {percent(facts['top1'])} %"
        diagram.text(0.96, 0.05, told, transform=diagram.transAxes, fontsize=9, ha="right")
        if column == 0:
            diagram.set_ylabel("accuracy (%)", fontsize=9)
            histogram.set_ylabel("images (%)", fontsize=9)
    figure.legend(
        handles=[
            Line2D(
                [],
                [],
                color=MUTED,
                linestyle="--",
                linewidth=1,
                label="calibrated: above it too cautious, below it too sure",
            ),
            Line2D(
                [],
                [],
                color=WRONG_COLOUR,
                linewidth=2,
                alpha=0.5,
                label="gap; dots are as large as their share of images",
            ),
        ],
        loc="outside lower center",
        ncols=2 if across > 2 else 1,
        fontsize=9,
        frameon=False,
    )
    return figure


def agreement_matrix(scores: Scores) -> Figure:
    """The share of images on which two peers predict the same class, for all pairs; on the diagonal their top-1."""
    names = peer_names([scores])
    shares = 100 * np.array(scores["pairwise_agreement"])
    count = len(names)
    side = max(0.62 * count, 2.2)
    figure = new_figure(side + 3.2, side + 2.0)
    axes = figure.subplots()
    others = ~np.eye(count, dtype=bool)
    low, high = shares[others].min(), shares[others].max()
    low = min(low, high - _LEAST_RANGE)
    picture = axes.imshow(np.where(others, shares, np.nan), cmap="Blues", vmin=low - 0.35 * (high - low), vmax=high)
    size = 10 if count <= 10 else 7
    for i, j in np.ndindex(count, count) if count <= _MOST_NUMBERS else ():
        text = f"{shares[i, j]:.1f}" if i != j else f"{100 * scores['peers'][i]['top1']:.1f}"
        dark = i != j and shares[i, j] > (low + high) / 2
        colour = "white" if dark else MUTED if i == j else "black"
        style = "italic" if i == j else "normal"
        axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour, fontstyle=style)
    axes.set_facecolor("#F2F2F2")
    axes.set_yticks(range(count), [clipped(name, 26) for name in names])
    axes.set_xticks(range(count), [clipped(name.partition("-")[0], 12) for name in names], rotation=45 * (count > 4))
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    for at, label in enumerate(axes.get_yticklabels()):
        label.set_color(colour_of(at))
    together = f"all {count} at once: {percent(scores['agreement'])} %"
    diagonal = "; on the diagonal: top-1 (%)" if count <= _MOST_NUMBERS else ""
    _title(figure, "Images on which two peers predict the same class (%)", scores)
    figure.supxlabel(f"{together}{diagonal}", fontsize=9, color=MUTED)
    if count > _MOST_NUMBERS:
        figure.colorbar(picture, ax=axes, shrink=0.7)
    return figure


def corruption_chart(scores: Scores) -> Figure:
    """Top-1 of each peer and the ensemble on clean and on spoilt images, side by side, and what the drops are."""
    corruptions, names = scores["corruptions"], _names(scores)
    figure = new_figure(2.6 + 1.9 * (1 + len(corruptions)), 4.6 + 0.25 * math.ceil(len(names) / _LEGEND_COLUMNS))
    axes = figure.subplots()
    step = 0.8 / len(names)
    clean = [100 * each["top1"] for each in _each(scores)]
    for place, found in enumerate([scores, *corruptions.values()]):
        for at, each in enumerate(_each(found)):
            x, top1 = place + (at - (len(names) - 1) / 2) * step, 100 * each["top1"]
            if place:
                axes.vlines(x, top1, clean[at], color=_colour(at, scores), linewidth=1.2, alpha=0.45, zorder=1)
                axes.hlines(clean[at], x - 0.3 * step, x + 0.3 * step, color=_colour(at, scores), linewidth=1.2)
            axes.scatter([x], [top1], zorder=2, **_dot(at, scores))
    lines = ["clean"]
    for name, found in corruptions.items():
        drops = [each["relative_drop"] for each in _each(found)[: len(scores["peers"])]]
        lost = "" if None in drops else f"\n{round(-100 * float(np.mean(drops)), 1) + 0.0:+.1f} %"
        lines.append(f"{name}\n{found['setting']}{lost}")
    axes.set_xticks(range(len(lines)), lines)
    axes.set_xlim(-0.5, len(lines) - 0.5)
    axes.set_ylabel("top-1 (%)", fontsize=9)
    _title(figure, f"Top-1 on spoilt images, {scores['severity']}", scores)
    axes.set_ylim(*_widened(*axes.get_ylim()))
    axes.set_xlabel("lines: from clean images; in %: relative change, mean of the peers", fontsize=9, color=MUTED)
    _plain(axes, "y")
    _legend(figure, scores)
    return figure


def _diagram(axes: Axes, bins: Mapping[str, Any], colour: str) -> None:
    axes.set_visible(True)
    filled = [at for at, images in enumerate(bins["images"]) if images]
    confidence, accuracy = (100 * np.array([bins[key][at] for at in filled]) for key in ("confidence", "accuracy"))
    images = np.array([bins["images"][at] for at in filled], dtype=float)
    axes.plot([0, 100], [0, 100], color=MUTED, linestyle="--", linewidth=1)
    axes.vlines(confidence, confidence, accuracy, color=WRONG_COLOUR, linewidth=2, alpha=0.5)
    axes.plot(confidence, accuracy, color=colour, linewidth=1.2)
    axes.scatter(confidence, accuracy, s=10 + 190 * images / images.sum(), color=colour, zorder=3, clip_on=False)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(labelbottom=False)
    _plain(axes, "both")


def _histogram(axes: Axes, bins: Mapping[str, Any], colour: str) -> None:
    axes.set_visible(True)
    images = np.array(bins["images"], dtype=float)
    axes.bar(
        100 * np.arange(len(images)) / len(images),
        100 * images / images.sum(),
        width=100 / len(images),
        align="edge",
        color=colour,
        edgecolor="white",
        linewidth=0.5,
    )
    axes.set_xlabel("confidence (%)", fontsize=9)
    axes.tick_params(labelbottom=True)
    axes.set_ylim(0)
    _plain(axes, "both")


def _widened(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis in percent that are not too near to each other."""
    missing = max(0.0, _LEAST_RANGE - (high - low))
    return low - missing / 2, high + missing / 2


def _names(scores: Scores) -> list[str]:
    return [*peer_names([scores]), *(["ensemble"] if scores["ensemble"] else [])]


def _each(scores: Scores) -> Sequence[Mapping[str, Any]]:
    """The scores of the peers and, where there is one, of the ensemble."""
    return [*scores["peers"], *([scores["ensemble"]] if scores["ensemble"] else [])]


def _is_ensemble(at: int, scores: Scores) -> bool:
    return at == len(scores["peers"])


def _colour(at: int, scores: Scores) -> str:
    return ENSEMBLE_COLOUR if _is_ensemble(at, scores) else colour_of(at)


def _dot(at: int, scores: Scores) -> dict[str, Any]:
    """The look of a peer's dots; the ensemble's are larger and hollow, so that those below can be seen."""
    if _is_ensemble(at, scores):
        return {"s": 70, "marker": "o", "facecolors": "none", "edgecolors": ENSEMBLE_COLOUR, "linewidths": 1.6}
    return {"s": 32, "marker": PEER_MARKERS[at % len(PEER_MARKERS)], "color": colour_of(at)}


def _title(figure: Figure, text: str, scores: Scores) -> None:
    # Names of runs and of files are long, figures of one peer narrow.
    run, images = scores["run"], f"{scores['split']}, {scores['images']:,} images"
    room = int(_TITLE_LETTERS * figure.get_figwidth())
    parts = [f"{run}: {images}"] if len(run) + len(images) + 2 <= room else [run, images]
    lines = [line for part in parts for line in textwrap.wrap(part, room)]
    figure.suptitle("\n".join([text, *lines]), fontsize=11, fontweight="bold")


def _plain(axes: Axes, grid: Literal["both", "x", "y"]) -> None:
    axes.tick_params(labelsize=9)
    axes.grid(True, axis=grid, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, scores: Scores) -> None:
    names = _names(scores)
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=_dot(at, scores)["marker"],
            color=_colour(at, scores),
            markerfacecolor="none" if _is_ensemble(at, scores) else _colour(at, scores),
            markersize=8 if _is_ensemble(at, scores) else 6,
            label=f"{name}  {percent(_each(scores)[at]['top1'])} %",
        )
        for at, name in enumerate(names)
    ]
    columns = min(len(names), _LEGEND_COLUMNS if figure.get_figwidth() > 10 else 3)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
