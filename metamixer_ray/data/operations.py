"""The operations of TrivialAugment and RandAugment on one image, by their names in ``augmentation.OPERATIONS``."""

import math

from torch import Tensor
from torchvision.transforms.v2 import functional as transforms


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
