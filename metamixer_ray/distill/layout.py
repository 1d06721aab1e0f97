"""How features are laid out: where their positions are and where their channels."""

import math
from typing import Literal

import torch
from torch import Tensor

from metamixer_ray.errors import ConfigError

Layout = Literal["auto", "channels-first", "channels-last", "tokens"]
"""'channels-first' maps [B, C, H, W] (convolutional networks), 'channels-last' maps [B, H, W, C] (Swin),
'tokens' [B, N, D] of a square image, with or without one class token in front (ViT), or 'auto'."""

_REMEDY = (
    "name other stages with --stage-names, or use --statistics none and a --distiller that reads no features "
    "(not ensemble-gated, okddip, mcl)"
)


def read_layout(features: Tensor) -> Layout:
    """The layout of ``features``, told from their shape alone.

    Three axes are tokens. Four are channels-last if the second and third are equal and the fourth differs,
    else channels-first. So square maps with as many channels as rows count as channels-first, and
    channels-last maps that aren't square are misread: name the layout for those.

    Raises:
        ConfigError: the features have neither three nor four axes.
    """
    if features.ndim == 3:
        return "tokens"
    if features.ndim == 4:
        _, second, third, fourth = features.shape
        return "channels-last" if second == third and fourth != third else "channels-first"
    raise ConfigError(
        f"a stage gives features of shape {list(features.shape)}, which are neither maps nor tokens; {_REMEDY}"
    )


def positions_last_channels(features: Tensor, layout: Layout = "auto") -> Tensor:
    """``features`` of any layout as a view [B, H, W, C]; a class token is left out.

    Raises:
        ConfigError: the features don't fit the layout, or tokens are not those of a square image.
    """
    layout = read_layout(features) if layout == "auto" else layout
    axes = 3 if layout == "tokens" else 4
    if features.ndim != axes:
        raise ConfigError(
            f"a stage gives features of shape {list(features.shape)}, which cannot be read as {layout}; {_REMEDY}"
        )
    if layout == "channels-last":
        return features
    if layout == "channels-first":
        return features.permute(0, 2, 3, 1)
    count = features.shape[1]
    side = math.isqrt(count)
    if side * side not in (count, count - 1) or side == 0:
        raise ConfigError(
            f"a stage gives {count} tokens, which is neither a square number nor one more (a class token); {_REMEDY}"
        )
    return features[:, count - side * side :].unflatten(1, (side, side))


def mean_over_places(features: Tensor, layout: Layout = "auto") -> Tensor:
    """``features`` [B, ...] of any layout averaged over all places but the channels: float32 [B, channels].

    A class token is left out, and vectors [B, channels] are what they are.

    Raises:
        ConfigError: see :func:`positions_last_channels`.
    """
    if features.ndim == 2:
        return features.float()
    return positions_last_channels(features, layout).mean((1, 2), dtype=torch.float32)
