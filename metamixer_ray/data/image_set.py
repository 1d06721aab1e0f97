"""A set of labelled images, which may be a selection from a memory-mapped file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from metamixer_ray.data.arrow_file import map_arrow
from metamixer_ray.errors import DataError


class ImageSet:
    """N images with their labels.

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

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """uint8 [N, 3, H, W]: the memory map itself, or a copy where the set is a selection. Never write to
        it."""
        return self._images if self._rows is None else self._images[self._rows]

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return int(self._images.shape[-1])

    def take(self, indices: Tensor) -> Tensor:
        """Copies of the images at int64 [b] ``indices`` of this set: uint8 [b, 3, H, W]."""
        return self._images[indices if self._rows is None else self._rows[indices]]

    def select(self, indices: Tensor) -> ImageSet:
        """The set of the images at int64 [k] ``indices``, without copying one."""
        rows = indices if self._rows is None else self._rows[indices]
        return ImageSet(self._images, self.labels[indices], rows, file=self._file)

    def __reduce__(self) -> tuple[object, ...]:
        if self._file is None:
            return ImageSet, (self._images, self.labels, self._rows)
        return _reopen, (str(self._file), self.labels, self._rows)


def _reopen(file: str, labels: Tensor, rows: Tensor | None) -> ImageSet:
    try:
        images = map_arrow(Path(file)).images
    except OSError as error:
        raise DataError(f"{file}: the prepared images are gone ({error}); start again to decode them anew") from error
    return ImageSet(images, labels, rows, file=Path(file))
