"""Batches for training and evaluation, the same whoever prepares them and in how many processes."""

import math
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metamixer_ray.data import augmentation
from metamixer_ray.data.config import Augment, DataConfig
from metamixer_ray.data.image_set import ImageSet
from metamixer_ray.data.sampler import BatchOrder
from metamixer_ray.data.sources import automatic_augment
from metamixer_ray.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """One replica's rows of one step.

    Attributes:
        images: uint8 [b, 3, H, W], augmented.
        labels: int64 [b].
        indices: int64 [b], positions in the image set.
        step: 0-based, within the epoch.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    step: int


class _Steps(Dataset[Batch]):
    """The batches of one replica and epoch, by step."""

    def __init__(
        self,
        images: ImageSet,
        batches: list[NDArray[np.int64]],
        augment: Augment,
        *,
        seed: int,
        epoch: int,
        replica: int,
        replicas: int,
    ) -> None:
        self.images = images
        self.batches = batches
        self.augment = augment
        self.seed = seed
        self.epoch = epoch
        self.replica = replica
        self.replicas = replicas

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        whole = self.batches[step]
        share = len(whole) // self.replicas
        rows = slice(self.replica * share, (self.replica + 1) * share)
        draws = augmentation.draw(
            self.augment,
            size=self.images.image_size,
            rows=len(whole),
            seed=self.seed,
            epoch=self.epoch,
            step=step,
        )
        indices = torch.from_numpy(whole[rows])
        images = augmentation.apply(self.images.take(indices), draws.part(rows), self.augment)
        return Batch(images, self.images.labels[indices], indices, step)


def train_batches(
    images: ImageSet,
    order: BatchOrder,
    config: DataConfig,
    *,
    seed: int,
    epoch: int,
    replica: int,
    first_step: int = 0,
) -> Iterator[Batch]:
    """The training batches of one epoch for one replica, from ``first_step`` on.

    A pure function of (images, order, augmentation, seed, epoch, replica): neither ``loader_processes`` nor
    ``first_step`` changes a batch, and torch's global random state isn't touched. Closing or dropping the
    iterator ends its threads and processes.

    Raises:
        ConfigError: ``replica`` isn't one of the order's.
        ValueError: the order was made for another number of images.
    """
    if not 0 <= replica < order.replicas:
        raise ConfigError(f"replica {replica} of {order.replicas}: --replicas and the number of workers disagree")
    if len(order.labels) != len(images):
        raise ValueError(f"the order is for {len(order.labels)} images, but the set has {len(images)}")
    augment = cast(Augment, automatic_augment(config.data)) if config.augment == "auto" else config.augment
    steps = _Steps(
        images,
        order.epoch(epoch),
        augment,
        seed=seed,
        epoch=epoch,
        replica=replica,
        replicas=order.replicas,
    )
    wanted = range(first_step, len(steps))
    if config.loader_processes == 0:
        return _ahead(steps.__getitem__, wanted)
    return _from_processes(steps, wanted, config.loader_processes)


def eval_batches(images: ImageSet, *, batch_size: int, replica: int, replicas: int) -> Iterator[Batch]:
    """One replica's share of a set in fixed order, not augmented: rows ``replica``, ``replica + replicas``,
    ...

    Every image comes once over all replicas; nothing is repeated or dropped. The last batch may be smaller.
    All replicas have the same number of batches, so that collectives in an evaluation loop stay in step,
    except when ``batch_size`` is 1 or there are fewer images than replicas.

    Args:
        batch_size: rows per replica and step.
    """
    share = np.arange(replica, len(images), replicas, dtype=np.int64)
    steps = math.ceil(math.ceil(len(images) / replicas) / batch_size)
    starts = np.arange(1, steps) * batch_size
    if len(share):
        # A share that is one row shorter than others might lack their last batch: it gets its last row as
        # one.
        starts = np.minimum(starts, len(share) - 1)
    cuts = [cut for cut in np.split(share, starts) if len(cut)]

    def batch(step: int) -> Batch:
        indices = torch.from_numpy(cuts[step])
        return Batch(images.take(indices), images.labels[indices], indices, step)

    return _ahead(batch, range(len(cuts)))


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(images / 255 - mean) / std`` per channel, on the device of ``images``.

    Args:
        images: uint8 [b, 3, H, W].
        mean, std: three values each, of images scaled to 0..1.

    Returns:
        float32 [b, 3, H, W].
    """
    centre = torch.tensor(mean, dtype=torch.float32, device=images.device).mul(255).view(1, -1, 1, 1)
    spread = torch.tensor(std, dtype=torch.float32, device=images.device).mul(255).view(1, -1, 1, 1)
    return images.to(torch.float32).sub_(centre).div_(spread)


def _ahead(make: Callable[[int], Batch], steps: range) -> Generator[Batch, None, None]:
    """``make(step)`` for each step, the next one being made by a thread while the caller uses this one."""
    if not steps:
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        coming: Future[Batch] = pool.submit(make, steps[0])
        for following in steps[1:]:
            ready = coming.result()
            coming = pool.submit(make, following)
            yield ready
        yield coming.result()
    finally:
        # Also runs when the generator is dropped half-way: the batch in the making is waited for, then the
        # thread ends.
        pool.shutdown(wait=True, cancel_futures=True)


def _from_processes(steps: _Steps, wanted: range, processes: int) -> Generator[Batch, None, None]:
    if not wanted:
        return
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=wanted,
        num_workers=min(processes, len(wanted)),
        collate_fn=_as_it_is,
        # Without its own generator a DataLoader draws a seed from torch's global one, and dropout would
        # follow.
        generator=torch.Generator(),
        # fork shares the memory map and the order at no cost; elsewhere than on Linux it isn't safe.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    yield from loader


def _as_it_is(batch: Any) -> Any:
    return batch
