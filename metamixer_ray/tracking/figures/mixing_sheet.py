"""A sheet that shows what the mixer does: quadruples before, after local and after global mixing."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from metamixer_ray.tracking.figures.canvas import MUTED, clipped, new_figure, show_image

_CELL = 1.35
_LINE = 0.135
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
    terms = [max(text.count(" + ") + 1 for text in texts) for _, _, texts in stages]
    heights = [_CELL + 0.12 + _LINE * n for n in terms]
    figure = new_figure(across * (4 * _CELL + 0.6), down * (sum(heights) + 0.35) + 0.4)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    blocks = figure.subfigures(down, across, squeeze=False, wspace=0.03, hspace=0.02)
    for quadruple in range(quadruples):
        block = blocks[quadruple // across][quadruple % across]
        grid = block.subplots(3, 4, squeeze=False, gridspec_kw={"height_ratios": heights})
        for (stage, shown, texts), axes_row in zip(stages, grid, strict=True):
            for member, axes in enumerate(axes_row):
                row = 4 * quadruple + member
                show_image(axes, shown[row])
                axes.text(
                    0.5,
                    -0.04,
                    _caption(texts[row]),
                    transform=axes.transAxes,
                    ha="center",
                    va="top",
                    fontsize=7,
                )
                if stage == "as they are":
                    axes.set_title(("A1", "A2", "B1", "B2")[member], fontsize=8, color=MUTED, pad=3)
            axes_row[0].text(
                -0.08,
                0.5,
                stage,
                transform=axes_row[0].transAxes,
                rotation=90,
                ha="right",
                va="center",
                fontsize=8.5,
                color=MUTED,
            )
    return figure


def _caption(text: str) -> str:
    """One class per line, so that long names stay inside their image's width."""
    return "\n".join(("+ " if i else "") + clipped(term, _TERM_LENGTH) for i, term in enumerate(text.split(" + ")))
