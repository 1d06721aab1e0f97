"""Curves over epochs: how the peers learn, and how far they look and decide alike."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metamixer_ray.tracking.figures.canvas import (
    ENSEMBLE_COLOUR,
    MUTED,
    PEER_MARKERS,
    colour_of,
    new_figure,
    stage_colours,
    style_curves,
)
from metamixer_ray.tracking.rows import Row, mean, number, peer_names
from metamixer_ray.tracking.summary import percent

Points = tuple[list[int], list[float]]

_CROWD = 4  # with more peers, lines are thin and the baselines shown by their mean


def learning_curves(rows: Sequence[Row], baseline_rows: Sequence[Row] | None = None) -> Figure:
    """Top-1 on the evaluation split (left) and training loss (right) of all peers and the ensemble.

    Args:
        rows: the training's rows, by ascending epoch.
        baseline_rows: rows of the same networks trained alone, in the same order of peers; drawn dashed.
    """
    figure = new_figure(11, 5)
    accuracy, loss = figure.subplots(1, 2, width_ratios=(3, 2), sharex=True)
    split = str(rows[-1].get("split", "test")) if rows else "test"
    style_curves(accuracy, title=f"Top-1 on the {split} split", ylabel="top-1 (%)")
    style_curves(loss, title="Training loss", ylabel="loss")
    crowded = len(peer_names(rows)) > _CROWD
    entries: list[Line2D] = []
    for index, name in enumerate(peer_names(rows)):
        colour, marker = colour_of(index), PEER_MARKERS[index % len(PEER_MARKERS)]
        points = peer_points(rows, index, "top1", 100)
        before = peer_points(baseline_rows or (), index, "top1", 100)
        width = 1.1 if crowded else 1.6
        _draw(accuracy, points, colour, marker=marker, width=width)
        if not crowded:
            _draw(accuracy, before, colour, dashed=True)
        _draw(loss, peer_points(rows, index, "loss"), colour, marker=marker, width=width)
        if not crowded:
            _draw(loss, peer_points(baseline_rows or (), index, "loss"), colour, dashed=True)
        label = name + _last(points) + (f"  (alone {_last(before).strip()})" if before[1] else "")
        entries.append(Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.6, label=label))
    together = _points(rows, [number(row.get("ensemble"), "top1") for row in rows], 100)
    if together[1]:
        _draw(accuracy, together, ENSEMBLE_COLOUR, width=2.2)
        entries.append(Line2D([], [], color=ENSEMBLE_COLOUR, linewidth=2.2, label=f"ensemble{_last(together)}"))
    if baseline_rows:
        if crowded:
            for axes, key, factor in ((accuracy, "top1", 100.0), (loss, "loss", 1.0)):
                averages = [mean([number(peer, key) for peer in row["peers"]]) for row in baseline_rows]
                _draw(axes, _points(baseline_rows, averages, factor), MUTED, dashed=True)
        text = "dashed: mean of the same networks alone" if crowded else "dashed: trained alone"
        entries.append(Line2D([], [], color=MUTED, linestyle="--", linewidth=1.4, label=text))
    _leave_out_start(accuracy)
    if not accuracy.lines:
        _say_empty(accuracy, "not evaluated yet")
    if entries:
        figure.legend(
            handles=entries, loc="outside lower center", ncols=min(len(entries), 3), fontsize=9, frameon=False
        )
    return figure


def agreement_curves(rows: Sequence[Row]) -> Figure | None:
    """How far the peers look at the same places, per stage, and predict the same class, over epochs.

    Left: mean over peers of the cosine between a peer's attention maps and the others'; the band is from
    the lowest peer to the highest. None when the rows hold neither.
    """
    stages = max((len(peer.get("attention_agreement") or ()) for row in rows for peer in row["peers"]), default=0)
    decisions = _points(rows, [number(row, "agreement") for row in rows], 100)
    panels = [panel for panel, there in (("places", stages > 0), ("decisions", bool(decisions[1]))) if there]
    if not panels:
        return None
    figure = new_figure(1.5 + 4.5 * len(panels), 4.2)
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False, sharex=True)[0], strict=True):
        if panel == "decisions":
            style_curves(axes, title="Peers predict the same class", ylabel="images (%)")
            _draw(axes, decisions, ENSEMBLE_COLOUR, marker="o")
            continue
        style_curves(axes, title="Peers look at the same places", ylabel="agreement of attention maps")
        for stage, colour in enumerate(stage_colours(stages)):
            _draw_stage(axes, rows, stage, colour)
        figure.legend(
            handles=list(axes.lines),
            loc="outside lower center",
            ncols=min(stages, 6),
            fontsize=9,
            frameon=False,
        )
    return figure


def peer_points(rows: Sequence[Row], peer: int, key: str, factor: float = 1.0) -> Points:
    """Epochs and values of one peer, where it has one."""
    values = [number(row["peers"][peer], key) if peer < len(row["peers"]) else None for row in rows]
    return _points(rows, values, factor)


def _points(rows: Sequence[Row], values: Sequence[float | None], factor: float = 1.0) -> Points:
    known = [(int(row["epoch"]), factor * value) for row, value in zip(rows, values, strict=True) if value is not None]
    return [epoch for epoch, _ in known], [value for _, value in known]


def _draw(
    axes: Axes,
    points: Points,
    colour: str,
    *,
    marker: str | None = None,
    dashed: bool = False,
    width: float = 1.6,
) -> None:
    if not points[1]:
        return
    shown = None if dashed else marker
    if len(points[0]) == 1:
        shown = marker or "o"  # there is no line to be seen
    axes.plot(
        *points,
        color=colour,
        linewidth=1.4 if dashed else width,
        linestyle="--" if dashed else "-",
        alpha=0.75 if dashed else 1.0,
        marker=shown,
        markersize=4,
        markevery=max(len(points[0]) // 12, 1),
    )


def _draw_stage(axes: Axes, rows: Sequence[Row], stage: int, colour: str) -> None:
    epochs, middles, lows, highs = [], [], [], []
    for row in rows:
        found = [peer.get("attention_agreement") or [] for peer in row["peers"]]
        values = [number({"": maps[stage]}, "") for maps in found if stage < len(maps)]
        known = [value for value in values if value is not None]
        middle = mean(known)
        if middle is not None:
            epochs.append(int(row["epoch"]))
            middles.append(middle)
            lows.append(min(known))
            highs.append(max(known))
    axes.fill_between(epochs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, middles, color=colour, linewidth=1.8, marker=marker, markersize=4, label=f"stage {stage + 1}")


def _leave_out_start(axes: Axes) -> None:
    """Begin the y axis at what the first tenth of the training reached: the differences are in the rest."""
    points = [(float(x), float(y)) for line in axes.lines for x, y in np.asarray(line.get_xydata())]
    end = max((x for x, _ in points), default=0.0)
    later = [y for x, y in points if x > end / 10]
    if later and max(later) > min(later):
        axes.set_ylim(bottom=min(later) - 0.03 * (max(later) - min(later)))


def _last(points: Points) -> str:
    return f"  {percent(points[1][-1] / 100)} %" if points[1] else ""


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=MUTED)
