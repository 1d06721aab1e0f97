"""A sheet that shows where each peer looks: attention maps per stage over test images, with predictions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metamixer_ray.tracking.figures.canvas import (
    MUTED,
    RIGHT_COLOUR,
    WRONG_COLOUR,
    clipped,
    colour_of,
    frame,
    new_figure,
    show_image,
    smoothing,
)

_CELL = 1.15
_GAP = 0.12
_MOST_MAPS = 12
_LUMA = np.array([0.299, 0.587, 0.114])


def attention_sheet(
    images: np.ndarray,
    attention: Sequence[Sequence[np.ndarray]],
    *,
    names: Sequence[str],
    labels: Sequence[str],
    predictions: Sequence[Sequence[str]],
    correct: np.ndarray,
    stage_names: Sequence[Sequence[str]] | None = None,
    title: str = "Where the peers look",
) -> Figure:
    """One row per image: the image, then each peer's attention at each stage with what it predicts.

    More than twelve maps are not put side by side: the images are then repeated below for the next peers.

    Args:
        images: uint8 [n, 3, H, W].
        attention: per peer, per stage, non-negative [n, h, w] of any h, w; each map is scaled to its maximum.
        names: per peer.
        labels: the n true class names.
        predictions: per peer n texts, such as ``cat 0.93``.
        correct: bool [peers, n].
        stage_names: per peer, per stage; default ``stage 1``...
        title: above the sheet.
    """
    most_stages = max(len(maps) for maps in attention)
    across = max(_MOST_MAPS // most_stages, 1)
    bands = [range(start, min(start + across, len(names))) for start in range(0, len(names), across)]
    width = 1.0 + len(bands[0]) * (most_stages + _GAP)
    height = len(bands) * (len(images) * (_CELL + 0.27) + 0.45) + 0.4
    figure = new_figure(max(_CELL * width + 0.2, 3.5), height)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    areas = figure.subfigures(len(bands), 1, squeeze=False, hspace=0.02)[:, 0]
    for area, peers in zip(areas, bands, strict=True):
        widths = [1.0, *(w for _ in bands[0] for w in (_GAP, *([1.0] * most_stages)))]
        grid = area.add_gridspec(len(images), len(widths), width_ratios=widths)
        for row, image in enumerate(images):
            first = area.add_subplot(grid[row, 0])
            show_image(first, image)
            _under(first, clipped(labels[row], 16), "black")
            for place, peer in enumerate(peers):
                column = 2 + place * (most_stages + 1)
                maps = attention[peer]
                for stage, values in enumerate(maps):
                    axes = area.add_subplot(grid[row, column + stage])
                    overlay(axes, image, np.asarray(values[row]))
                    if row == 0:
                        name = stage_names[peer][stage] if stage_names else f"stage {stage + 1}"
                        axes.set_title(clipped(name, 14), fontsize=8, color=MUTED, pad=3)
                whole = _spanning(area, grid[row, column : column + len(maps)], len(maps))
                right = bool(correct[peer][row])
                mark, colour = ("✓", RIGHT_COLOUR) if right else ("✗", WRONG_COLOUR)
                _under(whole, f"{mark} {clipped(predictions[peer][row], 15 * len(maps) + 3)}", colour)
                if row == 0:
                    name = clipped(names[peer], 13 * len(maps))
                    whole.set_title(name, fontsize=10, fontweight="bold", color=colour_of(peer), pad=15)
    return figure


def overlay(axes: Axes, image: np.ndarray, attention: np.ndarray) -> None:
    """An attention map [h, w] in colour over a uint8 [3, H, W] image in grey, both filling the axes.

    The less attention, the more transparent the colour, so that the image stays recognisable.
    """
    grey = np.tensordot(_LUMA, np.asarray(image, dtype=np.float64), axes=1)
    height, width = grey.shape
    extent = (0.0, float(width), float(height), 0.0)
    axes.imshow(grey, cmap="gray", vmin=-60, vmax=275, extent=extent, interpolation=smoothing(image))
    peak = float(attention.max())
    strength = np.asarray(attention / peak if peak > 0 else attention, dtype=np.float64)
    axes.imshow(
        strength,
        cmap="plasma",
        vmin=0,
        vmax=1,
        alpha=0.15 + 0.6 * strength,
        extent=extent,
        interpolation="bilinear",
    )
    frame(axes)


def _spanning(area: Any, cells: Any, stages: int) -> Axes:
    """Invisible axes over the maps of one peer, as high as they are, for what belongs to all of them."""
    axes: Axes = area.add_subplot(cells)
    axes.set_axis_off()
    axes.set_box_aspect(1 / (stages + 0.06 * (stages - 1)))
    return axes


def _under(axes: Axes, text: str, colour: str) -> None:
    at = axes.transAxes
    axes.text(0.5, -0.05, text, transform=at, ha="center", va="top", fontsize=8.5, color=colour)
