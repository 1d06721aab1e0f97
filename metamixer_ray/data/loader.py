"""Batches for training and evaluation, the same whoever prepares them and in how many processes."""

import logging
import math
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metamixer_ray.data import augmentation
from metamixer_ray.data.cache import REPORTED
from metamixer_ray.data.config import Augment, DataConfig
from metamixer_ray.data.helpers import helped
from metamixer_ray.data.image_set import ImageSet
from metamixer_ray.data.sampler import BatchOrder
from metamixer_ray.data.sources import resolve_augment
from metamixer_ray.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One replica's rows of one step.

    Attributes:
        images: uint8 [b, 3, H, W], augmented.
        labels: int64 [b].
        indices: int64 [b], positions in the image set.
        step: 0-based, within the epoch.
        replaced: what was wrong with each image of a streamed set that another one stands in for, or that an
            evaluation left out, and where.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    step: int
    replaced: tuple[str, ...] = ()

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, which a GPU copies from without anyone waiting."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class _Job(NamedTuple):
    """A batch to make, and what its images need that only the asking process has."""

    step: int
    fetched: Any


class _Batches:
    """Makes one replica's batches, in whatever process."""

    def __init__(
        self, images: ImageSet, parts: list[NDArray[np.int64]], augment: Augment = "none", draw: "_Draw | None" = None
    ) -> None:
        self.images = images
        self.parts = parts
        self.augment = augment
        self.draw = draw

    def jobs(self, first_step: int, ahead: int) -> Generator[_Job, None, None]:
        with closing(self.images.fetch(self.parts[first_step:], ahead=ahead)) as fetched:
            for step, needed in enumerate(fetched, start=first_step):
                yield _Job(step, needed)

    def __call__(self, job: _Job) -> Batch:
        draws = None if self.draw is None else self.draw(job.step)
        made = self.images.make(self.parts[job.step], job.fetched, self.augment, draws)
        return Batch(made.images, self.images.labels[made.indices], made.indices, job.step, made.replaced)


@dataclass(frozen=True)
class _Draw:
    """How a replica's rows of a step vary: drawn for the whole batch, then cut."""

    augment: Augment
    size: int
    sizes: list[int]
    """Rows of the global batches."""
    resized: bool
    seed: int
    epoch: int
    replica: int
    replicas: int

    def __call__(self, step: int) -> augmentation.Draws:
        draws = augmentation.draw(
            self.augment,
            size=self.size,
            rows=self.sizes[step],
            seed=self.seed,
            epoch=self.epoch,
            step=step,
            resized=self.resized,
        )
        return draws.part(_share(self.sizes[step], self.replica, self.replicas))


def _share(rows: int, replica: int, replicas: int) -> slice:
    each = rows // replicas
    return slice(replica * each, (replica + 1) * each)


def train_batches(
    images: ImageSet,
    order: BatchOrder,
    config: DataConfig,
    *,
    seed: int,
    epoch: int,
    replica: int,
    first_step: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The training batches of one epoch for one replica, from ``first_step`` on.

    A pure function of (images, order, augmentation, seed, epoch, replica): neither ``loader_processes`` nor
    ``first_step`` changes a batch, and torch's global random state isn't touched. Closing or dropping the
    iterator ends its threads and processes. Of a streamed set, nothing is read that only the batches before
    ``first_step`` need.

    Args:
        pin_memory: whether batches are put in page-locked memory, for a GPU.

    Raises:
        ConfigError: ``replica`` isn't one of the order's.
        DataError: while iterating, a streamed image or file cannot be used.
        ValueError: the order was made for another set.
    """
    if not 0 <= replica < order.replicas:
        raise ConfigError(f"replica {replica} of {order.replicas}: --replicas and the number of workers disagree")
    if len(order.labels) != len(images):
        raise ValueError(f"the order is for {len(order.labels)} images, but the set has {len(images)}")
    if (order.layout is None) != (images.layout is None):
        raise ValueError("the order of a streamed set needs the set's layout, and that of a decoded set none")
    augment = resolve_augment(config, streamed=images.layout is not None)
    whole = order.epoch(epoch)
    parts = [batch[_share(len(batch), replica, order.replicas)] for batch in whole]
    draw = _Draw(
        augment,
        images.image_size,
        [len(batch) for batch in whole],
        resized=images.layout is not None,
        seed=seed,
        epoch=epoch,
        replica=replica,
        replicas=order.replicas,
    )
    batches = _Batches(images, parts, augment, draw)
    ahead = 0 if images.layout is None else images.layout.ahead // order.replicas
    return _run(batches, first_step, ahead, config.loader_processes, pin_memory)


def eval_batches(images: ImageSet, *, batch_size: int, replica: int, replicas: int) -> Iterator[Batch]:
    """One replica's share of a set in fixed order, not augmented: rows ``replica``, ``replica + replicas``,
    ...

    Every image comes once over all replicas; nothing is repeated, or dropped but for the bad images of a
    streamed set. The last batch may be smaller. All replicas have the same number of batches, so that
    collectives in an evaluation loop stay in step, except when ``batch_size`` is 1 or there are fewer images
    than replicas.

    Args:
        batch_size: rows per replica and step.

    Raises:
        DataError: while iterating, a streamed image or file cannot be used.
    """
    share = np.arange(replica, len(images), replicas, dtype=np.int64)
    steps = math.ceil(math.ceil(len(images) / replicas) / batch_size)
    starts = np.arange(1, steps) * batch_size
    if len(share):
        # A share that is one row shorter than others might lack their last batch: it gets its last row as
        # one.
        starts = np.minimum(starts, len(share) - 1)
    cuts = [cut for cut in np.split(share, starts) if len(cut)]
    return _run(_Batches(images, cuts), 0, 2 * batch_size, images.own_processes)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(images / 255 - mean) / std`` per channel, on the device of ``images``.

    Args:
        images: uint8 [b, 3, H, W].
        mean, std: three values each, of images scaled to 0..1.

    Returns:
        float32 [b, 3, H, W].
    """
    return images.to(torch.float32).sub_(_per_channel(mean, images.device)).div_(_per_channel(std, images.device))


@lru_cache(maxsize=16)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``values`` x 255 as [1, 3, 1, 1], sent to a device once: sending them with every batch would make it wait."""
    return torch.tensor(values, dtype=torch.float32, device=device).mul(255).view(1, -1, 1, 1)


def _run(
    batches: _Batches, first_step: int, ahead: int, processes: int, pin: bool = False
) -> Generator[Batch, None, None]:
    """The batches from ``first_step`` on, made ahead by a thread or by processes."""
    remaining = len(batches.parts) - first_step
    if remaining <= 0:
        return
    bad = 0
    with ExitStack() as open_ones:
        jobs = open_ones.enter_context(closing(batches.jobs(first_step, ahead)))
        made: Generator[Batch, None, None] = (batches(job) for job in jobs)
        if processes:
            # Files are still read in this process, each part of them once for all batches that it is in.
            made = helped(
                batches,
                jobs,
                processes=min(processes, remaining),
                each=2,
                who="a loader process",
                remedy="if it happens again, give fewer --loader-processes or a smaller --stream-window",
            )
        if pin:
            made = _pinned(made)
        if pin or not processes:
            made = _one_ahead(made)
        for batch in open_ones.enter_context(closing(made)):
            for problem in batch.replaced:
                bad += 1
                if bad <= REPORTED:
                    logger.warning("bad image: %s", problem)
            yield batch
    if bad:
        logger.warning("%d bad images were skipped in this pass", bad)


def _pinned(made: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    with closing(made):
        for batch in made:
            yield batch.pin_memory()


def _one_ahead(made: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """Each batch, the next one being made by a thread while the caller uses this one."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    coming: Future[Batch | None] = pool.submit(next, made, None)
    try:
        while (ready := coming.result()) is not None:
            coming = pool.submit(next, made, None)
            yield ready
    finally:
        # Also runs when the generator is dropped half-way: the batch in the making is waited for, then the
        # thread ends.
        del coming  # its error's traceback knows this frame
        try:
            pool.shutdown(wait=True, cancel_futures=True)
        finally:
            made.close()
