"""The order of a streamed set: shuffled by windows of whole row groups, so that few of them are open at a time."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metamixer_ray.data.joining import all_couples, couples_and_single, join, join_or_keep

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """How the images of a streamed set lie in its files.

    Attributes:
        groups: int64 [N], the row group of each image.
        window: how many images are shuffled together, at most and about.
    """

    groups: Ints
    window: int

    @property
    def ahead(self) -> int:
        """Images that may be in memory: a window, and half of the next one while the first is used up."""
        return self.window + self.window // 2

    @property
    def most_kept(self) -> int:
        """Couples that may wait for one of another class from one window to the next: an eighth of the images."""
        return self.window // 16


def cut_windows(layout: Layout, rng: np.random.Generator) -> list[Ints]:
    """The row groups in random order, cut into windows: positions of the images in each, int64 [n].

    There are as few windows as their size allows, and they are about equally large. None has more images than
    ``layout.window`` and one row group more, and none is empty.
    """
    sizes = np.bincount(layout.groups)
    by_group = np.split(np.argsort(layout.groups, kind="stable"), np.cumsum(sizes)[:-1])
    order = rng.permutation(np.flatnonzero(sizes))
    ends = np.cumsum(sizes[order])
    count = -(-len(layout.groups) // layout.window)
    # A window ends with the row group in which it reaches its share.
    shares = len(layout.groups) * np.arange(1, count) / count
    cuts = np.unique(np.searchsorted(ends, shares) + 1)
    return [np.concatenate([by_group[group] for group in part]) for part in np.split(order, cuts) if len(part)]


def windowed_units(labels: Ints, layout: Layout, *, quadruples: bool, rng: np.random.Generator) -> list[Ints]:
    """What batches are made of, window by window: int64 [U, 4] quadruples, or [U, 1] single images.

    Quadruples are formed inside a window. What cannot be joined there goes on to the next one: the odd one out of a
    class, a couple too many, and up to ``layout.most_kept`` couples of a class that has more than half of a window's
    (the rest of these is joined with itself). Only the last window gives companions to what is left.
    """
    windows = cut_windows(layout, rng)
    if not quadruples:
        return [rng.permutation(rows)[:, None] for rows in windows]
    units = []
    single: Ints = np.empty(0, dtype=np.int64)
    kept: Ints = np.empty((0, 2), dtype=np.int64)
    for number, window in enumerate(windows, start=1):
        rows = np.concatenate([single, window])
        if number < len(windows):
            couples, left_over = couples_and_single(labels[rows], len(single), rng)
            single = rows[left_over]
        else:
            couples = all_couples(labels[rows], rng)
        pool = np.concatenate([kept, rows[couples]])
        pool = pool[rng.permutation(len(pool))]
        classes = labels[pool[:, 0]]
        if number < len(windows):
            left, right, later = join_or_keep(classes, layout.most_kept, rng)
            kept = pool[later]
        else:
            left, right = join(classes, rng)
        joined = np.concatenate([pool[left], pool[right]], axis=1)
        units.append(joined[rng.permutation(len(joined))])
    return units
