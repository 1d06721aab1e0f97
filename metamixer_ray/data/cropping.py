"""Parts of images: which part, and how it becomes a square of pixels."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metamixer_ray.data.decoding import convert_rgb, open_image

AREA = (0.08, 1.0)
"""Share of the image that a random part has, as usual for ImageNet (Szegedy et al. 2015, arXiv 1409.4842)."""
ASPECT = (3 / 4, 4 / 3)
"""Width to height of a random part."""
TRIES = 10
BOX_NUMBERS = 2 * TRIES + 2
"""Random numbers that decide a random part: area and aspect of each try, and the place."""
EVALUATION_SHARE = 224 / 256
"""Share of the short side that the centre crop for evaluation takes."""


@dataclass(frozen=True)
class Box:
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


def random_box(numbers: NDArray[np.float64], width: int, height: int) -> Box:
    """A random part of an image, distributed as in torchvision's RandomResizedCrop.

    Args:
        numbers: float64 [``BOX_NUMBERS``], uniform in 0..1.
        width, height: of the image in pixels.
    """
    areas = width * height * (AREA[0] + (AREA[1] - AREA[0]) * numbers[:TRIES])
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspects = np.exp(low + (high - low) * numbers[TRIES : 2 * TRIES])
    widths, heights = np.rint(np.sqrt(areas * aspects)), np.rint(np.sqrt(areas / aspects))
    fits = np.flatnonzero((widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height))
    if len(fits) == 0:
        # An image too long or too tall for any try: as much of its centre as the aspect allows.
        w, h = min(width, max(1, round(height * ASPECT[1]))), min(height, max(1, round(width / ASPECT[0])))
        return Box((width - w) // 2, (height - h) // 2, w, h)
    w, h = int(widths[fits[0]]), int(heights[fits[0]])
    return Box(int(numbers[-2] * (width - w + 1)), int(numbers[-1] * (height - h + 1)), w, h)


def evaluation_box(width: int, height: int) -> Box:
    """The centred square of 224/256 of the short side: to resize it to N is to resize the short side to N x 256/224
    and crop the centre."""
    side = max(1, round(min(width, height) * EVALUATION_SHARE))
    return Box((width - side) // 2, (height - side) // 2, side, side)


def resize_box(image: Tensor, box: Box, size: int) -> Tensor:
    """A part of an image, resized with antialiasing (bilinear).

    Args:
        image: uint8 [3, H, W].
        box: inside the image.
        size: side of the result in pixels.

    Returns:
        uint8 [3, size, size].
    """
    part = image[:, box.top : box.top + box.height, box.left : box.left + box.width][None]
    # The only layout for which torch resizes bytes as bytes.
    part = part.contiguous(memory_format=torch.channels_last)
    return torch.nn.functional.interpolate(part, size=(size, size), mode="bilinear", antialias=True)[0]


def decode_box(encoded: bytes, choose: Callable[[int, int], Box], size: int) -> Tensor:
    """Decode an image and resize a part of it; cropped before it is resized, and a JPEG whose part has at least twice
    the size needed is decoded at half (a quarter, an eighth of) its size.

    Args:
        encoded: JPEG, PNG or whatever Pillow reads.
        choose: the part, given width and height of the image.
        size: side of the result in pixels.

    Returns:
        uint8 [3, size, size].

    Raises:
        Exception: whatever Pillow raises for what it cannot decode.
    """
    with open_image(encoded) as image:
        width, height = image.size
        box = choose(width, height)
        reduction = min(box.width, box.height) // size
        plain_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
        if plain_jpeg and reduction < 2:
            decoded = _decode_jpeg(encoded)
            if decoded is not None:
                return resize_box(decoded, box, size)
        if plain_jpeg and reduction >= 2:
            image.draft(None, (width // reduction, height // reduction))
            box = _scaled(box, round(width / image.width), *image.size)
        rgb = np.asarray(convert_rgb(image))
    # A copy, since what Pillow lends is read-only.
    return resize_box(torch.from_numpy(rgb.copy()).permute(2, 0, 1), box, size)


def _decode_jpeg(encoded: bytes) -> Tensor | None:
    """The whole image, uint8 [3, H, W], faster than Pillow; None for what Pillow may know how to read, or why not."""
    # Imported where it is used: small sets, which need no such crops, shouldn't wait a second for it.
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        return None


def _scaled(box: Box, reduction: int, width: int, height: int) -> Box:
    """The same part of the image at a ``reduction``-th of its size, which is ``width`` x ``height``."""
    left, top = min(round(box.left / reduction), width - 1), min(round(box.top / reduction), height - 1)
    w, h = max(1, round(box.width / reduction)), max(1, round(box.height / reduction))
    return Box(left, top, min(w, width - left), min(h, height - top))
