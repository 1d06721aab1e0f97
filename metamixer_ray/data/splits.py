"""From a source's name to the three splits that a training uses."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from metamixer_ray.data.arrow_file import MappedSplit
from metamixer_ray.data.augmentation import OPERATING
from metamixer_ray.data.cache import FORMAT_VERSION, cache_folder, fingerprint, prepare
from metamixer_ray.data.config import DataConfig
from metamixer_ray.data.decoded_set import DecodedSet
from metamixer_ray.data.image_set import ImageSet
from metamixer_ray.data.sources import Source, open_source, resolve_augment
from metamixer_ray.data.sources.base import Split
from metamixer_ray.data.stratify import allocate, choose
from metamixer_ray.data.streaming import (
    PartIndex,
    Reading,
    RowGroups,
    StreamedSet,
    check_memory,
    is_streamed,
    read_index,
)
from metamixer_ray.errors import ConfigError, DataError
from metamixer_ray.randomness import numpy_generator


@dataclass(frozen=True)
class Splits:
    """What a training learns from and is measured on.

    Attributes:
        validation: cut from the training set; None when --validation-fraction is 0.
        classes: names in label order.
        mean, std: per channel, of the whole training part with values scaled to 0..1: exact sums, rounded
            once; of a streamed set, of a sample of images that is always the same. They don't depend on
            --validation-fraction or --train-limit. A channel that never varies has std 1.
        skipped: rows left out by --on-bad-image skip, over both parts; of a streamed set only those without a
            valid label, since its images are decoded later.
        fingerprint: 32 hexadecimal digits of the pixels, the labels and the selection: equal on every node
            and after fetching the same files again. Of a streamed set, instead of the pixels, of the files'
            names in their folder and sizes, and the row groups' rows and sizes: it is not told from one that
            agrees in all of these and in the labels.
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

    def watched(self, *, tested: bool) -> ImageSet:
        """What may be looked at: the test set where it is ``tested``, else the validation split."""
        return self.test if tested or self.validation is None else self.validation


@dataclass(frozen=True)
class _Parts:
    """A source's two parts, whole; the rest as in :class:`Splits`."""

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: int
    digests: tuple[str, ...]
    note: str = ""


def load_splits(config: DataConfig, *, processes: int = 1, scored_only: bool = False) -> Splits:
    """Open and split the data that ``config`` names; decode it if this node hasn't yet, unless it is streamed.

    The validation split is cut first, from the whole training part and in proportion to its classes;
    ``train_limit`` then chooses among what is left, also in proportion, with at least two images of a class
    that has two. Both depend on ``split_seed`` alone, so a low-data study of any size is measured on one
    validation split, and its training sets of growing size are nested as far as rounding allows.

    Args:
        config: all about the data.
        processes: how many processes may decode a large set.
        scored_only: nothing is to be trained on; files and folders then need no training part.

    Raises:
        ConfigError: an option that cannot work with this data.
        DataError: a file, row or download that cannot be used.
    """
    folder = cache_folder(config.cache_dir)
    source = open_source(config, folder, scored_only=scored_only)
    if is_streamed(config, source):
        parts = _streamed(config, source, folder)
    else:
        parts = _decoded(config, source, folder, processes)
    labels = parts.train.labels.numpy()
    if not scored_only and len(np.unique(labels)) < 2:
        raise DataError(
            f"--data {config.data}: the training part holds images of one class only; there is nothing to tell apart"
        )
    train_rows, validation_rows = _select(labels, config)
    kept = parts.train if train_rows is None else parts.train.select(torch.from_numpy(train_rows))
    validation = None if validation_rows is None else parts.train.select(torch.from_numpy(validation_rows))
    return Splits(
        train=kept,
        validation=validation,
        test=parts.test,
        classes=parts.classes,
        mean=parts.mean,
        std=parts.std,
        skipped=parts.skipped,
        fingerprint=fingerprint(*parts.digests, [config.validation_fraction, config.train_limit, config.split_seed]),
        description=_describe(source.name, kept, validation, parts),
    )


def _decoded(config: DataConfig, source: Source, folder: Path, processes: int) -> _Parts:
    size = config.image_size or source.image_size
    columns = [config.image_column, config.label_column]
    key = fingerprint(FORMAT_VERSION, source.identity, size, columns, config.on_bad_image)
    train, test = prepare(source, folder, key=key, size=size, on_bad_image=config.on_bad_image, processes=processes)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"--data {config.data}: training images have {train.images.shape[-1]} pixels a side, test images "
            f"{test.images.shape[-1]}; give --image-size N to bring all images to N x N"
        )

    def whole(split: MappedSplit) -> ImageSet:
        return DecodedSet(split.images, split.labels, file=split.path)

    return _Parts(
        whole(train),
        whole(test),
        classes=tuple(train.facts["classes"]),
        mean=tuple(train.facts["mean"]),
        std=tuple(train.facts["std"]),
        skipped=int(train.facts["skipped"]) + int(test.facts["skipped"]),
        digests=(train.facts["digest"], test.facts["digest"]),
    )


def _streamed(config: DataConfig, source: Source, folder: Path) -> _Parts:
    assert source.parquet is not None
    assert config.image_size is not None
    columns = [config.image_column, config.label_column]
    key = fingerprint("stream", FORMAT_VERSION, source.identity, config.image_size, columns, config.on_bad_image)
    train, test = read_index(config, source, folder, key=key, size=config.image_size)
    how = Reading(
        size=config.image_size,
        resized=resolve_augment(config, streamed=True) in ("resized-crop", *OPERATING),
        skip=config.on_bad_image == "skip",
        window=config.stream_window,
        processes=config.loader_processes,
    )

    def whole(index: PartIndex, split: Split) -> ImageSet:
        assert source.parquet is not None
        return StreamedSet(index, RowGroups(source.parquet[split], index.facts["image"]), index.usable, how)

    held = check_memory(train, config.stream_window)
    return _Parts(
        whole(train, "train"),
        whole(test, "test"),
        classes=tuple(train.facts["classes"]),
        mean=tuple(train.facts["mean"]),
        std=tuple(train.facts["std"]),
        skipped=int(train.facts["skipped"]) + int(test.facts["skipped"]),
        digests=("stream", train.facts["digest"], test.facts["digest"]),
        note=f", streamed with up to {held / 1e9:.1f} GB of encoded images in a worker's memory",
    )


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


def _describe(name: str, train: ImageSet, validation: ImageSet | None, parts: _Parts) -> str:
    counts = [f"{len(train)} training"]
    if validation is not None:
        counts.append(f"{len(validation)} validation")
    counts.append(f"{len(parts.test)} test")
    size = train.image_size
    left_out = f", {parts.skipped} bad ones left out" if parts.skipped else ""
    return (
        f"{name}: {', '.join(counts)} images of {size} x {size} pixels, {len(parts.classes)} classes"
        f"{left_out}{parts.note}"
    )
