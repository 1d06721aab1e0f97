"""Common corruptions of test images, each at one severity: blur, noise, contrast, JPEG.

The parameters are those of severity 3 of 5 of Hendrycks and Dietterich 2019 (1903.12261): CIFAR-10-C's for images of up
to 64 px, ImageNet-C's for larger ones. The transforms are torchvision's own (contrast is about the grey mean, not that
of each channel), so scores can be compared with each other, not with those on the published images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from metamixer_ray.randomness import seed_torch, torch_seed

SMALL = 64


@dataclass(frozen=True)
class Corruption:
    """One way to spoil images.

    Attributes:
        setting: how strongly, in words.
        apply: of uint8 [B, 3, H, W] on the CPU and the images' positions in their set, int64 [B], the spoilt images.
            The same image is always spoilt alike, whatever else is in its batch.
    """

    name: str
    setting: str
    apply: Callable[[Tensor, Tensor], Tensor]


def severity_of(image_size: int) -> str:
    """Where the severity for images of so many pixels comes from, in words."""
    return f"severity 3 of {'CIFAR-10-C' if image_size <= SMALL else 'ImageNet-C'}"


def common_corruptions(image_size: int) -> tuple[Corruption, ...]:
    """The four corruptions for images of ``image_size`` pixels a side."""
    sigma, noise, contrast, quality = (0.7, 0.08, 0.4, 58) if image_size <= SMALL else (3.0, 0.18, 0.2, 15)
    # Three sigma to either side; mirrored edges must be shorter than the image.
    kernel = [2 * min(math.ceil(3 * sigma), image_size - 1) + 1] * 2
    return (
        Corruption(
            "blur", f"Gaussian, sigma {sigma} px", lambda x, _: transforms.gaussian_blur(x, kernel, [sigma] * 2)
        ),
        Corruption("noise", f"Gaussian, sigma {noise} of the range", lambda x, at: add_noise(x, at, sigma=noise)),
        Corruption("contrast", f"times {contrast}", lambda x, _: transforms.adjust_contrast(x, contrast)),
        Corruption("jpeg", f"quality {quality}", lambda x, _: transforms.jpeg(x, quality)),
    )


def add_noise(images: Tensor, indices: Tensor, *, sigma: float) -> Tensor:
    """Gaussian noise on uint8 [B, 3, H, W], that of each image drawn from its index (int64 [B]) alone.

    Args:
        sigma: standard deviation, as a fraction of the range of values.
    """
    spoilt = torch.empty_like(images)
    # torchvision takes no generator; the global one is put back as it was.
    with torch.random.fork_rng(devices=[]):
        for row, index in enumerate(indices.tolist()):
            seed_torch(torch_seed(0, "corruption", index), torch.device("cpu"))
            spoilt[row] = transforms.gaussian_noise(images[row], sigma=sigma)
    return spoilt
