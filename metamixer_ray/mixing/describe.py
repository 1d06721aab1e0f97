"""One row's mixture in plain values, for figures and captions."""

from collections.abc import Sequence
from dataclasses import dataclass

from metamixer_ray.mixing.plan import LocalMix, MixPlan, label_sources

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class RowMixture:
    """What one row of a mixed batch is made of."""

    row: int
    sources: tuple[tuple[int, float], ...]
    """(source row, label weight), each source once, heaviest first; sources without weight are left out."""
    boxes: tuple[Box, ...]
    """Where local mixing pasted into this row: top, left, bottom, right in pixels; empty boxes are left out."""
    partner_boxes: tuple[Box, ...]
    """The same for the row that global mixing blends in."""
    stage: int | None
    """Stage of global mixing, 0 = the input; None if there is none."""
    kept: float | None
    """Global mixing's lambda, the row's own weight; None if there is none."""

    def class_weights(self, labels: Sequence[int]) -> dict[int, float]:
        """Target weight of every class present, heaviest first; ``labels``: the class of each row."""
        weights: dict[int, float] = {}
        for source, weight in self.sources:
            label = int(labels[source])
            weights[label] = weights.get(label, 0.0) + weight
        return dict(sorted(weights.items(), key=lambda item: -item[1]))

    def caption(self, labels: Sequence[int], classes: Sequence[str]) -> str:
        """Such as ``cat 0.62 + dog 0.38``; ``classes`` are the names of the classes."""
        return " + ".join(f"{classes[label]} {weight:.2f}" for label, weight in self.class_weights(labels).items())


def describe_row(plan: MixPlan, row: int) -> RowMixture:
    """The mixture that ``row`` of the batch becomes."""
    indices, weights = label_sources(plan)
    merged: dict[int, float] = {}
    for source, weight in zip(indices[row].tolist(), weights[row].tolist(), strict=True):
        merged[source] = merged.get(source, 0.0) + weight
    sources = sorted(((s, w) for s, w in merged.items() if w > 0), key=lambda item: -item[1])
    glob = plan.glob
    return RowMixture(
        row=row,
        sources=tuple(sources),
        boxes=_boxes(plan.local, row),
        partner_boxes=() if glob is None else _boxes(plan.local, int(glob.partner[row])),
        stage=None if glob is None else glob.stage,
        kept=None if glob is None else float(glob.kept[row]),
    )


def _boxes(local: LocalMix | None, row: int) -> tuple[Box, ...]:
    if local is None:
        return ()
    boxes = ((top, left, bottom, right) for top, left, bottom, right in local.boxes[:, row].tolist())
    return tuple(box for box in boxes if box[0] < box[2] and box[1] < box[3])
