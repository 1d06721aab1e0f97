"""Feature statistics: what of its features a peer can compare with those of any other architecture.

Both kinds are independent of channel count and resolution. *Attention maps* say where a peer looks (Zagoruyko
and Komodakis 2017, arXiv 1612.03928); *similarity matrices* say which images of the batch it finds alike
(Tung and Mori 2019, arXiv 1907.09682). The losses need the mean over the other peers only, and are exactly
the mean of the pairwise losses.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metamixer_ray.distill.heard import Heard
from metamixer_ray.distill.layout import Layout, mean_over_places, positions_last_channels

StatisticsKind = Literal["none", "attention", "similarity"]

# Far below the mean square of any live feature; it makes a map of zeros the uniform map instead of 0 / 0.
_UNIFORM = 1e-8


def attention_map(features: Tensor, grid: int, layout: Layout = "auto") -> Tensor:
    """Where each sample is attended to: float32 [B, grid * grid], non-negative, every row of L2 norm 1.

    The mean over channels of the squared activations, average-pooled to grid x grid (``adaptive_avg_pool2d``,
    which repeats cells of a smaller input), flattened and L2-normalised: Zagoruyko and Komodakis 2017,
    F_sum^2 of their equation 1, before their equation 2. A map of zeros becomes the uniform map, "nowhere in
    particular".

    Args:
        features: any float dtype, laid out as ``layout`` says.
        grid: cells per side.
        layout: see ``Layout``.

    Raises:
        ConfigError: the features cannot be read as maps.
    """
    with torch.autocast(features.device.type, enabled=False):
        energy = _energy(positions_last_channels(features, layout), grid)
        pooled = F.adaptive_avg_pool2d(energy, grid).flatten(1)
        return F.normalize(pooled + _UNIFORM, dim=1)


def _energy(maps: Tensor, grid: int) -> Tensor:
    """Mean squares over channels of maps [B, H, W, C], already pooled along W where that is free.

    float32 [B, H, W'].
    """
    width, channels = maps.shape[2:]
    if channels > 1 and maps.stride(3) != 1:
        # Contiguous [B, C, H, W]: a norm across its planes is 20 times slower than squaring first, and so is
        # a backward pass that walks them with channels last. Squares of float16 overflow from 256 on.
        planes = maps.permute(0, 3, 1, 2)
        planes = planes.float() if planes.dtype == torch.float16 else planes
        return planes.square().mean(1, dtype=torch.float32)
    if width % grid == 0:
        # One long row per cell instead of one short row per position: twice as fast.
        maps = maps.reshape(*maps.shape[:2], grid, width // grid * channels)
    # A norm accumulates in float32 in a single pass, without a float32 copy of the features.
    norms = torch.linalg.vector_norm(maps, dim=3, dtype=torch.float32)
    return norms.square() / maps.shape[3]


def similarity_matrix(features: Tensor, layout: Layout = "auto") -> Tensor:
    """Which samples are alike: float32 [B, B], the cosines between globally average-pooled features.

    Tung and Mori 2019 flatten the whole map, take inner products and L2-normalise each row of the result.
    Pooling first makes it blind to where things are (attention maps see that) and cheap; cosines don't let
    samples of large activations rule the others, and don't depend on which other samples are in the batch.
    Features of zeros are alike to nothing.

    Args:
        features: any float dtype, laid out as ``layout`` says.
        layout: see ``Layout``.

    Raises:
        ConfigError: the features cannot be read as maps.
    """
    with torch.autocast(features.device.type, enabled=False):
        directions = F.normalize(mean_over_places(features, layout), dim=1)
        return directions @ directions.T


def feature_statistics(
    features: Sequence[Tensor], kind: StatisticsKind, *, grid: int, layout: Layout | Sequence[Layout] = "auto"
) -> dict[str, Tensor]:
    """The statistics of one peer's stages, with their graph: names '<kind>/<place>' by place in ``features``.

    Args:
        features: per stage that is compared, what flows out of it. Peers must give equally many.
        kind: which statistic; 'none' gives an empty dict.
        grid: cells per side of attention maps.
        layout: see ``Layout``; one for all stages, or one each.

    Returns:
        float32 [B, grid * grid] (attention) or [B, B] (similarity) per stage.
    """
    layouts = [layout] * len(features) if isinstance(layout, str) else layout
    if kind == "attention":
        maps = (attention_map(stage, grid, how) for stage, how in zip(features, layouts, strict=True))
        return {f"{kind}/{i}": statistic for i, statistic in enumerate(maps)}
    if kind == "similarity":
        matrices = (similarity_matrix(stage, how) for stage, how in zip(features, layouts, strict=True))
        return {f"{kind}/{i}": statistic for i, statistic in enumerate(matrices)}
    return {}


def statistics_message(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the others need of this peer's ``feature_statistics``: the same, detached, and the mean square of
    each similarity matrix (one float per stage). Attention maps need none, their norm is known."""
    message = {name: statistic.detach() for name, statistic in own.items()}
    for name, statistic in list(message.items()):
        if name.startswith("similarity/"):
            message[_mean_square(name)] = statistic.square().mean()
    return message


def statistics_loss(own: Mapping[str, Tensor], heard: Heard) -> Tensor:
    """How far this peer's statistics are from the others', a float32 scalar with gradient into ``own`` only.

    Mean over stages and other peers j of

    - attention: the mean over samples of ||a_i - a_j||^2, between 0 and 2. From the mean of the others m
      alone: 2 - 2 a_i . m, because every map has norm 1.
    - similarity: the mean over the B x B entries of (g_i - g_j)^2, between 0 and 4 (Tung and Mori 2019,
      equation 4, for our matrices). From the mean m of the others and their mean square q: mean((g_i - m)^2)
      + q - mean(m^2), where what follows the first term is how far the others are spread, without gradient.

    Zero when there are no statistics or no other peer.
    """
    if not own or not heard.others:
        return torch.zeros((), device=next(iter(own.values())).device if own else None)
    losses = []
    for name, statistic in own.items():
        mean = heard.others[name]
        if name.startswith("similarity/"):
            spread = heard.others[_mean_square(name)] - mean.square().mean()
            losses.append((statistic - mean).square().mean() + spread)
        else:
            losses.append(2 - 2 * (statistic * mean).sum(1).mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def attention_agreement(own: Mapping[str, Tensor], heard: Heard) -> Tensor:
    """How far the peers look at the same places: float32 [S] per stage, 1 when they agree wholly.

    The mean over samples of the cosine between a peer's own row and the mean row of the others: rows are
    attention maps, or the similarities of a sample to its batch. Empty when there are no statistics or no
    other peer.
    """
    if not own or not heard.others:
        return torch.zeros(0)
    return torch.stack([F.cosine_similarity(own[name], heard.others[name], dim=1).mean() for name in own])


def _mean_square(name: str) -> str:
    return f"{name}/mean-square"
