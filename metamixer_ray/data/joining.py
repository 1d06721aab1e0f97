"""Couples of one class, and quadruples of two couples: what an organised batch is made of."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def quadruples(labels: Ints, rng: np.random.Generator) -> Ints:
    """All images as quadruples in random order: int64 [Q, 4]."""
    couples = all_couples(labels, rng)
    couples = couples[rng.permutation(len(couples))]
    left, right = join(labels[couples[:, 0]], rng)
    joined = np.concatenate([couples[left], couples[right]], axis=1)
    return joined[rng.permutation(len(joined))]


def all_couples(labels: Ints, rng: np.random.Generator) -> Ints:
    """Every image with another of its class: int64 [K, 2], grouped by class.

    The odd one out of a class takes a random other image of it, or itself if there is no other.
    """
    order, counts = _by_class(labels, rng.permutation(len(labels)))
    ends = np.cumsum(counts)
    odd = np.flatnonzero(counts % 2)
    # The last of an odd class is the one left over.
    others = np.maximum(counts[odd] - 1, 1)
    companions = order[ends[odd] - counts[odd] + rng.integers(0, others)]
    return np.insert(order, ends[odd], companions).reshape(-1, 2)


def couples_and_single(labels: Ints, first: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """As :func:`all_couples`, but the odd ones out stay single.

    Args:
        labels: int64 [N].
        first: this many leading images have waited for a companion already, and are joined before others.

    Returns:
        Couples int64 [K, 2], and positions int64 [S] of the single ones, at most one of a class.
    """
    shuffled = np.concatenate([np.arange(first), first + rng.permutation(len(labels) - first)])
    order, counts = _by_class(labels, shuffled)
    odd_ends = np.cumsum(counts)[counts % 2 == 1] - 1
    return np.delete(order, odd_ends).reshape(-1, 2), order[odd_ends]


def _by_class(labels: Ints, order: Ints) -> tuple[Ints, Ints]:
    """``order`` sorted by class, otherwise unchanged, and the number of images of each class."""
    # NumPy sorts 16-bit keys by radix, ten times faster; more than 32,767 classes fall back to the wide sort.
    keys = labels[order]
    if len(keys) and keys.max() < 2**15:
        keys = keys.astype(np.int16)
    return order[np.argsort(keys, kind="stable")], np.bincount(labels)


def join(classes: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Which couples stand side by side, given their classes in random order: two int64 [Q] of positions.

    Every couple is used once; an odd one is joined with a copy of a random couple of another class. The surplus of a
    class with more than half of the couples is joined with itself.
    """
    total = len(classes)
    largest = _dominant(classes)
    if largest is not None:
        inside, outside = np.flatnonzero(classes == largest), np.flatnonzero(classes != largest)
        surplus = inside[len(outside) :]
        half = len(surplus) // 2
        left = np.concatenate([inside[: len(outside)], surplus[:half]])
        right = np.concatenate([outside, surplus[half : 2 * half]])
        if len(surplus) % 2:
            left = np.append(left, surplus[-1])
            # A window of a stream may hold one class only.
            right = np.append(right, rng.choice(outside if len(outside) else inside))
        return _turn(left, right, rng)
    left, right = _join_even(classes[: total - total % 2], rng)
    if total % 2 == 0:
        return left, right
    last = total - 1
    companion = rng.choice(np.flatnonzero(classes != classes[last]))
    return np.append(left, last), np.append(right, companion)


def join_or_keep(classes: Ints, most_kept: int, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """As :func:`join`, but what finds no couple of another class is kept for later.

    Args:
        classes: int64 [K], of the couples, in random order.
        most_kept: if more would be kept, the rest is joined with couples of its own class.

    Returns:
        left, right: int64 [Q] of positions.
        kept: int64 of positions, up to ``most_kept``, plus one if that makes the others even.
    """
    total = len(classes)
    largest = _dominant(classes)
    if largest is None:
        left, right = _join_even(classes[: total - total % 2], rng)
        return left, right, np.arange(total - total % 2, total)
    inside, outside = np.flatnonzero(classes == largest), np.flatnonzero(classes != largest)
    surplus = inside[len(outside) :]
    kept = min(most_kept, len(surplus))
    kept += (len(surplus) - kept) % 2
    alike = surplus[kept:]
    half = len(alike) // 2
    left = np.concatenate([inside[: len(outside)], alike[:half]])
    right = np.concatenate([outside, alike[half:]])
    return *_turn(left, right, rng), surplus[:kept]


def _dominant(classes: Ints) -> int | None:
    """The class of more than half of the couples, if there is one."""
    if len(classes) == 0:
        return None
    counts = np.bincount(classes)
    largest = int(counts.argmax())
    return largest if 2 * counts[largest] > len(classes) else None


def _turn(left: Ints, right: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Either of the two classes may come first."""
    turned = rng.random(len(left)) < 0.5
    return np.where(turned, right, left), np.where(turned, left, right)


def _join_even(classes: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """An even number of couples, none of whose classes has more than half of them."""
    positions = np.arange(len(classes))
    left, right = positions[0::2], positions[1::2].copy()
    _separate(classes[left], classes, right, rng)
    return left, right


def _separate(left: Ints, classes: Ints, right: Ints, rng: np.random.Generator) -> None:
    """Swap entries of ``right`` (positions) until no pair is of one class; ``left`` are the classes opposite.

    A pair (A, A) swaps with a random pair without an A, which leaves both mixed: (A, x), (y, A). Since no
    class has more than half of the couples, there are at least as many pairs without A as pairs (A, A), so
    one pass over the classes settles all.
    """
    for number in np.unique(left[left == classes[right]]):
        stuck = np.flatnonzero((left == number) & (classes[right] == number))
        if len(stuck) == 0:
            continue
        free = _without(number, left, classes, right, len(stuck), rng)
        right[stuck], right[free] = right[free], right[stuck]


def _without(number: int, left: Ints, classes: Ints, right: Ints, wanted: int, rng: np.random.Generator) -> Ints:
    """``wanted`` random pairs without class ``number``, distinct; looks at a few first, at all only if need
    be."""
    tried = np.unique(rng.integers(0, len(left), 4 * wanted + 16))
    for candidates in (tried, np.arange(len(left))):
        free = candidates[(left[candidates] != number) & (classes[right[candidates]] != number)]
        if len(free) >= wanted:
            return rng.choice(free, wanted, replace=False)
    raise AssertionError("no class has more than half of the couples, so there are pairs enough without it")
