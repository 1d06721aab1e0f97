"""Random variation of whole uint8 batches, a pure function of (seed, epoch, step).

Everything is drawn for the global batch and then cut to a replica's slice, so that two replicas see exactly
the images that one replica would.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metamixer_ray.data import cropping
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
OPERATING = ("trivial", "rand")
"""What applies operations after the crop."""


@dataclass(frozen=True)
class Draws:
    """What happens to each of b images.

    ``down`` and ``right`` (int64 [b], 0 to 2 x padding) say where the crop begins in the padded image,
    ``mirrored`` (bool [b]) whether it is flipped. ``operations``, ``bins`` and ``signs`` (int64 [b, k]) are
    for TrivialAugment (k = 1) and RandAugment (k = 2); k = 0 otherwise. ``boxes`` (float64 [b, 22], uniform in
    0..1) decide the part of the image that a resized crop takes, see :func:`cropping.random_box`; [b, 0] where
    the crop is of the original size.
    """

    down: Ints
    right: Ints
    mirrored: NDArray[np.bool_]
    operations: Ints
    bins: Ints
    signs: Ints
    boxes: NDArray[np.float64]

    @property
    def resized(self) -> bool:
        """Whether crops are resized."""
        return self.boxes.shape[1] > 0

    def part(self, rows: slice) -> "Draws":
        """The draws of some of the rows."""
        return Draws(
            self.down[rows],
            self.right[rows],
            self.mirrored[rows],
            self.operations[rows],
            self.bins[rows],
            self.signs[rows],
            self.boxes[rows],
        )


def padding(size: int) -> int:
    """Pixels added on each side before the random crop: 4 at 32 pixels, in proportion otherwise, at least
    1."""
    return max(1, size // 8)


def draw(augment: Augment, *, size: int, rows: int, seed: int, epoch: int, step: int, resized: bool = False) -> Draws:
    """The draws for a global batch.

    Args:
        augment: any but auto.
        size: side of the images in pixels.
        rows: of the global batch.
        seed, epoch, step: what the draws are a function of.
        resized: whether crops are resized for ``trivial`` and ``rand`` too; for ``resized-crop`` they always are.
    """
    rng = numpy_generator(seed, "augment", epoch, step)
    still = np.zeros(rows, dtype=np.int64)
    offsets = rng.integers(0, 2 * padding(size) + 1, (2, rows)) if augment != "none" else np.stack([still, still])
    mirrored = rng.random(rows) < 0.5 if augment not in ("none", "crop") else still.astype(np.bool_)
    count = {"trivial": 1, "rand": RAND_OPERATIONS}.get(augment, 0)
    operations = rng.integers(0, len(OPERATIONS), (rows, count))
    bins = rng.integers(0, BINS, (rows, count)) if augment == "trivial" else np.full((rows, count), RAND_BIN)
    signs = 1 - 2 * rng.integers(0, 2, (rows, count))
    resized = augment == "resized-crop" or (resized and augment in OPERATING)
    boxes = rng.random((rows, cropping.BOX_NUMBERS if resized else 0))
    return Draws(offsets[0], offsets[1], mirrored, operations, bins, signs, boxes)


def apply(images: Tensor, draws: Draws, augment: Augment) -> Tensor:
    """The images as drawn.

    Args:
        images: uint8 [b, 3, H, W].
        draws: for these b images.
        augment: any but auto. ``trivial`` is TrivialAugmentWide (Müller and Hutter 2021, arXiv 2103.10158),
            ``rand`` is RandAugment (Cubuk et al. 2019, arXiv 1909.13719), each after ``crop-flip`` or
            ``resized-crop``; pixels that come from outside the image are black.

    Returns:
        uint8 [b, 3, H, W]; ``images`` itself for ``none``.
    """
    if augment == "none":
        return images
    cropped = resized_crop_and_flip(images, draws) if draws.resized else crop_and_flip(images, draws)
    return operate_all(cropped, draws, augment)


def crop_and_flip(images: Tensor, draws: Draws) -> Tensor:
    """A crop of the original size out of each image with black padding, mirrored where drawn: a new
    tensor."""
    rows, channels, height, width = images.shape
    pad = padding(width)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    tall, wide = padded.shape[-2:]
    # Each line of a crop is one stretch of memory. Copying stretches is twenty times as fast as indexing pixels.
    stretches = padded.reshape(-1).unfold(0, width, 1)
    corners = (np.arange(rows) * channels * tall + draws.down) * wide + draws.right
    lines = (np.arange(channels)[:, None] * tall + np.arange(height)) * wide
    cropped = stretches.index_select(0, torch.from_numpy((corners[:, None, None] + lines).reshape(-1)))
    cropped = cropped.view(images.shape)
    _mirror(cropped, draws.mirrored)
    return cropped


def resized_crop_and_flip(images: Tensor, draws: Draws) -> Tensor:
    """A random part of each image, resized to the image's size and mirrored where drawn: a new tensor."""
    height, width = images.shape[-2:]
    cropped = torch.empty_like(images, memory_format=torch.contiguous_format)
    for row, image in enumerate(images):
        cropped[row] = cropping.resize_box(image, cropping.random_box(draws.boxes[row], width, height), width)
    _mirror(cropped, draws.mirrored)
    return cropped


def _mirror(images: Tensor, mirrored: NDArray[np.bool_]) -> None:
    # NumPy reverses bytes twice as fast as torch.
    pixels = images.numpy()
    pixels[mirrored] = pixels[mirrored][..., ::-1]


def operate_all(images: Tensor, draws: Draws, augment: Augment) -> Tensor:
    """The operations of ``trivial`` and ``rand``, in place: ``images`` itself, uint8 [b, 3, H, W]."""
    if draws.operations.shape[1] == 0:
        return images
    # Brings torchvision, which takes a second to import and which no other augmentation needs.
    from metamixer_ray.data.operations import operate

    strengths = STRENGTHS[augment]
    # One image at a time: each has its own operation, and a kernel on one image rounds the same in any slice.
    for row, image in enumerate(images):
        for chosen, bin_, sign in zip(draws.operations[row], draws.bins[row], draws.signs[row], strict=True):
            name = OPERATIONS[chosen]
            strength = strengths(name, int(bin_), image.shape[-1])
            image = operate(image, name, strength * int(sign) if name in _SIGNED else strength)
        images[row] = image
    return images


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
