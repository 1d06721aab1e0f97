"""From what a source hands over (encoded bytes, files, arrays) to uint8 RGB images of one size."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metamixer_ray.data.config import LARGEST_SIDE, SMALLEST_SIDE
from metamixer_ray.data.helpers import helped
from metamixer_ray.data.sources.base import CHUNK_ROWS, Chunk, RawImage

logger = logging.getLogger(__name__)
T = TypeVar("T")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What encoded images may be. Pillow knows more, but for some it starts other programs: Ghostscript for EPS."""

# Decoding fewer rows takes about a second, which isn't worth processes.
HELPED_FROM_ROWS = 4_000

PIECE_BYTES = 2**26
"""Decoded images that are handed over at a time, and one image more: all rows of a chunk where images are small. A
process that decodes ahead holds a few such pieces."""


@dataclass(frozen=True)
class Decoded:
    """A chunk's images as uint8 [3, H, W], or None with the reason at the same place in ``problems``."""

    images: list[NDArray[np.uint8] | None]
    labels: list[object]
    places: list[str]
    problems: list[str | None]
    rest: Chunk | None = None
    """The chunk's rows after these, not yet decoded, where all at once would take too much memory."""


class SideOutOfRange(ValueError):
    """An image is too large, or too small, to keep its own size."""


def to_rgb(image: RawImage, size: int | None) -> NDArray[np.uint8]:
    """One image as uint8 RGB.

    Grey, palette and CMYK images are converted; 16-bit grey is scaled to 8 bits; an alpha channel is dropped,
    not blended; of an animation the first frame counts; EXIF orientation is ignored.

    Args:
        image: encoded bytes, a path, a PIL image, or uint8 [H, W], [H, W, 1] or [H, W, 3].
        size: side of the result, or None to keep the image's own size. The largest centred square is resized
            with antialiasing (bicubic), which is a resize of the short side followed by a centre crop.

    Returns:
        uint8 [3, H, W], contiguous.

    Raises:
        SideOutOfRange: it is to keep its own size, which --image-size couldn't name. Nothing was decoded.
        Exception: whatever Pillow raises for what it cannot decode; ValueError for what has no defined range.
    """
    if isinstance(image, np.ndarray):
        opened = _from_array(image)
    elif isinstance(image, Image.Image):
        opened = image
    else:
        opened = open_image(image)
    with opened if isinstance(image, bytes | str) else _kept_open(opened):
        if size is None:
            _check_sides(*opened.size)
        rgb = convert_rgb(opened)
    if size is not None and rgb.size != (size, size):
        width, height = rgb.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def _check_sides(width: int, height: int) -> None:
    if min(width, height) < SMALLEST_SIDE or max(width, height) > LARGEST_SIDE:
        raise SideOutOfRange(
            f"the image is {width} x {height} pixels, and of its own size a side may have {SMALLEST_SIDE} to "
            f"{LARGEST_SIDE}; give --image-size N to bring all images to N x N"
        )


def open_image(image: bytes | str) -> Image.Image:
    """Encoded bytes or the file at a path, opened as one of ``FORMATS``: its size is known, its pixels are not decoded.

    Raises:
        Exception: whatever Pillow raises for what is none of them.
    """
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_known_formats())


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


class _kept_open:  # noqa: N801 - reads as a word in the with statement
    """A PIL image that belongs to the caller must not be closed here."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def __enter__(self) -> Image.Image:
        return self.image

    def __exit__(self, *error: object) -> None:
        return None


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(f"an array must be uint8 [H, W], [H, W, 1] or [H, W, 3], not {array.dtype} {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))


def convert_rgb(image: Image.Image) -> Image.Image:
    """An opened image as mode RGB, decoded; see :func:`to_rgb`."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16 bits at 255, which turns nearly every pixel white.
        values = np.asarray(image).astype(np.int32)
        # In place, as a large image is many values.
        np.clip(values, 0, 65535, out=values)
        values += 128
        values //= 257
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range: store 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode_chunk(chunk: Chunk, size: int | None) -> Decoded:
    """Decode the images of a chunk, until they take ``PIECE_BYTES``; what fails is reported at its place instead of
    raised."""
    images: list[NDArray[np.uint8] | None] = []
    problems: list[str | None] = []
    taken = 0
    with strict_pillow():
        for raw in chunk.images:
            if taken >= PIECE_BYTES:
                break
            image, problem = attempt(lambda raw: to_rgb(raw, size), raw)
            images.append(image)
            problems.append(problem)
            taken += 0 if image is None else image.nbytes
    done, rows = len(images), len(chunk.images)
    if done == rows:
        return Decoded(images, chunk.labels, chunk.places, problems)
    own = chunk.between(0, done)
    return Decoded(images, own.labels, own.places, problems, rest=chunk.between(done, rows))


def decode_pieces(chunk: Chunk, size: int | None) -> Iterator[Decoded]:
    """Decode every image of a chunk of any length, as :func:`decode_chunk` does, ``PIECE_BYTES`` at a time."""
    rest: Chunk | None = chunk
    while rest is not None:
        decoded = decode_chunk(rest, size)
        rest = decoded.rest
        yield decoded


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Pillow's warnings are silenced, but for that of an image too large to be decoded safely, which becomes an
    error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def attempt(decode: Callable[[Any], T], raw: RawImage | None) -> tuple[T | None, str | None]:
    """``decode(raw)`` inside :func:`strict_pillow`, or None with the reason why it failed."""
    try:
        if raw is None:
            raise ValueError("no image bytes are stored here")
        return decode(raw), None
    except SideOutOfRange as error:
        return None, str(error)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        return None, f"the image is too large to be decoded safely ({error}); store it with fewer pixels"
    except Exception as error:  # Pillow's decoders raise nearly anything on broken input
        return None, f"the image cannot be decoded ({type(error).__name__}: {_printable(error)})"


def _printable(error: Exception) -> str:
    # Pillow names the object in memory that the bytes were in, which says nothing and differs each time.
    text = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))
    return " ".join(text.split())[:200] or "no details"


def decode_all(
    chunks: Iterator[Chunk], *, size: int | None, rows: int, processes: int
) -> Generator[Decoded, None, None]:
    """Decode all chunks in order, with ``processes`` when there are rows enough to pay for them.

    Rows come together as they are in the chunks, or fewer at a time where images are large (``PIECE_BYTES``).

    Raises:
        ProcessKilled: one of them was, which is nearly always the machine running out of memory.
    """
    if processes < 2 or rows < HELPED_FROM_ROWS:
        for chunk in chunks:
            yield from decode_pieces(chunk, size)
        return
    fitting = CHUNK_ROWS if size is None else min(CHUNK_ROWS, max(1, PIECE_BYTES // (3 * size**2)))

    def jobs() -> Iterator[Chunk]:
        for chunk in chunks:
            done = 0
            while done < len(chunk.images):
                rows = fitting
                yield chunk.between(done, done + rows)
                done += rows

    stream = helped(
        partial(decode_chunk, size=size),
        jobs(),
        processes=min(processes, -(-rows // CHUNK_ROWS)),
        each=3,
        who="a process that decodes images",
        remedy="nothing was lost: start again with more memory or fewer CPUs per worker",
    )
    with closing(stream):
        for decoded in stream:
            yield decoded
            if decoded.rest is not None:
                # What was given before is divided here; from now on the helpers get no more than fits.
                fitting = min(fitting, len(decoded.images))
                yield from decode_pieces(decoded.rest, size)
