"""Local mixing: CutMix (Yun et al., ICCV 2019, arXiv 1905.04899), with a box of its own for each row."""

import numpy as np
import torch
from torch import Tensor

from metamixer_ray.mixing.blend import blend_rows, is_channels_last
from metamixer_ray.mixing.plan import LocalMix


def clipped_boxes(
    lam: np.ndarray, centre_row: np.ndarray, centre_column: np.ndarray, *, height: int, width: int
) -> np.ndarray:
    """CutMix's boxes (Algorithm 1 of the paper's appendix, and its published code).

    Sides are sqrt(1 - lam) of the image's, halves rounded down, around the centres, clipped to the image.
    lam float [B]; centres int [B], pixels. Returns int64 [B, 4]: top, left, bottom, right, half-open.
    """
    half = 0.5 * np.sqrt(1.0 - lam)
    half_height = (half * height).astype(np.int64)
    half_width = (half * width).astype(np.int64)
    return np.stack(
        (
            np.maximum(centre_row - half_height, 0),
            np.maximum(centre_column - half_width, 0),
            np.minimum(centre_row + half_height, height),
            np.minimum(centre_column + half_width, width),
        ),
        axis=1,
    )


def kept_share(boxes: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """float32 [B]: the exact share of pixels outside each box, counted after clipping."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (1.0 - area / (height * width)).astype(np.float32)


def draw_local(rng: np.random.Generator, partner: Tensor, *, height: int, width: int, alpha: float) -> LocalMix:
    """One box per row: lambda ~ Beta(alpha, alpha), centre uniform over the pixels; partner: int64 [B]."""
    rows = len(partner)
    lam = rng.beta(alpha, alpha, size=rows)
    centre_row = rng.integers(height, size=rows)
    centre_column = rng.integers(width, size=rows)
    boxes = clipped_boxes(lam, centre_row, centre_column, height=height, width=width)
    kept = kept_share(boxes, height=height, width=width)
    return LocalMix(partner, torch.from_numpy(boxes), torch.from_numpy(kept))


def mix_local_images(images: Tensor, local: LocalMix) -> Tensor:
    """Paste each row's box from its partner; images: float [B, C, H, W], shape, dtype and layout are kept."""
    height, width = images.shape[-2:]
    top, left, bottom, right = local.boxes[:, :, None].unbind(1)
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    inside_rows = ((row >= top) & (row < bottom)).to(images.dtype)
    inside_columns = ((column >= left) & (column < right)).to(images.dtype)
    if not is_channels_last(images):
        outside = 1 - inside_rows[:, None, :, None] * inside_columns[:, None, None, :]
        return images.index_select(0, local.partner).lerp_(images, outside)
    # Lines of W*C values and a weight of that very shape: broadcasting over the innermost axis would be slow.
    channels = images.shape[1]
    outside = 1 - inside_rows[:, :, None] * inside_columns.repeat_interleave(channels, dim=1)[:, None, :]
    lines = images.permute(0, 2, 3, 1).reshape(-1, height, width * channels)
    mixed = lines.index_select(0, local.partner).lerp_(lines, outside)
    return mixed.view(-1, height, width, channels).permute(0, 3, 1, 2)


def mix_local_targets(targets: Tensor, local: LocalMix) -> Tensor:
    """Mix targets [B, C] by the exact area shares."""
    return blend_rows(targets, local.partner, local.kept)
