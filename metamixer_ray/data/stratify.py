"""Cutting a set into parts with every class in its share: validation splits and low-data subsets."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def allocate(counts: Ints, total: int, *, least: Ints, most: Ints) -> Ints:
    """How many of ``total`` places each class gets: in proportion to ``counts``, by the largest remainders.

    Args:
        counts: int64 [C], images per class.
        total: places to give away; ``sum(least) <= total <= sum(most)``.
        least: int64 [C], what every class gets at least.
        most: int64 [C], what no class exceeds.

    Returns:
        int64 [C] that sums to exactly ``total``.

    Raises:
        ValueError: ``total`` cannot be reached within the bounds.
    """
    if not least.sum() <= total <= most.sum():
        raise ValueError(f"{total} places don't fit between {least.sum()} and {most.sum()}")
    ideal = total * counts / max(counts.sum(), 1)
    given = np.clip(np.floor(ideal).astype(np.int64), least, most)
    while (missing := total - int(given.sum())) != 0:
        sign = 1 if missing > 0 else -1
        movable = np.flatnonzero(given < most if sign > 0 else given > least)
        neediest = movable[np.argsort(-sign * (ideal - given)[movable], kind="stable")]
        given[neediest[: abs(missing)]] += sign
    return given


def choose(labels: Ints, per_class: Ints, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mark ``per_class[c]`` random rows of every class c.

    With one generator state, a larger ``per_class`` marks a superset of what a smaller one marks, so low-data
    subsets of growing size are nested.

    Returns:
        bool [N].
    """
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels, minlength=len(per_class))
    starts = np.cumsum(counts) - counts
    rank_in_class = np.arange(len(labels)) - np.repeat(starts, counts)
    chosen = np.zeros(len(labels), dtype=np.bool_)
    chosen[order[rank_in_class < np.repeat(per_class, counts)]] = True
    return chosen
