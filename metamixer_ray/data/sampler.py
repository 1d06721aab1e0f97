"""The order of images in an epoch, as batches that every peer and replica works out for itself."""

import numpy as np
import torch
from numpy.typing import NDArray

from metamixer_ray.data.config import DataConfig
from metamixer_ray.errors import ConfigError
from metamixer_ray.randomness import numpy_generator

Ints = NDArray[np.int64]


def wants_quadruples(config: DataConfig, *, organised: bool) -> bool:
    """Whether batches are quadruples: what ``--sampler`` says, or for ``auto`` what the mixer needs.

    Raises:
        ConfigError: the mixer needs quadruples and the sampler is ``shuffle``.
    """
    if config.sampler == "shuffle" and organised:
        raise ConfigError(
            "--sampler shuffle: this mixer mixes within quadruples of two classes; give --sampler auto, "
            "or --pairing free to mix random rows"
        )
    return organised if config.sampler == "auto" else config.sampler == "quadruple"


class BatchOrder:
    """The batches of every epoch, a pure function of (labels, seed, epoch).

    A global batch is for all replicas together: replica r takes the r-th of ``replicas`` equal contiguous
    slices.

    **Quadruples.** Rows 4q..4q+3 of a batch are A1, A2, B1, B2: two images of a class A and two of another
    class B. Per epoch the images are shuffled inside their class and form couples; the couples are shuffled
    and joined with couples of another class. Every image appears exactly once per epoch, except that

    1. a class with an odd number of images gives its odd one out a random companion of the class, which thus
       appears a second time (in a class of a single image that is the image itself);
    2. if the number of couples is odd, one couple is joined with a copy of a random couple of another class;
    3. if the number of quadruples isn't a multiple of ``replicas``, random quadruples are repeated to make it
    one.

    If one class has more than half of all couples, all others are joined with it and its surplus couples with
    each other: these quadruples hold one class only, which keeps each image at one appearance.

    **Shuffle** (``quadruples=False``). A plain random order, filled up to a multiple of ``replicas`` by
    random repeats; and further, if need be, so that no replica's slice has fewer than two rows (BatchNorm
    cannot train on one).

    Either way the rows are spread evenly: there are as few batches as ``batch_size`` allows, and they differ
    by at most one quadruple (or row) per replica, so no small last batch upsets BatchNorm's statistics. A
    ``batch_size`` above the size of the training set gives one batch of all there is.
    """

    def __init__(
        self, labels: torch.Tensor | Ints, *, batch_size: int, replicas: int, quadruples: bool, seed: int
    ) -> None:
        """
        Args:
            labels: int64 [N], from 0.
            batch_size: largest number of rows of a global batch, over all replicas.
            replicas: equal slices that each batch must have.
            quadruples: whether batches are made of quadruples.
            seed: of the training.

        Raises:
            ConfigError: a batch size that cannot be cut into equal slices, or quadruples of a single class.
        """
        self.labels: Ints = np.asarray(labels, dtype=np.int64)
        self.batch_size = batch_size
        self.replicas = replicas
        self.quadruples = quadruples
        self.seed = seed
        # What each replica's slice consists of: quadruples, or single rows.
        self._unit_rows = 4 if quadruples else 1
        _check_batch_size(batch_size, replicas, quadruples)
        counts = np.bincount(self.labels)
        if quadruples and (counts > 0).sum() < 2:
            raise ConfigError(
                "the training set has images of one class only, but a quadruple needs two classes; "
                "check --data and --label-column, or give --sampler shuffle with a mixer that allows it"
            )
        couples = int(((counts + 1) // 2).sum())
        units = -(-couples // 2) if quadruples else len(self.labels)
        per_replica = -(-units // replicas)
        largest = batch_size // (self._unit_rows * replicas)
        self.steps_per_epoch = -(-per_replica // largest)
        if not quadruples:
            per_replica = max(per_replica, 2 * self.steps_per_epoch)
        self._units = per_replica * replicas
        short, longer = divmod(per_replica, self.steps_per_epoch)
        sizes = np.full(self.steps_per_epoch, short) + (np.arange(self.steps_per_epoch) < longer)
        self._ends: Ints = np.cumsum(sizes) * replicas * self._unit_rows

    def epoch(self, epoch: int) -> list[Ints]:
        """The ``steps_per_epoch`` global batches of ``epoch``: positions in the training set, int64 [b]
        each."""
        rng = numpy_generator(self.seed, "order", epoch)
        units = _quadruples(self.labels, rng) if self.quadruples else rng.permutation(len(self.labels))[:, None]
        missing = self._units - len(units)
        if missing:
            repeated = rng.choice(len(units), missing, replace=missing > len(units))
            units = np.concatenate([units, units[repeated]])
            units = units[rng.permutation(len(units))]
        rows = np.ascontiguousarray(units, dtype=np.int64).reshape(-1)
        return [np.ascontiguousarray(batch) for batch in np.split(rows, self._ends[:-1])]


def _check_batch_size(batch_size: int, replicas: int, quadruples: bool) -> None:
    if replicas < 1:
        raise ConfigError(f"--replicas {replicas}: give 1 or more")
    unit = (4 if quadruples else 1) * replicas
    smallest = unit if quadruples else 2 * replicas
    if batch_size % unit == 0 and batch_size >= smallest:
        return
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    valid = f"{below} or {above}" if below >= smallest else str(max(above, smallest))
    if quadruples:
        why = f"a multiple of {unit} (quadruples of four rows on {replicas} replicas)"
    else:
        why = f"a multiple of {unit} with at least two rows on each of {replicas} replicas"
    raise ConfigError(f"--batch-size {batch_size}: it must be {why}; the nearest that fits: {valid}")


def _quadruples(labels: Ints, rng: np.random.Generator) -> Ints:
    """All images as quadruples in random order: int64 [Q, 4]."""
    couples = _couples(labels, rng)
    couples = couples[rng.permutation(len(couples))]
    left, right = _join(labels[couples[:, 0]], rng)
    quadruples = np.concatenate([couples[left], couples[right]], axis=1)
    return quadruples[rng.permutation(len(quadruples))]


def _couples(labels: Ints, rng: np.random.Generator) -> Ints:
    """Every image with another of its class: int64 [K, 2], grouped by class."""
    order = rng.permutation(len(labels))
    # NumPy sorts 16-bit keys by radix, ten times faster; more than 32,767 classes fall back to the wide sort.
    keys = labels[order].astype(np.int16) if labels.max() < 2**15 else labels[order]
    order = order[np.argsort(keys, kind="stable")]
    counts = np.bincount(labels)
    ends = np.cumsum(counts)
    odd = np.flatnonzero(counts % 2)
    # The last of an odd class is the one left over; its companion is any other, or itself if there is no
    # other.
    others = np.maximum(counts[odd] - 1, 1)
    companions = order[ends[odd] - counts[odd] + rng.integers(0, others)]
    return np.insert(order, ends[odd], companions).reshape(-1, 2)


def _join(classes: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Which couples stand side by side, given their classes in random order: two int64 [Q] of positions."""
    total = len(classes)
    counts = np.bincount(classes)
    largest = int(counts.argmax())
    if 2 * counts[largest] > total:
        return _join_to_largest(classes == largest, rng)
    positions = np.arange(total)
    left, right = positions[0 : total - 1 : 2], positions[1::2].copy()
    _separate(classes[left], classes, right, rng)
    if total % 2 == 0:
        return left, right
    last = total - 1
    companion = rng.choice(np.flatnonzero(classes != classes[last]))
    return np.append(left, last), np.append(right, companion)


def _join_to_largest(in_largest: NDArray[np.bool_], rng: np.random.Generator) -> tuple[Ints, Ints]:
    """The case of one class with more than half of the couples: the others with it, its surplus with
    itself."""
    inside, outside = np.flatnonzero(in_largest), np.flatnonzero(~in_largest)
    surplus = inside[len(outside) :]
    half = len(surplus) // 2
    left = np.concatenate([inside[: len(outside)], surplus[:half]])
    right = np.concatenate([outside, surplus[half : 2 * half]])
    if len(surplus) % 2:
        left = np.append(left, surplus[-1])
        right = np.append(right, rng.choice(outside))
    # Either of the two classes may come first.
    turned = rng.random(len(left)) < 0.5
    return np.where(turned, right, left), np.where(turned, left, right)


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
