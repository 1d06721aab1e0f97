"""A set of labelled images, whichever way their pixels are come by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metamixer_ray.data.augmentation import Draws
from metamixer_ray.data.config import Augment
from metamixer_ray.data.windows import Layout

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Made:
    """Images of a batch.

    Attributes:
        images: uint8 [b, 3, H, W].
        indices: int64 [b], positions in the set of what is in ``images``, which differ from those asked for where an
            image is bad.
        replaced: what was wrong with each bad one, and where.
    """

    images: Tensor
    indices: Tensor
    replaced: tuple[str, ...] = ()


class ImageSet(ABC):
    """N images with their labels.

    Attributes:
        labels: int64 [N].
        layout: how a streamed set lies in its files; None where all images are as near as each other.
        own_processes: processes that evaluation may use; 0 where a thread is quick enough.
    """

    labels: Tensor
    layout: Layout | None = None
    own_processes: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the images in pixels."""

    @abstractmethod
    def take(self, indices: Tensor) -> Tensor:
        """Copies of some images as they are evaluated: int64 [n] positions in this set -> uint8 [n, 3, H, W]."""

    @abstractmethod
    def select(self, indices: Tensor) -> ImageSet:
        """The set of some images only, in the given order: int64 [n] positions in this set."""

    @abstractmethod
    def fetch(self, parts: Sequence[Ints], *, ahead: int) -> Generator[Any, None, None]:
        """What each of ``parts`` (positions in this set) needs for :meth:`make`, in order.

        It can be sent to another process. Closing the generator ends its threads.

        Args:
            ahead: images that may be in memory before they are asked for.
        """

    @abstractmethod
    def make(self, indices: Ints, fetched: Any, augment: Augment, draws: Draws | None) -> Made:
        """The images of one part.

        Args:
            indices: int64 [b], positions in this set.
            fetched: what :meth:`fetch` gave for them.
            augment: any but auto.
            draws: for these b images; None for evaluation, where nothing varies.

        Raises:
            DataError: a bad image that is not to be skipped.
        """
