"""Blending every row of a batch with another row, in one gather and one in-place lerp.

``torch.lerp`` stands in for ``torch.where`` too: with a weight of exactly 0 or 1 it returns one of its two
operands exactly, and on the CPU it is vectorised where ``torch.where`` is about ten times slower. Gathers use
``index_select``, which copies whole rows and whose gradient needs no sort, unlike indexing.
"""

import torch
from torch import Tensor


def check_rows(values: Tensor, rows: int) -> None:
    """Raise ``ValueError`` unless ``values`` is floating point with ``rows`` rows."""
    if values.ndim == 0 or values.shape[0] != rows:
        raise ValueError(f"the plan mixes {rows} rows, the tensor is of shape {tuple(values.shape)}")
    if not values.is_floating_point():
        raise ValueError(f"only floating point tensors can be mixed, not {values.dtype}")


def is_channels_last(values: Tensor) -> bool:
    """Whether a [B, C, H, W] tensor lies in memory as [B, H, W, C] and not also as [B, C, H, W]."""
    return values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last) and not values.is_contiguous()


def blend_rows(values: Tensor, partner: Tensor, kept: Tensor) -> Tensor:
    """``kept * values + (1 - kept) * values[partner]``, row by row.

    values: [B, ...] floating point of any layout; partner: int64 [B]; kept: [B]. Returns shape, dtype and
    (for dense or channels-last values) memory layout of ``values``. Reduced precision is computed in float32
    and rounded once.
    """
    if is_channels_last(values):
        return blend_rows(values.permute(0, 2, 3, 1), partner, kept).permute(0, 3, 1, 2)
    weight = kept.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
    return values.index_select(0, partner).lerp_(values, weight)
