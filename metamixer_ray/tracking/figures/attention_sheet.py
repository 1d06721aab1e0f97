"""A sheet that shows where each peer looks: attention maps per stage over test images, with predictions."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from metamixer_ray.tracking.figures.canvas import MUTED, RIGHT_COLOUR, WRONG_COLOUR, clipped, colour_of
from metamixer_ray.tracking.figures.picture_page import TITLE_HEIGHT, PicturePage

# Inches.
_SIDE = 1.1
_GAP = 0.06
_BETWEEN = 0.14
_CAPTION = 0.25
_HEAD = 0.42
_MARGIN = 0.12
_MOST_MAPS = 12


def attention_sheet(
    images: np.ndarray,
    attention: Sequence[Sequence[np.ndarray]],
    *,
    names: Sequence[str],
    labels: Sequence[str],
    predictions: Sequence[Sequence[str]],
    correct: np.ndarray,
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
        title: above the sheet.
    """
    most_stages = max(len(maps) for maps in attention)
    across = max(_MOST_MAPS // most_stages, 1)
    bands = [range(start, min(start + across, len(names))) for start in range(0, len(names), across)]
    peer_width = most_stages * (_SIDE + _GAP) + _BETWEEN
    band_height = _HEAD + len(images) * (_SIDE + _CAPTION)
    width = max(_MARGIN + _SIDE + _GAP + len(bands[0]) * peer_width + _MARGIN, 3.5)
    page = PicturePage(width, TITLE_HEIGHT + len(bands) * band_height + _MARGIN, title)
    for band, peers in enumerate(bands):
        top = TITLE_HEIGHT + band * band_height + _HEAD
        rows = [top + row * (_SIDE + _CAPTION) for row in range(len(images))]
        for y, image, label in zip(rows, images, labels, strict=True):
            page.image(_MARGIN, y, _SIDE, image)
            page.text(_MARGIN + _SIDE / 2, y + _SIDE + 0.05, clipped(label, 16), fontsize=8.5)
        for place, peer in enumerate(peers):
            maps, left = attention[peer], _MARGIN + _SIDE + _GAP + _BETWEEN + place * peer_width
            middle = left + (len(maps) * (_SIDE + _GAP) - _GAP) / 2
            name = clipped(names[peer], 13 * len(maps))
            page.text(middle, top - _HEAD, name, fontsize=10, fontweight="bold", color=colour_of(peer))
            for stage, values in enumerate(maps):
                x = left + stage * (_SIDE + _GAP)
                page.text(x + _SIDE / 2, top - 0.04, f"stage {stage + 1}", va="bottom", fontsize=8, color=MUTED)
                for y, image, value in zip(rows, images, values, strict=True):
                    page.attention(x, y, _SIDE, image, np.asarray(value))
            for y, told, right in zip(rows, predictions[peer], correct[peer], strict=True):
                mark, colour = ("✓", RIGHT_COLOUR) if right else ("✗", WRONG_COLOUR)
                told = f"{mark} {clipped(told, 15 * len(maps) + 3)}"
                page.text(middle, y + _SIDE + 0.05, told, fontsize=8.5, color=colour)
    return page.figure
