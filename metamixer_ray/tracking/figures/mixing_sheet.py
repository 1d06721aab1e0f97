"""A sheet that shows what the mixer does: quadruples before, after local and after global mixing."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from metamixer_ray.tracking.figures.canvas import MUTED, clipped
from metamixer_ray.tracking.figures.picture_page import TITLE_HEIGHT, PicturePage

# Inches.
_SIDE = 1.2
_GAP = 0.12
_LINE = 0.115
_MARGIN = 0.3
_HEAD = 0.2
_TERM_LENGTH = 20


def describe_label(weights: Mapping[str, float] | Sequence[float], classes: Sequence[str] | None = None) -> str:
    """A mixed label in words, heaviest class first: ``0.62 cat + 0.38 ship``; a pure one is just ``cat``.

    Args:
        weights: class name -> weight, or one weight per class (then ``classes`` names them).
    """
    if not isinstance(weights, Mapping):
        names = classes if classes is not None else [str(i) for i in range(len(weights))]
        weights = {name: float(weight) for name, weight in zip(names, weights, strict=True)}
    parts = sorted(((w, name) for name, w in weights.items() if w > 0.005), key=lambda part: -part[0])
    if len(parts) == 1:
        return parts[0][1]
    return " + ".join(f"{weight:.2f} {name}" for weight, name in parts)


def mixing_sheet(
    images: np.ndarray,
    after_local: np.ndarray,
    after_global: np.ndarray,
    *,
    labels: Sequence[str],
    local_labels: Sequence[str],
    global_labels: Sequence[str],
    title: str = "What the mixer makes of a batch",
) -> Figure:
    """Per quadruple (A1, A2, B1, B2) three rows of four: as they are, after local, after global mixing.

    Args:
        images, after_local, after_global: uint8 [4q, 3, H, W]; global mixing at the input.
        labels, local_labels, global_labels: 4q texts each, such as `describe_label` makes.
        title: above the sheet.

    Raises:
        ValueError: the lengths differ or are not a multiple of four.
    """
    stages = (
        ("as they are", images, labels),
        ("after local mixing", after_local, local_labels),
        ("after global mixing", after_global, global_labels),
    )
    if len(images) % 4 or any(len(rows) != len(images) or len(texts) != len(images) for _, rows, texts in stages):
        raise ValueError(f"quadruples of images and labels are needed, got {[len(rows) for _, rows, _ in stages]}")
    quadruples = len(images) // 4
    across = min(quadruples, 2)
    down = -(-quadruples // across)
    heights = [_SIDE + _GAP + _LINE * (1 + max(text.count(" + ") for text in texts)) for _, _, texts in stages]
    width, height = _MARGIN + 4 * (_SIDE + _GAP), _HEAD + sum(heights) + _GAP
    page = PicturePage(across * width + _GAP, TITLE_HEIGHT + down * height, title)
    for quadruple in range(quadruples):
        left, top = _MARGIN + quadruple % across * width, TITLE_HEIGHT + quadruple // across * height + _HEAD
        for member, name in enumerate(("A1", "A2", "B1", "B2")):
            page.text(
                left + member * (_SIDE + _GAP) + _SIDE / 2, top - 0.04, name, va="bottom", fontsize=8, color=MUTED
            )
        for (stage, shown, texts), needed in zip(stages, heights, strict=True):
            page.text(
                left - 0.06, top + _SIDE / 2, stage, rotation=90, ha="right", va="center", fontsize=8.5, color=MUTED
            )
            for member in range(4):
                x, row = left + member * (_SIDE + _GAP), 4 * quadruple + member
                page.image(x, top, _SIDE, shown[row])
                page.text(x + _SIDE / 2, top + _SIDE + 0.04, _caption(texts[row]), fontsize=7)
            top += needed
    return page.figure


def _caption(text: str) -> str:
    """One class per line, so that long names stay inside their image's width."""
    return "\n".join(("+ " if i else "") + clipped(term, _TERM_LENGTH) for i, term in enumerate(text.split(" + ")))
