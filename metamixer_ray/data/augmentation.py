"""Random variation of whole uint8 batches, a pure function of (seed, epoch, step).

Everything is drawn for the global batch and then cut to a replica's slice, so that two replicas see exactly
the images that one replica would.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from metamixer_ray.data.config import Augment
from metamixer_ray.randomness import numpy_generator

Ints = NDArray[np.int64]

BINS = 31
"""Steps of strength of an operation, as in both papers' code."""
RAND_OPERATIONS = 2
RAND_BIN = 9
"""RandAugment's number of operations and strength, torchvision's defaults."""

OPERATIONS = (
    "identity",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
_SIGNED = frozenset(OPERATIONS[1:10])


@dataclass(frozen=True)
class Draws:
    """What happens to each of b images.

    ``down`` and ``right`` (int64 [b], 0 to 2 x padding) say where the crop begins in the padded image,
    ``mirrored`` (bool [b]) whether it is flipped. ``operations``, ``bins`` and ``signs`` (int64 [b, k]) are
    for TrivialAugment (k = 1) and RandAugment (k = 2); k = 0 otherwise.
    """

    down: Ints
    right: Ints
    mirrored: NDArray[np.bool_]
    operations: Ints
    bins: Ints
    signs: Ints

    def part(self, rows: slice) -> "Draws":
        """The draws of some of the rows."""
        return Draws(
            self.down[rows],
            self.right[rows],
            self.mirrored[rows],
            self.operations[rows],
            self.bins[rows],
            self.signs[rows],
        )


def padding(size: int) -> int:
    """Pixels added on each side before the random crop: 4 at 32 pixels, in proportion otherwise, at least
    1."""
    return max(1, size // 8)


def draw(augment: Augment, *, size: int, rows: int, seed: int, epoch: int, step: int) -> Draws:
    """The draws for a global batch of ``rows`` images of ``size`` pixels a side; ``augment`` must not be
    auto."""
    rng = numpy_generator(seed, "augment", epoch, step)
    still = np.zeros(rows, dtype=np.int64)
    offsets = rng.integers(0, 2 * padding(size) + 1, (2, rows)) if augment != "none" else np.stack([still, still])
    mirrored = rng.random(rows) < 0.5 if augment not in ("none", "crop") else still.astype(np.bool_)
    count = {"trivial": 1, "rand": RAND_OPERATIONS}.get(augment, 0)
    operations = rng.integers(0, len(OPERATIONS), (rows, count))
    bins = rng.integers(0, BINS, (rows, count)) if augment == "trivial" else np.full((rows, count), RAND_BIN)
    signs = 1 - 2 * rng.integers(0, 2, (rows, count))
    return Draws(offsets[0], offsets[1], mirrored, operations, bins, signs)


def apply(images: Tensor, draws: Draws, augment: Augment) -> Tensor:
    """The images as drawn.

    Args:
        images: uint8 [b, 3, H, W].
        draws: for these b images.
        augment: any but auto. ``trivial`` is TrivialAugmentWide (Müller and Hutter 2021, arXiv 2103.10158),
            ``rand`` is RandAugment (Cubuk et al. 2019, arXiv 1909.13719), each after ``crop-flip``; pixels
            that come from outside the image are black.

    Returns:
        uint8 [b, 3, H, W]; ``images`` itself for ``none``.
    """
    if augment == "none":
        return images
    images = crop_and_flip(images, draws)
    if draws.operations.shape[1] == 0:
        return images
    strengths = STRENGTHS[augment]
    # One image at a time: each has its own operation, and a kernel on one image rounds the same in any slice.
    for row, image in enumerate(images):
        for chosen, bin_, sign in zip(draws.operations[row], draws.bins[row], draws.signs[row], strict=True):
            name = OPERATIONS[chosen]
            strength = strengths(name, int(bin_), image.shape[-1])
            image = operate(image, name, strength * int(sign) if name in _SIGNED else strength)
        images[row] = image
    return images


def crop_and_flip(images: Tensor, draws: Draws) -> Tensor:
    """A crop of the original size out of each image with black padding, mirrored where drawn: a new
    tensor."""
    height, width = images.shape[-2:]
    pad = padding(width)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view [b, 3, 2 pad + 1, 2 pad + 1, H, W]
    down, right = torch.from_numpy(draws.down), torch.from_numpy(draws.right)
    cropped = windows[torch.arange(len(images)), :, down, right]
    mirrored = torch.from_numpy(draws.mirrored)
    if draws.mirrored.any():
        cropped[mirrored] = cropped[mirrored].flip(-1)
    return cropped


def _trivial_strength(name: str, bin_: int, size: int) -> float:
    share = bin_ / (BINS - 1)
    match name:
        case "rotate":
            return 135.0 * share
        case "translate-x" | "translate-y":
            return 32.0 * share
        case "posterize":
            return 8 - round(6 * share)
        case "solarize":
            return 255.0 * (1 - share)
        case _:
            return 0.99 * share


def _rand_strength(name: str, bin_: int, size: int) -> float:
    share = bin_ / (BINS - 1)
    match name:
        case "rotate":
            return 30.0 * share
        case "translate-x" | "translate-y":
            return 150.0 / 331.0 * size * share
        case "posterize":
            return 8 - round(4 * share)
        case "solarize":
            return 255.0 * (1 - share)
        case "shear-x" | "shear-y":
            return 0.3 * share
        case _:
            return 0.9 * share


STRENGTHS = {"trivial": _trivial_strength, "rand": _rand_strength}
"""(operation, bin, image size) -> strength, unsigned."""


def operate(image: Tensor, name: str, strength: float) -> Tensor:
    """One operation of TrivialAugment and RandAugment.

    Args:
        image: uint8 [3, H, W].
        name: one of ``OPERATIONS``.
        strength: shear as a tangent, translation in pixels, rotation in degrees, colour changes around 0,
            posterize in bits kept, solarize as the threshold in 0..255; the rest ignore it.

    Returns:
        uint8 [3, H, W].
    """
    match name:
        case "shear-x":
            return _affine(image, shear=[math.degrees(math.atan(strength)), 0.0], center=[0.0, 0.0])
        case "shear-y":
            return _affine(image, shear=[0.0, math.degrees(math.atan(strength))], center=[0.0, 0.0])
        case "translate-x":
            return _affine(image, translate=[int(strength), 0])
        case "translate-y":
            return _affine(image, translate=[0, int(strength)])
        case "rotate":
            return transforms.rotate(image, strength)
        case "brightness":
            return transforms.adjust_brightness(image, 1.0 + strength)
        case "color":
            return transforms.adjust_saturation(image, 1.0 + strength)
        case "contrast":
            return transforms.adjust_contrast(image, 1.0 + strength)
        case "sharpness":
            return transforms.adjust_sharpness(image, 1.0 + strength)
        case "posterize":
            return transforms.posterize(image, int(strength))
        case "solarize":
            return transforms.solarize(image, strength)
        case "autocontrast":
            return transforms.autocontrast(image)
        case "equalize":
            return transforms.equalize(image)
        case _:
            return image


def _affine(
    image: Tensor,
    *,
    translate: list[int] | None = None,
    shear: list[float] | None = None,
    center: list[float] | None = None,
) -> Tensor:
    return transforms.affine(
        image, angle=0.0, translate=translate or [0, 0], scale=1.0, shear=shear or [0.0, 0.0], center=center
    )
