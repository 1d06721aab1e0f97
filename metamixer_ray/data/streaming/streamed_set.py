"""Labelled images that stay in their Parquet files and are read and decoded when a batch needs them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metamixer_ray.data import augmentation, cropping
from metamixer_ray.data.config import Augment
from metamixer_ray.data.decoding import attempt, strict_pillow, to_rgb
from metamixer_ray.data.image_set import ImageSet, Made
from metamixer_ray.data.labels import bad_row
from metamixer_ray.data.streaming.feed import Feed
from metamixer_ray.data.streaming.index import PartIndex
from metamixer_ray.data.streaming.row_groups import RowGroups
from metamixer_ray.data.windows import Layout
from metamixer_ray.errors import DataError

Ints = NDArray[np.int64]
Encoded = list[bytes | None]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How images are read.

    Attributes:
        size: side in pixels.
        resized: whether training takes resized crops, so that evaluation takes the usual share of the centre;
            otherwise evaluation takes the largest centred square, as decoded sets do.
        skip: whether bad images are tolerated.
        window: images that are shuffled together.
        processes: that evaluation may use.
    """

    size: int
    resized: bool
    skip: bool
    window: int
    processes: int


class StreamedSet(ImageSet):
    """N images of one part.

    Bad images, where they are to be skipped: in training another image takes the place of a bad one, with the place's
    own crop: the next one of its class in the replica's rows of the batch, which in a quadruple there always is unless
    both are bad; failing that the next one of any class, with its label. So batches keep their size, and all peers
    see the same. In evaluation a bad image is left out, and ``take`` gives a black one.
    """

    def __init__(self, index: PartIndex, row_groups: RowGroups, rows: Ints, how: Reading) -> None:
        """
        Args:
            index: of the part.
            row_groups: reads the part's files.
            rows: int64 [N], which rows of the part belong to the set.
            how: images are read.
        """
        self._index = index
        self._row_groups = row_groups
        self._rows = rows
        self._how = how
        self.labels = torch.from_numpy(index.labels[rows])
        self.layout: Layout = Layout(index.group_of(rows), how.window)
        self.own_processes = how.processes

    @property
    def image_size(self) -> int:
        return self._how.size

    def select(self, indices: Tensor) -> StreamedSet:
        return StreamedSet(self._index, self._row_groups, self._rows[indices.numpy()], self._how)

    def take(self, indices: Tensor) -> Tensor:
        (encoded,) = self.fetch([indices.numpy()], ahead=0)
        images = self._empty(len(indices)).zero_()
        with strict_pillow():
            for row, raw in enumerate(encoded):
                image, problem = attempt(self._evaluated, raw)
                if image is None and not self._how.skip:
                    raise bad_row(self.place(int(indices[row])), problem or "no image")
                if image is not None:
                    images[row] = image
        return images

    def place(self, index: int) -> str:
        """Where an image is, as an error message names it."""
        group = self.layout.groups[index]
        row = self._index.first_in_file[group] + self._rows[index] - self._index.first[group]
        return f"{self._row_groups.files[self._index.in_file[group]].shown}, row {row}"

    def feed(self, parts: Sequence[Ints], *, ahead: int) -> Feed:
        """The encoded images of ``parts``, see :class:`Feed`."""
        index = self._index

        def read(group: int, images: Ints, wait: Callable[[float], object]) -> Encoded:
            rows = self._rows[images] - index.first[group]
            file, number = int(index.in_file[group]), int(index.number[group])
            return self._row_groups.read(file, number, rows, wait)

        return Feed(parts, self.layout.groups, read, ahead=ahead)

    def fetch(self, parts: Sequence[Ints], *, ahead: int) -> Generator[Encoded, None, None]:
        return iter(self.feed(parts, ahead=ahead))

    def make(self, indices: Ints, fetched: Encoded, augment: Augment, draws: augmentation.Draws | None) -> Made:
        images = self._empty(len(indices))
        problems: dict[int, str] = {}
        with strict_pillow():
            for row, raw in enumerate(fetched):
                image, problem = attempt(self._decoder(row, draws), raw)
                if image is None:
                    problems[row] = problem or "no image"
                else:
                    images[row] = image
            replaced = self._describe(indices, problems)
            if problems and draws is None:
                shown = np.delete(np.arange(len(indices)), list(problems))
                images, indices = images[torch.from_numpy(shown)], indices[shown]
            elif problems:
                shown = np.arange(len(indices))
                for row in problems:
                    shown[row] = stand_in(row, self.labels.numpy()[indices], problems)
                    again, _ = attempt(self._decoder(row, draws), fetched[shown[row]])
                    assert again is not None, "this image could be decoded before"
                    images[row] = again
                indices = indices[shown]
        if draws is not None and draws.resized:
            images = augmentation.operate_all(images, draws, augment)
        elif draws is not None:
            images = augmentation.apply(images, draws, augment)
        return Made(images, torch.from_numpy(indices), replaced)

    def _empty(self, count: int) -> Tensor:
        # Pixel by pixel in memory, as decoders write and convolutions read them.
        shape = (count, 3, self._how.size, self._how.size)
        return torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)

    def _decoder(self, row: int, draws: augmentation.Draws | None) -> Callable[[bytes], Tensor]:
        if draws is None:
            return self._evaluated
        if not draws.resized:
            return self._whole
        return partial(self._random_part, numbers=draws.boxes[row], mirrored=bool(draws.mirrored[row]))

    def _random_part(self, encoded: bytes, *, numbers: NDArray[np.float64], mirrored: bool) -> Tensor:
        part = cropping.decode_box(encoded, partial(cropping.random_box, numbers), self._how.size)
        return part.flip(-1) if mirrored else part

    def _evaluated(self, encoded: bytes) -> Tensor:
        if not self._how.resized:
            return self._whole(encoded)
        return cropping.decode_box(encoded, cropping.evaluation_box, self._how.size)

    def _whole(self, encoded: bytes) -> Tensor:
        return torch.from_numpy(to_rgb(encoded, self._how.size))

    def _describe(self, indices: Ints, problems: dict[int, str]) -> tuple[str, ...]:
        """Place and problem of each bad row; an error if there should be none, or no good one is left."""
        places = [self.place(int(indices[row])) for row in problems]
        if places and not self._how.skip:
            raise bad_row(places[0], next(iter(problems.values())))
        described = tuple(f"{place}: {problem}" for place, problem in zip(places, problems.values(), strict=True))
        if places and len(places) == len(indices):
            raise DataError(f"none of the {len(indices)} images of a batch can be used; the first: {described[0]}")
        return described


def stand_in(row: int, labels: Ints, bad: dict[int, str]) -> int:
    """The row that takes the place of a bad one: the next good one of its class, else the next good one, from the end
    on to the beginning."""
    others = [(row + step) % len(labels) for step in range(1, len(labels))]
    good = [other for other in others if other not in bad]
    return next((other for other in good if labels[other] == labels[row]), good[0])
