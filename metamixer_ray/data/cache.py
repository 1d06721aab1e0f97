"""Decoding a source once per node: the cache folder, its fingerprint, its lock."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray

from metamixer_ray.data.arrow_file import MappedSplit, map_arrow, write_arrow
from metamixer_ray.data.channel_sums import ChannelSums
from metamixer_ray.data.decoding import decode_all
from metamixer_ray.data.labels import (
    OnBadImage,
    bad_row,
    check_same_classes,
    label_problem,
    missing_labels_hint,
    no_images,
    numbered_classes,
)
from metamixer_ray.data.sources.base import Part, Source, Split
from metamixer_ray.errors import ConfigError, DataError, UserError

logger = logging.getLogger(__name__)

# Change it whenever decoding, resizing or the file's layout changes: older caches are then never read.
FORMAT_VERSION = 1
REPORTED = 5


def cache_folder(cache_dir: str | None) -> Path:
    """The folder for prepared images: ``cache_dir``, else $METAMIXER_CACHE, else ~/.cache/metamixer_ray."""
    return Path(
        os.path.expanduser(cache_dir or os.environ.get("METAMIXER_CACHE") or "~/.cache/metamixer_ray")
    ).absolute()


def fingerprint(*facts: Any) -> str:
    """32 hexadecimal digits that differ when any of the JSON-able ``facts`` does."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def place_of(folder: Path, source: Source, key: str) -> Path:
    """The folder for what is prepared of ``source`` under ``key``."""
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', source.name)[:60]}-{key[:20]}"


def prepare(
    source: Source, folder: Path, *, key: str, size: int | None, on_bad_image: OnBadImage, processes: int
) -> tuple[MappedSplit, MappedSplit]:
    """The decoded training and test images of ``source``, mapped from ``folder`` and decoded first if need
    be.

    Of several processes that ask for the same ``key``, one decodes and the others wait. Files appear under
    their final name only when whole, so what a killed process left is never used; it is removed by the next
    to decode.

    Raises:
        DataError: an image, a label or a file cannot be used.
        ConfigError: the cache folder cannot be written.
    """
    place = place_of(folder, source, key)
    train, test = place / "train.arrow", place / "test.arrow"
    ready = _mapped(train, key), _mapped(test, key)
    if ready[0] is not None and ready[1] is not None:
        return ready[0], ready[1]
    with writing(folder):
        place.mkdir(parents=True, exist_ok=True)
        with locked(place / "lock"):
            mapped_train = _mapped(train, key) or _decode(
                "train", source, train, key, None, size, on_bad_image, processes
            )
            classes = tuple(mapped_train.facts["classes"])
            mapped_test = _mapped(test, key) or _decode(
                "test", source, test, key, classes, size, on_bad_image, processes
            )
    return mapped_train, mapped_test


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A cache folder that cannot be written becomes a ConfigError."""
    try:
        yield
    except UserError:
        raise  # some are OSErrors, too, and tell of the data
    except OSError as error:
        room = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            there = next(place for place in (folder, *folder.parents) if place.exists())
            room = f", {in_bytes(shutil.disk_usage(there).free)} free"
        raise ConfigError(
            f"--cache-dir {folder}: decoded images cannot be kept there ({error}{room}); give a folder with room "
            "that may be written, or set METAMIXER_CACHE"
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process of the node is inside at a time."""
    lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        logger.warning("waiting for another process to prepare the images in %s", path.parent)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_room(folder: Path, decoded: int) -> None:
    """Refuse a disk that is too small before hours are spent on decoding for it.

    Args:
        decoded: bytes of the images of a split.

    Raises:
        OSError: (ENOSPC) what is needed isn't free.
    """
    # They are written one after another, then once more as the Arrow file.
    needed, free = 2 * decoded, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{in_bytes(needed)} are needed")


def in_bytes(count: int) -> str:
    """For example ``3.1 GB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def _mapped(path: Path, key: str) -> MappedSplit | None:
    try:
        mapped = map_arrow(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # Arrow and what reads it raise nearly anything on broken input
        logger.warning("%s is damaged and will be made again: %s", path, error)
        return None
    return mapped if mapped.facts.get("key") == key else None


def _decode(
    split: Split,
    source: Source,
    target: Path,
    key: str,
    classes: tuple[str, ...] | None,
    size: int | None,
    on_bad_image: OnBadImage,
    processes: int,
) -> MappedSplit:
    # The host's name keeps two nodes apart whose shared file system doesn't honour the lock.
    ours = f".{split}.{socket.gethostname()}"
    for left in target.parent.glob(f"{ours}.*"):  # by a killed process
        left.unlink(missing_ok=True)
    part = source.open(split)
    if part.rows == 0:
        raise no_images(part.where, split)
    check_same_classes(part.classes, classes, part.where)
    logger.info("decoding %d %s images of %s into %s", part.rows, split, source.name, target.parent)
    stem = f"{ours}.{os.getpid()}"
    raw, whole = target.parent / f"{stem}.raw", target.parent / f"{stem}.arrow"
    try:
        gathered = _Gathered(split, part, classes or part.classes, on_bad_image, target.parent)
        stream = decode_all(part.chunks, size=size, rows=part.rows, processes=processes)
        with open(raw, "wb") as out, closing(stream):
            for decoded in stream:
                block = gathered.add(decoded.images, decoded.labels, decoded.places, decoded.problems)
                if block is not None:
                    out.write(block.data)
        labels, shape, facts = gathered.finish()
        write_arrow(whole, raw, shape, labels, {**facts, "key": key})
        os.replace(whole, target)
    finally:
        raw.unlink(missing_ok=True)
        whole.unlink(missing_ok=True)
    return map_arrow(target)


class _Gathered:
    """Checks the rows of one split as they come, and with the first that ``folder`` has room for all, and sums up what
    the metadata says of them."""

    def __init__(
        self, split: Split, part: Part, classes: tuple[str, ...] | None, on_bad_image: OnBadImage, folder: Path
    ) -> None:
        self.split = split
        self.part = part
        self.classes = classes
        self.skip = on_bad_image == "skip"
        self.folder = folder
        self.labels: list[int] = []
        self.shape: tuple[int, int, int] | None = None
        self.first_place = ""
        self.problems: list[str] = []
        self.skipped = 0
        self.sums = ChannelSums()
        self.digest = hashlib.blake2b(digest_size=16)

    def add(
        self,
        images: list[NDArray[np.uint8] | None],
        labels: list[object],
        places: list[str],
        problems: list[str | None],
    ) -> NDArray[np.uint8] | None:
        """The usable images of a chunk as uint8 [n, 3, H, W], or None if there are none."""
        kept: list[NDArray[np.uint8]] = []
        for image, label, place, problem in zip(images, labels, places, problems, strict=True):
            problem = problem or label_problem(
                label, self.classes, hint=missing_labels_hint(self.split, any_before=bool(self.labels))
            )
            if problem is not None or image is None:
                self._bad(place, problem or "no image")
                continue
            self._check_shape(image, place)
            kept.append(image)
            self.labels.append(int(label))  # type: ignore[call-overload]
        if not kept:
            return None
        block = np.stack(kept)
        self.sums.add(block)
        self.digest.update(block.data)
        return block

    def _bad(self, place: str, problem: str) -> None:
        if not self.skip:
            raise bad_row(place, problem)
        self.skipped += 1
        if len(self.problems) < REPORTED:
            self.problems.append(f"{place}: {problem}")
            logger.warning("left out: %s: %s", place, problem)

    def _check_shape(self, image: NDArray[np.uint8], place: str) -> None:
        _, height, width = image.shape
        if self.shape is None:
            if height != width:
                raise DataError(
                    f"{place}: the image is {width} x {height} pixels, not square; give --image-size N to "
                    "bring all images to N x N"
                )
            check_room(self.folder, image.nbytes * self.part.rows)
            self.shape, self.first_place = (3, height, width), place
        elif image.shape != self.shape:
            raise DataError(
                f"{place}: the image is {width} x {height} pixels, but {self.first_place} is "
                f"{self.shape[2]} x {self.shape[1]}; give --image-size N to bring all images to N x N"
            )

    def finish(self) -> tuple[NDArray[np.int64], tuple[int, int, int], dict[str, Any]]:
        """Labels int64 [N], the images' shape, and the metadata."""
        if self.shape is None:
            raise DataError(
                f"{self.part.where}: none of the {self.skipped} {self.split} images can be used; the first: "
                f"{self.problems[0] if self.problems else 'there are none'}"
            )
        if self.skipped:
            logger.warning("%s: left out %d of %d images", self.part.where, self.skipped, self.part.rows)
        labels = np.array(self.labels, dtype=np.int64)
        self.digest.update(labels.data)
        classes = self.classes or numbered_classes(labels, self.part.where)
        facts = {
            "classes": list(classes),
            "mean": self.sums.mean(),
            "std": self.sums.std(),
            "skipped": self.skipped,
            "digest": self.digest.hexdigest(),
        }
        return labels, self.shape, facts
