"""From what a source hands over (encoded bytes, files, arrays) to uint8 RGB images of one size."""

import io
import logging
import multiprocessing
import os
import re
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metamixer_ray.data.sources.base import CHUNK_ROWS, Chunk, RawImage
from metamixer_ray.errors import DataError

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Decoding fewer rows takes about a second, and a pool isn't worth its processes.
POOL_FROM_ROWS = 4_000
PARENT_SECONDS = 1.0


@dataclass(frozen=True)
class Decoded:
    """A chunk's images as uint8 [3, H, W], or None with the reason at the same place in ``problems``."""

    images: list[NDArray[np.uint8] | None]
    labels: list[object]
    places: list[str]
    problems: list[str | None]


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
        Exception: whatever Pillow raises for what it cannot decode; ValueError for what has no defined range.
    """
    if isinstance(image, np.ndarray):
        opened = _from_array(image)
    elif isinstance(image, Image.Image):
        opened = image
    else:
        opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    with opened if isinstance(image, bytes | str) else _kept_open(opened):
        rgb = convert_rgb(opened)
    if size is not None and rgb.size != (size, size):
        width, height = rgb.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


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
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range: store 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode_chunk(chunk: Chunk, size: int | None) -> Decoded:
    """Decode every image of a chunk; what fails is reported at its place instead of raised."""
    images: list[NDArray[np.uint8] | None] = []
    problems: list[str | None] = []
    with strict_pillow():
        for raw in chunk.images:
            image, problem = attempt(lambda raw: to_rgb(raw, size), raw)
            images.append(image)
            problems.append(problem)
    return Decoded(images, chunk.labels, chunk.places, problems)


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
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        return None, f"the image is too large to be decoded safely ({error})"
    except Exception as error:  # Pillow's decoders raise nearly anything on broken input
        return None, f"the image cannot be decoded ({type(error).__name__}: {_printable(error)})"


def _printable(error: Exception) -> str:
    # Pillow names the object in memory that the bytes were in, which says nothing and differs each time.
    text = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))
    return " ".join(text.split())[:200] or "no details"


def _end_with(parent: int) -> None:
    """End this process when ``parent`` was killed; the pool's own processes would wait for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def decode_all(
    chunks: Iterator[Chunk], *, size: int | None, rows: int, processes: int
) -> Generator[Decoded, None, None]:
    """Decode all chunks in order, with a pool of ``processes`` when there are rows enough to pay for one.

    Raises:
        DataError: a pool process was killed, which is nearly always the machine running out of memory.
    """
    if processes < 2 or rows < POOL_FROM_ROWS:
        for chunk in chunks:
            yield decode_chunk(chunk, size)
        return
    # fork, as the loader's processes: a spawned child would run the main script again, import everything anew
    # and take seconds. A child here only runs Pillow and NumPy. Elsewhere than on Linux fork isn't safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pending: deque[Future[Decoded]] = deque()
    pool = ProcessPoolExecutor(
        min(processes, -(-rows // CHUNK_ROWS)), mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
    )
    try:
        for chunk in chunks:
            pending.append(pool.submit(decode_chunk, chunk, size))
            if len(pending) > 3 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that decodes images was killed, most likely because memory ran out; nothing was "
            "lost: start again with more memory or fewer CPUs per worker"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
