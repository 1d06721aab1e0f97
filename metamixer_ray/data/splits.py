"""From a source's name to the three splits that a training uses."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from metamixer_ray.data.arrow_file import MappedSplit
from metamixer_ray.data.cache import FORMAT_VERSION, cache_folder, fingerprint, prepare
from metamixer_ray.data.config import DataConfig
from metamixer_ray.data.image_set import ImageSet
from metamixer_ray.data.sources import open_source
from metamixer_ray.data.stratify import allocate, choose
from metamixer_ray.errors import ConfigError, DataError
from metamixer_ray.randomness import numpy_generator


@dataclass(frozen=True)
class Splits:
    """What a training learns from and is measured on.

    Attributes:
        validation: cut from the training set; None when --validation-fraction is 0.
        classes: names in label order.
        mean, std: per channel, of the whole training part with values scaled to 0..1: exact sums, rounded
            once. They don't depend on --validation-fraction or --train-limit. A channel that never varies has
            std 1.
        skipped: rows left out by --on-bad-image skip, over both parts.
        fingerprint: 32 hexadecimal digits of the pixels, the labels and the selection: equal on every node
            and after fetching the same files again.
        description: one line for people.
    """

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: int
    fingerprint: str
    description: str


def load_splits(config: DataConfig, *, processes: int = 1) -> Splits:
    """Open, decode if this node hasn't yet, and split the data that ``config`` names.

    The validation split is cut first, from the whole training part and in proportion to its classes;
    ``train_limit`` then chooses among what is left, also in proportion, with at least two images of a class
    that has two. Both depend on ``split_seed`` alone, so a low-data study of any size is measured on one
    validation split, and its training sets of growing size are nested as far as rounding allows.

    Args:
        config: all about the data.
        processes: how many processes may decode a large set.

    Raises:
        ConfigError: an option that cannot work with this data.
        DataError: a file, row or download that cannot be used.
    """
    folder = cache_folder(config.cache_dir)
    source = open_source(config, folder)
    size = config.image_size or source.image_size
    columns = [config.image_column, config.label_column]
    key = fingerprint(FORMAT_VERSION, source.identity, size, columns, config.on_bad_image)
    train, test = prepare(source, folder, key=key, size=size, on_bad_image=config.on_bad_image, processes=processes)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"--data {config.data}: training images have {train.images.shape[-1]} pixels a side, test images "
            f"{test.images.shape[-1]}; give --image-size N to bring all images to N x N"
        )
    classes = tuple(train.facts["classes"])
    labels = train.labels.numpy()
    if len(np.unique(labels)) < 2:
        raise DataError(
            f"--data {config.data}: the training part holds images of one class only; there is nothing to tell apart"
        )
    train_rows, validation_rows = _select(labels, config)
    whole = _image_set(train)
    skipped = int(train.facts["skipped"]) + int(test.facts["skipped"])
    kept = whole if train_rows is None else whole.select(torch.from_numpy(train_rows))
    validation = None if validation_rows is None else whole.select(torch.from_numpy(validation_rows))
    return Splits(
        train=kept,
        validation=validation,
        test=_image_set(test),
        classes=classes,
        mean=tuple(train.facts["mean"]),
        std=tuple(train.facts["std"]),
        skipped=skipped,
        fingerprint=fingerprint(
            train.facts["digest"],
            test.facts["digest"],
            [config.validation_fraction, config.train_limit, config.split_seed],
        ),
        description=_describe(source.name, kept, validation, test, len(classes), skipped),
    )


def _image_set(split: MappedSplit) -> ImageSet:
    return ImageSet(split.images, split.labels, file=split.path)


def _select(labels: NDArray[np.int64], config: DataConfig) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """Rows for training and validation, ascending; None for all, and for none."""
    free = np.ones(len(labels), dtype=np.bool_)
    validation_rows = None
    if config.validation_fraction > 0:
        counts = np.bincount(labels)
        wanted = round(config.validation_fraction * len(labels))
        # Each class keeps an image to learn from.
        most = np.maximum(counts - 1, 0)
        if not 1 <= wanted <= most.sum():
            raise ConfigError(
                f"--validation-fraction {config.validation_fraction}: {wanted} of {len(labels)} training "
                f"images cannot be cut off; between 1 and {most.sum()} can, so that each class keeps one to "
                "learn from"
            )
        per_class = allocate(counts, wanted, least=np.zeros_like(counts), most=most)
        chosen = choose(labels, per_class, numpy_generator(config.split_seed, "validation"))
        validation_rows = np.flatnonzero(chosen)
        free = ~chosen
    if config.train_limit is None:
        return (None if validation_rows is None else np.flatnonzero(free)), validation_rows
    rows = np.flatnonzero(free)
    counts = np.bincount(labels[rows])
    classes = int((counts > 0).sum())
    if not 2 * classes <= config.train_limit <= len(rows):
        cut = "" if validation_rows is None else f" after {len(validation_rows)} went to the validation split"
        if 2 * classes > len(rows):
            raise ConfigError(
                f"--train-limit {config.train_limit}: only {len(rows)} images are there{cut}; leave it out"
            )
        raise ConfigError(
            f"--train-limit {config.train_limit}: give between {2 * classes} (two for each of the {classes} "
            f"classes) and {len(rows)} (all there are{cut})"
        )
    per_class = allocate(counts, config.train_limit, least=np.minimum(counts, 2), most=counts)
    chosen = choose(labels[rows], per_class, numpy_generator(config.split_seed, "train-limit"))
    return rows[chosen], validation_rows


def _describe(
    name: str, train: ImageSet, validation: ImageSet | None, test: MappedSplit, classes: int, skipped: int
) -> str:
    parts = [f"{len(train)} training"]
    if validation is not None:
        parts.append(f"{len(validation)} validation")
    parts.append(f"{len(test.labels)} test")
    size = train.image_size
    left_out = f", {skipped} bad ones left out" if skipped else ""
    return f"{name}: {', '.join(parts)} images of {size} x {size} pixels, {classes} classes{left_out}"
