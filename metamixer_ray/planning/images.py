"""How many images a training sees, in which batches: known for the named sets, so that a plan downloads nothing."""

from dataclasses import dataclass

import torch

from metamixer_ray.config import TrainConfig
from metamixer_ray.data import BatchOrder, load_splits, wants_quadruples
from metamixer_ray.errors import ConfigError
from metamixer_ray.mixing import build_mixer
from metamixer_ray.preparation import batch_order, part_of


@dataclass(frozen=True, kw_only=True)
class ImageCounts:
    """A data set as far as a plan needs it."""

    train: int
    """Training images, before anything is cut off."""
    test: int
    """Test images."""
    classes: int
    """Number of classes."""
    size: int
    """Side of the images in pixels."""


# Taken to have equally many images of each class. Only svhn hasn't, and may have a step more or less for it.
NAMED: dict[str, ImageCounts] = {
    "cifar10": ImageCounts(train=50_000, test=10_000, classes=10, size=32),
    "cifar100": ImageCounts(train=50_000, test=10_000, classes=100, size=32),
    "fashion-mnist": ImageCounts(train=60_000, test=10_000, classes=10, size=28),
    "svhn": ImageCounts(train=73_257, test=26_032, classes=10, size=32),
    "stl10": ImageCounts(train=5_000, test=8_000, classes=10, size=96),
    "imagenet": ImageCounts(train=1_281_167, test=50_000, classes=1000, size=224),
}


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one worker sees in an epoch."""

    data: str
    """The data in words."""
    classes: int
    size: int
    """Side of the images in pixels."""
    rows: tuple[int, ...]
    """Per step, the images of one worker."""
    evaluated: int
    """Images of an evaluation between epochs, over all replicas."""
    tested: int
    """Images that are looked at once more, after the last epoch."""


def epoch_of(config: TrainConfig, *, images: int | None, classes: int | None) -> Epoch:
    """The epoch of this training: from ``images`` and ``classes`` if given, else from what is known of a named set,
    else from the data itself.

    Raises:
        ConfigError: numbers that can't be, or that don't suffice; a batch size that doesn't divide.
        DataError: data that can't be read.
    """
    data = config.dataset
    if images is None and classes is None:
        known = NAMED.get(data.data)
        if known is None:
            return _epoch_of_data(config)
        return _epoch_of_counts(config, known, data.data)
    if images is None or classes is None or data.image_size is None:
        raise ConfigError(
            "--images and --classes describe data that isn't here, and need each other and --image-size: "
            "for example --images 1281167 --classes 1000 --image-size 224"
        )
    if classes < 2 or images < 2 * classes:
        raise ConfigError(
            f"--images {images} --classes {classes}: give at least two classes, and two images of each class"
        )
    counts = ImageCounts(train=images, test=0, classes=classes, size=data.image_size)
    return _epoch_of_counts(config, counts, "given, without evaluations")


def _epoch_of_data(config: TrainConfig) -> Epoch:
    splits = part_of(config, load_splits(config.dataset), peer=0)
    watched = splits.test if splits.validation is None else splits.validation
    return Epoch(
        data=splits.description,
        classes=len(splits.classes),
        size=splits.train.image_size,
        rows=_rows(batch_order(config, splits)),
        evaluated=len(watched),
        tested=0 if splits.validation is None else len(splits.test),
    )


def _epoch_of_counts(config: TrainConfig, counts: ImageCounts, name: str) -> Epoch:
    data = config.dataset
    validation = round(data.validation_fraction * counts.train)
    count = counts.train - validation
    if count < 2 * counts.classes:
        raise ConfigError(
            f"--validation-fraction {data.validation_fraction}: it leaves {count} images of {counts.classes} classes "
            "to learn from; give a smaller share"
        )
    if data.train_limit is not None:
        if not 2 * counts.classes <= data.train_limit <= count:
            raise ConfigError(
                f"--train-limit {data.train_limit}: give between {2 * counts.classes} (two for each of the "
                f"{counts.classes} classes) and {count} (all there are)"
            )
        count = data.train_limit
    if config.distillation.disjoint_data:
        each = count // counts.classes // len(config.peers)
        if each == 0:
            raise ConfigError(
                f"--disjoint-data: {count} training images of {counts.classes} classes are less than one of each class "
                f"for each of {len(config.peers)} peers; give a larger --train-limit or a smaller "
                "--validation-fraction, or train fewer peers"
            )
        count = each * counts.classes
    size = data.image_size or counts.size
    order = BatchOrder(
        torch.arange(count) % counts.classes,
        batch_size=config.batch_size,
        replicas=config.placement.replicas,
        quadruples=wants_quadruples(data, organised=build_mixer(config.mixing).organised),
        seed=config.seed,
    )
    return Epoch(
        data=f"{name}: {count:,} training images of {size} x {size} pixels, {counts.classes} classes",
        classes=counts.classes,
        size=size,
        rows=_rows(order),
        evaluated=validation or counts.test,
        tested=counts.test if validation else 0,
    )


def _rows(order: BatchOrder) -> tuple[int, ...]:
    return tuple(len(batch) // order.replicas for batch in order.epoch(0))
