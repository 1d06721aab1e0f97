"""Local mixing: boxes of other images, pasted at the input; a box of its own for each row.

Boxes are CutMix's (Yun et al., ICCV 2019, arXiv 1905.04899) unless a mixer says otherwise.
"""

import numpy as np
import torch
from torch import Tensor

from metamixer_ray.mixing.blend import blend_rows, is_channels_last
from metamixer_ray.mixing.plan import LocalMix
from metamixer_ray.mixing.resizing import scale_into_boxes


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


def local_mix(partners: Tensor, boxes: np.ndarray, *, height: int, width: int, resized: bool = False) -> LocalMix:
    """The mix that pastes ``boxes`` int64 [N, B, 4] from ``partners`` int64 [N, B]; sizes in pixels."""
    weights = visible_shares(boxes, height=height, width=width)
    return LocalMix(partners, torch.from_numpy(boxes), torch.from_numpy(weights), resized)


def visible_shares(boxes: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """The exact shares of the pixels that are outside of all boxes, then that are seen of each: float32 [N + 1, B].

    boxes: int64 [N, B, 4], clipped, later ones over earlier ones. The lines along the boxes' sides divide an image
    into cells that are each seen of one box or of none, so counting takes no mask of pixels.
    """
    count, rows = boxes.shape[:2]
    top, left, bottom, right = np.moveaxis(boxes, 2, 0)
    sides = []
    for low, high, end in ((top, bottom, height), (left, right, width)):
        ends = np.broadcast_to(np.array([[0], [end]]), (2, rows))
        sides.append(np.sort(np.concatenate((ends, low, high)), axis=0))
    across, along = (np.diff(lines, axis=0) for lines in sides)
    cells = across[:, None] * along[None]
    row, column = sides[0][:-1, None], sides[1][None, :-1]
    owner = np.zeros(cells.shape, dtype=np.int64)
    for n in range(count):
        inside = (row >= top[n]) & (row < bottom[n]) & (column >= left[n]) & (column < right[n])
        owner[inside] = n + 1
    pixels = np.stack([np.where(owner == n, cells, 0).sum((0, 1)) for n in range(1, count + 1)])
    seen = (pixels / (height * width)).astype(np.float32)
    return np.concatenate(((1.0 - pixels.sum(0, keepdims=True) / (height * width)).astype(np.float32), seen))


def draw_boxes(rng: np.random.Generator, rows: int, *, height: int, width: int, alpha: float) -> np.ndarray:
    """CutMix's, one per row: lambda ~ Beta(alpha, alpha), centre uniform over the pixels. int64 [B, 4]."""
    lam = rng.beta(alpha, alpha, size=rows)
    centre_row = rng.integers(height, size=rows)
    centre_column = rng.integers(width, size=rows)
    return clipped_boxes(lam, centre_row, centre_column, height=height, width=width)


def draw_local(rng: np.random.Generator, partner: Tensor, *, height: int, width: int, alpha: float) -> LocalMix:
    """One of CutMix's boxes per row; partner: int64 [B]."""
    boxes = draw_boxes(rng, len(partner), height=height, width=width, alpha=alpha)
    return local_mix(partner[None], boxes[None], height=height, width=width)


def mix_local_images(images: Tensor, local: LocalMix) -> Tensor:
    """Paste each row's boxes from its partners; images: float [B, C, H, W], shape, dtype and layout are kept."""
    mixed = images
    for partner, boxes in zip(local.partners, local.boxes, strict=True):
        pasted = images.index_select(0, partner)
        if local.resized:
            pasted = scale_into_boxes(pasted, boxes)
        mixed = _paste(pasted, boxes, mixed)
    return mixed


def _paste(pasted: Tensor, boxes: Tensor, images: Tensor) -> Tensor:
    """``images`` [B, C, H, W] with what ``pasted``, of the same shape and layout, shows inside ``boxes`` [B, 4].

    Writes into ``pasted``.
    """
    height, width = images.shape[-2:]
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    inside_rows = ((row >= top) & (row < bottom)).to(images.dtype)
    inside_columns = ((column >= left) & (column < right)).to(images.dtype)
    if not is_channels_last(images):
        outside = 1 - inside_rows[:, None, :, None] * inside_columns[:, None, None, :]
        return pasted.lerp_(images, outside)
    # Lines of W*C values and a weight of that very shape: broadcasting over the innermost axis would be slow.
    channels = images.shape[1]
    outside = 1 - inside_rows[:, :, None] * inside_columns.repeat_interleave(channels, dim=1)[:, None, :]
    lines, pasted_lines = (x.permute(0, 2, 3, 1).reshape(-1, height, width * channels) for x in (images, pasted))
    return pasted_lines.lerp_(lines, outside).view(-1, height, width, channels).permute(0, 3, 1, 2)


def mix_local_targets(targets: Tensor, local: LocalMix) -> Tensor:
    """Mix targets [B, C] by the exact area shares."""
    if len(local.partners) == 1:
        return blend_rows(targets, local.partners[0], local.kept)
    sources = [targets, *(targets.index_select(0, partner) for partner in local.partners)]
    weights = local.weights.to(targets.dtype)[:, :, None]
    return sum((source * weight for source, weight in zip(sources, weights, strict=True)), torch.zeros_like(targets))
