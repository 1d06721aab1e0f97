"""Mean and standard deviation per channel, exact whatever the number of images."""

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 2**22
"""Images that are summed up at a time, since that takes eight times their memory."""


class ChannelSums:
    """Sums over pixels, in whole numbers: the variance is a small difference of huge sums."""

    def __init__(self) -> None:
        self._values = 0
        self._sums = [0, 0, 0]
        self._squares = [0, 0, 0]

    def add(self, images: NDArray[np.uint8]) -> None:
        """Count ``images``, uint8 [n, 3, H, W]."""
        _, _, height, width = images.shape
        together, lines = (max(1, BLOCK_BYTES // size) for size in (3 * height * width, 3 * width))
        for first in range(0, len(images), together):
            for top in range(0, height, lines):
                self._add(images[first : first + together, :, top : top + lines])

    def _add(self, images: NDArray[np.uint8]) -> None:
        wide = images.astype(np.uint32)
        self._values += len(images) * images.shape[2] * images.shape[3]
        sums = wide.sum(axis=(0, 2, 3), dtype=np.uint64).tolist()
        squares = np.square(wide).sum(axis=(0, 2, 3), dtype=np.uint64).tolist()
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)]
        self._squares = [a + b for a, b in zip(self._squares, squares, strict=True)]

    def mean(self) -> list[float]:
        """Per channel, of values scaled to 0..1."""
        return [total / (self._values * 255) for total in self._sums]

    def std(self) -> list[float]:
        """Per channel, of values scaled to 0..1; 1 for a channel that never varies."""
        return [
            (self._values * squares - total**2) ** 0.5 / (self._values * 255) or 1.0
            for total, squares in zip(self._sums, self._squares, strict=True)
        ]
