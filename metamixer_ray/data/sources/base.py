"""What every source of images offers: an identity for the cache, and two parts that can be read chunk by
chunk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metamixer_ray.data.sources.locations import RemoteFile

Split: TypeAlias = Literal["train", "test"]
RawImage: TypeAlias = bytes | str | NDArray[np.uint8] | Image.Image

CHUNK_ROWS = 128
"""Rows that are handed over and decoded at a time: small enough for memory, large enough to send to a
process."""


@dataclass(frozen=True)
class Chunk:
    """Up to ``CHUNK_ROWS`` rows as they come from the source, not yet decoded or checked."""

    images: list[RawImage | None]
    """Encoded bytes, a local path, a PIL image or a uint8 array [H, W], [H, W, 1 or 3]; None where nothing is
    stored."""
    labels: list[object]
    """What stands in the label column; checked later."""
    places: list[str]
    """Where each row is, as an error message names it: a file and row, or a path."""

    def between(self, first: int, end: int) -> "Chunk":
        """Rows ``first`` to ``end``, without that one; fewer where there are no more."""
        return Chunk(self.images[first:end], self.labels[first:end], self.places[first:end])


@dataclass(frozen=True)
class Part:
    """One split of a source, opened for reading once."""

    chunks: Iterator[Chunk]
    rows: int
    where: str
    """The files or the set, as an error message names them."""
    classes: tuple[str, ...] | None
    """Names in the order of the labels; None when the source knows only numbers."""


@dataclass(frozen=True)
class Source:
    """A data set that can be prepared.

    ``identity`` is whatever JSON tells this content from another one (names, sizes, modification times). It
    must be cheap: it is asked for at every start, ``open`` only when nothing is cached.
    """

    name: str
    identity: Any
    open: Callable[[Split], Part]
    image_size: int | None = None
    """Side in pixels used when --image-size isn't given; None keeps the images' own."""
    parquet: Mapping[Split, Sequence[RemoteFile]] | None = None
    """The Parquet files that it consists of, which can be streamed; None for other kinds."""


def array_chunks(images: Sequence[Any] | NDArray[np.uint8], labels: Sequence[Any], where: str) -> Iterator[Chunk]:
    """Chunks of images that are in memory already; ``where`` names them, followed by the index."""
    for start in range(0, len(images), CHUNK_ROWS):
        rows = range(start, min(start + CHUNK_ROWS, len(images)))
        yield Chunk([images[i] for i in rows], [labels[i] for i in rows], [f"{where}, image {i}" for i in rows])
