"""Labels and row groups of a part, read once per node and kept as a small file in the cache folder."""

import hashlib
import json
import logging
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metamixer_ray.data.cache import REPORTED, locked, place_of, writing
from metamixer_ray.data.channel_sums import ChannelSums
from metamixer_ray.data.config import DataConfig
from metamixer_ray.data.decoding import decode_pieces
from metamixer_ray.data.labels import (
    MOST_CLASSES,
    bad_row,
    check_same_classes,
    label_problem,
    missing_labels_hint,
    no_images,
    numbered_classes,
)
from metamixer_ray.data.sources.base import Chunk, Source, Split
from metamixer_ray.data.sources.locations import RemoteFile
from metamixer_ray.data.sources.parquet import FILES_AT_A_TIME, Survey, open_file, patiently, reading, survey
from metamixer_ray.data.streaming.row_groups import RowGroups
from metamixer_ray.errors import DataError
from metamixer_ray.randomness import numpy_generator

logger = logging.getLogger(__name__)

ARRAYS = ("labels", "in_file", "number", "rows", "bytes")
SAMPLED_GROUPS = 64
SAMPLED_IMAGES = 2048

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PartIndex:
    """Where the images of a part are, and what they are.

    Attributes:
        labels: int64 [rows], -1 for a row without a valid label.
        in_file, number: int64 [G], the file of each row group, and which of the file's it is.
        rows, bytes: int64 [G], its rows, and the size of its image column.
        facts: classes, columns, skipped, digest, and for the training part mean and std.
    """

    labels: Ints
    in_file: Ints
    number: Ints
    rows: Ints
    bytes: Ints
    facts: dict[str, Any]

    def check(self) -> None:
        """Raises: Exception: the arrays don't belong together."""
        groups = [self.in_file, self.number, self.rows, self.bytes]
        whole = {array.dtype for array in (self.labels, *groups)} == {np.dtype(np.int64)}
        whole = whole and {array.shape for array in groups} == {self.rows.shape} and self.rows.min() >= 0
        if not whole or self.rows.sum() != len(self.labels) or self.labels.max() >= len(self.facts["classes"]):
            raise ValueError("its parts don't belong together")

    @property
    def first(self) -> Ints:
        """int64 [G], the first row of each row group among all rows of the part."""
        return np.cumsum(self.rows) - self.rows

    @property
    def first_in_file(self) -> Ints:
        """int64 [G], the first row of each row group in its file."""
        begins = np.flatnonzero(self.number == 0)
        return self.first - np.repeat(self.first[begins], np.diff(np.append(begins, len(self.number))))

    @property
    def usable(self) -> Ints:
        """int64 [N], the rows with a valid label."""
        return np.flatnonzero(self.labels >= 0)

    def group_of(self, rows: Ints) -> Ints:
        """The row group of each of ``rows``."""
        return np.searchsorted(self.first, rows, side="right") - 1


def read_index(config: DataConfig, source: Source, folder: Path, *, key: str, size: int) -> tuple[PartIndex, PartIndex]:
    """The index of the training and of the test part: from ``folder``, or made and kept there first.

    Mean and standard deviation are those of up to 2,048 images out of 64 random row groups of the training part
    (always the same ones), resized to ``size``.

    Raises:
        DataError: a file, a label or one of these images cannot be used.
        ConfigError: a column must be named, or the cache folder cannot be written.
    """
    assert source.parquet is not None
    place = place_of(folder, source, key)
    train, test = (_load(place / f"{split}.npz", key) for split in ("train", "test"))
    if train is not None and test is not None:
        return train, test
    with writing(folder):
        place.mkdir(parents=True, exist_ok=True)
        with locked(place / "lock"):
            train = _load(place / "train.npz", key)
            if train is None:
                logger.info("reading the labels of %s", source.name)
                train = _make("train", source.parquet["train"], config, None)
                images = RowGroups(source.parquet["train"], train.facts["image"])
                train.facts.update(_sample_statistics(train, images, size, skip=config.on_bad_image == "skip"))
                _save(place / "train.npz", train, key)
            test = _load(place / "test.npz", key)
            if test is None:
                test = _make("test", source.parquet["test"], config, tuple(train.facts["classes"]))
                _save(place / "test.npz", test, key)
    return train, test


def _make(split: Split, files: Sequence[RemoteFile], config: DataConfig, classes: tuple[str, ...] | None) -> PartIndex:
    found = survey(files, config.image_column, config.label_column)
    if found.rows == 0:
        raise no_images(found.where, split)
    check_same_classes(found.classes, classes, found.where)
    with ThreadPoolExecutor(FILES_AT_A_TIME, thread_name_prefix="labels") as pool:
        per_file = list(pool.map(lambda file: _read_labels(file, found.label), files))
    for file, column, footer in zip(files, per_file, found.footers, strict=True):
        if len(column[0]) != footer.num_rows:
            raise DataError(f"{file.shown}: the file has {len(column[0])} labels for {footer.num_rows} rows")
    values = np.concatenate([values for values, _ in per_file])
    missing = np.concatenate([missing for _, missing in per_file])
    known = classes or found.classes
    labels, skipped = _checked(split, values, missing, known, files, found, skip=config.on_bad_image == "skip")
    groups = []
    for place, (listed, footer) in enumerate(zip(files, found.footers, strict=True)):
        with reading(listed):
            groups += [(place, *group) for group in _groups(footer, found.image)]
    file, number, rows, size = np.array(groups, dtype=np.int64).T.copy()
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([[f.inner, f.size] for f in files]).encode())
    for array in (file, number, rows, size, labels):
        digest.update(array.data)
    facts = {
        "classes": list(known or numbered_classes(labels[labels >= 0], found.where)),
        "image": found.image,
        "skipped": skipped,
        "digest": digest.hexdigest(),
        "where": found.where,
    }
    return PartIndex(labels, file, number, rows, size, facts)


def _groups(footer: Any, image: str) -> list[tuple[int, int, int]]:
    """Number, rows and size of each row group."""
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != footer.num_rows:
        raise ValueError(f"its footer counts {footer.num_rows} rows, and {rows} in its row groups")
    return [(number, group.num_rows, _image_bytes(group, image)) for number, group in enumerate(groups)]


def _image_bytes(group: Any, image: str) -> int:
    columns = [group.column(i) for i in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema in (image, f"{image}.bytes"))


def _read_labels(file: RemoteFile, column: str) -> tuple[Ints, NDArray[np.bool_]]:
    """The label column of a file, and where it is null."""
    import pyarrow as pa

    def read() -> tuple[Ints, NDArray[np.bool_]]:
        # The reads of the row groups' small label columns are joined and sent at once.
        with reading(file), open_file(file, pre_buffer=True) as parquet:
            values = parquet.read(columns=[column]).column(0)
            missing = values.is_null().to_numpy()
            numbers = values.fill_null(0).cast(pa.int64(), safe=False).to_numpy()
        return numbers.astype(np.int64), missing

    return patiently(file, read)


def _checked(
    split: Split,
    values: Ints,
    missing: NDArray[np.bool_],
    classes: tuple[str, ...] | None,
    files: Sequence[RemoteFile],
    found: Survey,
    *,
    skip: bool,
) -> tuple[Ints, int]:
    """The labels with -1 for each that is no class number, and how many these are."""
    bad = missing | (values < 0) | (values >= MOST_CLASSES)
    if classes is not None:
        bad |= values >= len(classes)
    ends = np.cumsum([footer.num_rows for footer in found.footers])
    rows = np.flatnonzero(bad)
    for row in rows[: REPORTED if skip else 1].tolist():
        file = int(np.searchsorted(ends, row, side="right"))
        place = f"{files[file].shown}, row {row - (int(ends[file - 1]) if file else 0)}"
        hint = missing_labels_hint(split, any_before=not bad[:row].all())
        problem = label_problem(None if missing[row] else int(values[row]), classes, hint=hint) or "no label"
        if not skip:
            raise bad_row(place, problem)
        logger.warning("left out: %s: %s", place, problem)
    if len(rows) == len(values):
        raise DataError(f"{found.where}: none of the {len(rows)} {split} images has a label that can be used")
    return np.where(bad, -1, values), len(rows)


def _sample_statistics(index: PartIndex, images: RowGroups, size: int, *, skip: bool) -> dict[str, Any]:
    rng = numpy_generator(0, "sample for mean and std")
    groups = rng.permutation(np.unique(index.group_of(index.usable)))[:SAMPLED_GROUPS]
    of_group = index.group_of(np.arange(len(index.labels)))
    sums, last_problem, counted = ChannelSums(), "", 0
    for group in np.sort(groups).tolist():
        rows = np.flatnonzero((of_group == group) & (index.labels >= 0)) - index.first[group]
        chosen = np.sort(rng.permutation(rows)[: -(-SAMPLED_IMAGES // len(groups))])
        file, number = int(index.in_file[group]), int(index.number[group])
        encoded = images.read(file, number, chosen)
        first = int(index.first_in_file[group])
        places = [f"{images.files[file].shown}, row {first + row}" for row in chosen.tolist()]
        for decoded in decode_pieces(Chunk(list(encoded), [0] * len(encoded), places), size):
            for place, problem in zip(decoded.places, decoded.problems, strict=True):
                if problem is not None and not skip:
                    raise bad_row(place, problem)
                last_problem = f"{place}: {problem}" if problem is not None else last_problem
            good = [image for image in decoded.images if image is not None]
            if good:
                sums.add(np.stack(good))
                counted += len(good)
    if counted == 0:
        raise DataError(f"{index.facts['where']}: none of the images tried can be decoded; one of them: {last_problem}")
    return {"mean": sums.mean(), "std": sums.std()}


def _save(path: Path, index: PartIndex, key: str) -> None:
    arrays = {name: getattr(index, name) for name in ARRAYS}
    # The host's name keeps two nodes apart whose shared file system doesn't honour the lock.
    ours = f".{path.stem}.{socket.gethostname()}"
    for left in path.parent.glob(f"{ours}.*"):  # by a killed process
        left.unlink(missing_ok=True)
    whole = path.with_name(f"{ours}.{os.getpid()}.npz")
    try:
        np.savez(whole, facts=np.array(json.dumps({**index.facts, "key": key})), **arrays)
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)


def _load(path: Path, key: str) -> PartIndex | None:
    try:
        with np.load(path) as stored:
            index = PartIndex(**{name: stored[name] for name in ARRAYS}, facts=json.loads(str(stored["facts"])))
        index.check()
    except FileNotFoundError:
        return None
    except Exception as error:  # NumPy and zipfile raise nearly anything on broken input
        logger.warning("%s is damaged and will be made again: %s", path, error)
        return None
    return index if index.facts.get("key") == key else None
