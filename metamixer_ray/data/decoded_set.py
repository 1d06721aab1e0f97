"""Decoded images, which may be a selection from a memory-mapped file."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metamixer_ray.data import augmentation
from metamixer_ray.data.arrow_file import map_arrow
from metamixer_ray.data.config import Augment
from metamixer_ray.data.image_set import ImageSet, Made
from metamixer_ray.errors import DataError


class DecodedSet(ImageSet):
    """N decoded images with their labels.

    A selection (a training set less its validation split, a low-data subset) keeps the whole memory map and a
    list of its rows, so however many processes and selections there are, the pixels exist once per node.
    ``take`` is the way to read images; ``images`` gathers all of them, which copies unless the set is
    everything there is.

    Sent to another process of the node, a mapped set travels as its file name.

    Attributes:
        labels: int64 [N].
    """

    def __init__(self, images: Tensor, labels: Tensor, rows: Tensor | None = None, *, file: Path | None = None) -> None:
        """
        Args:
            images: uint8 [M, 3, H, W].
            labels: int64 [N], of the selected rows.
            rows: int64 [N], where in ``images`` each image of the set is; None when the set is all of them (N
                = M).
            file: the prepared file that ``images`` is mapped from, if it is.

        Raises:
            ValueError: shapes or dtypes that don't fit together.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}")
        count = len(images) if rows is None else len(rows)
        if labels.dtype != torch.int64 or labels.shape != (count,):
            raise ValueError(f"labels must be int64 [{count}], not {labels.dtype} {list(labels.shape)}")
        self._images = images
        self._rows = rows
        self._file = file
        self.labels = labels

    @property
    def images(self) -> Tensor:
        """uint8 [N, 3, H, W]: the memory map itself, or a copy where the set is a selection. Never write to
        it."""
        return self._images if self._rows is None else self._images[self._rows]

    @property
    def image_size(self) -> int:
        return int(self._images.shape[-1])

    def take(self, indices: Tensor) -> Tensor:
        # Many times as fast as indexing.
        return self._images.index_select(0, indices if self._rows is None else self._rows[indices])

    def select(self, indices: Tensor) -> DecodedSet:
        """The set of some images only, without copying one."""
        rows = indices if self._rows is None else self._rows[indices]
        return DecodedSet(self._images, self.labels[indices], rows, file=self._file)

    def fetch(self, parts: Sequence[NDArray[np.int64]], *, ahead: int) -> Generator[None, None, None]:
        """Nothing: every process of the node sees the memory map."""
        yield from (None for _ in parts)

    def make(
        self, indices: NDArray[np.int64], fetched: Any, augment: Augment, draws: augmentation.Draws | None
    ) -> Made:
        chosen = torch.from_numpy(indices)
        images = self.take(chosen)
        return Made(images if draws is None else augmentation.apply(images, draws, augment), chosen)

    def __reduce__(self) -> tuple[object, ...]:
        if self._file is None:
            return DecodedSet, (self._images, self.labels, self._rows)
        return _reopen, (str(self._file), self.labels, self._rows)


def _reopen(file: str, labels: Tensor, rows: Tensor | None) -> DecodedSet:
    try:
        images = map_arrow(Path(file)).images
    except OSError as error:
        raise DataError(f"{file}: the prepared images are gone ({error}); start again to decode them anew") from error
    return DecodedSet(images, labels, rows, file=Path(file))
