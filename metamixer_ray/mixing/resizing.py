"""Scaling whole images down into boxes, a box of its own size for each image, without a loop over images."""

import torch
from torch import Tensor


def scale_into_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Each image scaled down into its box, and zeros around it.

    images: float [B, C, H, W]; boxes: int64 [B, 4], top, left, bottom, right, half-open. A pixel is the mean of the
    area of the image that falls on it (``torch.nn.functional.adaptive_avg_pool2d`` with fractions of pixels counted),
    which for constant images is that constant. Shape, dtype and layout are kept.
    """
    height, width = images.shape[-2:]
    top, left, bottom, right = boxes.unbind(1)
    vertical = _scaling(top, bottom, height, images)
    horizontal = _scaling(left, right, width, images)
    # Always computed in one layout: the same images in another must give the same values to the bit.
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    scaled = vertical[:, None] @ images.contiguous() @ horizontal[:, None].mT
    return scaled.contiguous(memory_format=layout)


def _scaling(low: Tensor, high: Tensor, size: int, like: Tensor) -> Tensor:
    """[B, size, size]: what share of every pixel of a line scaled into [low, high) comes from each pixel of it."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    edge = torch.arange(size + 1, device=like.device, dtype=dtype)
    scale = (size / (high - low).clamp_min(1).to(dtype))[:, None]
    start, end = ((edges - low[:, None]) * scale for edges in (edge[:-1], edge[1:]))
    overlap = torch.minimum(end[:, :, None], edge[1:]) - torch.maximum(start[:, :, None], edge[:-1])
    inside = (edge[:-1] >= low[:, None]) & (edge[:-1] < high[:, None])
    return (overlap.clamp_min(0) / scale[:, :, None] * inside[:, :, None]).to(like.dtype)
