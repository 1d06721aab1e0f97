"""The order of images in an epoch, as batches that every peer and replica works out for itself."""

import numpy as np
import torch
from numpy.typing import NDArray

from metamixer_ray.data.config import DataConfig
from metamixer_ray.data.joining import quadruples as random_quadruples
from metamixer_ray.data.windows import Layout, windowed_units
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
    """The batches of every epoch, a pure function of (labels, layout, seed, epoch).

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

    **Streamed sets** (``layout`` given). The row groups are shuffled and cut into windows of about
    ``layout.window`` images (:func:`cut_windows`); images are shuffled, and quadruples formed, inside a
    window. An odd image or couple, and up to ``layout.window // 8`` images of a class that has more than half
    of a window, wait for the next window. So a batch needs only the row groups of its window, the images that
    waited, and at a window's end those of the next. The counts are as above, with three differences: the
    companions and repeats of 1 to 3 all come from the last window (an image that is the only one of its class
    there is its own companion, a couple that meets no other class there is joined with one of its own); a
    class is joined with itself if more than half of one window's couples are of it; and where the rows of a
    file are sorted by class, a window has few classes, so shuffle such files once when writing them.

    Either way the rows are spread evenly: there are as few batches as ``batch_size`` allows, and they differ
    by at most one quadruple (or row) per replica, so no small last batch upsets BatchNorm's statistics. A
    ``batch_size`` above the size of the training set gives one batch of all there is.
    """

    def __init__(
        self,
        labels: torch.Tensor | Ints,
        *,
        batch_size: int,
        replicas: int,
        quadruples: bool,
        seed: int,
        layout: Layout | None = None,
    ) -> None:
        """
        Args:
            labels: int64 [N], from 0.
            batch_size: largest number of rows of a global batch, over all replicas.
            replicas: equal slices that each batch must have.
            quadruples: whether batches are made of quadruples.
            seed: of the training.
            layout: how a streamed set lies in its files; None for a decoded one.

        Raises:
            ConfigError: a batch size that cannot be cut into equal slices, or quadruples of a single class.
        """
        self.labels: Ints = np.asarray(labels, dtype=np.int64)
        self.batch_size = batch_size
        self.replicas = replicas
        self.quadruples = quadruples
        self.seed = seed
        self.layout = layout
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

    @property
    def images_per_epoch(self) -> int:
        """Rows of all batches of an epoch together, those that are shown twice counted twice."""
        return int(self._ends[-1])

    def epoch(self, epoch: int) -> list[Ints]:
        """The ``steps_per_epoch`` global batches of ``epoch``: positions in the training set, int64 [b]
        each."""
        rng = numpy_generator(self.seed, "order", epoch)
        if self.layout is not None:
            *before, units = windowed_units(self.labels, self.layout, quadruples=self.quadruples, rng=rng)
        else:
            before = []
            units = (
                random_quadruples(self.labels, rng) if self.quadruples else rng.permutation(len(self.labels))[:, None]
            )
        missing = self._units - sum(map(len, before)) - len(units)
        if missing:
            repeated = rng.choice(len(units), missing, replace=missing > len(units))
            units = np.concatenate([units, units[repeated]])
            units = units[rng.permutation(len(units))]
        units = np.concatenate([*before, units])
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
