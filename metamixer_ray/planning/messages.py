"""How much the peers of a training tell each other: counted by making the messages, not by a second set of formulas."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from metamixer_ray.config import TrainConfig
from metamixer_ray.distill import (
    EXCHANGE_DTYPES,
    DistillConfig,
    Own,
    Reduce,
    build_distiller,
    exchanges_statistics,
    feature_statistics,
    statistics_message,
)
from metamixer_ray.distill.control import CONTROL_FLOATS


@dataclass(frozen=True, kw_only=True)
class Messages:
    """What one worker says to the other peers in an epoch. All sizes are of its flat buffer, in bytes."""

    reduce: Reduce
    """'mean' and 'lowest' travel in all-reduces, 'each' in an all-gather."""
    exchanges_per_step: float
    """1, or less with ``--exchange-every``; 0 with a single peer."""
    mean_bytes: float
    """Mean over all steps, those without an exchange included."""
    largest_bytes: int
    """Of the largest message: a whole batch with its feature statistics."""


@cache
def message_floats(config: DistillConfig, *, rows: int, classes: int, stages: int, statistics: bool) -> int:
    """How many numbers a worker says about ``rows`` images, control included.

    Args:
        stages: how many stages are compared.
        statistics: whether the message carries feature statistics.
    """
    logits = torch.zeros(rows, classes)
    # Any width of the embedding will do: what is said of it doesn't depend on it.
    said = build_distiller(config).say(Own(logits=logits, targets=logits, embedding=torch.zeros(rows, 1)))
    if statistics:
        grid = config.statistics_grid
        features = [torch.zeros(rows, 1, grid, grid)] * stages
        said |= statistics_message(feature_statistics(features, config.statistics, grid=grid, layout="channels-first"))
    return sum(math.prod(tensor.shape) for tensor in said.values()) + CONTROL_FLOATS


def messages(config: TrainConfig, *, rows: Sequence[int], classes: int, stages: int) -> Messages:
    """What a worker of this training says in an epoch.

    Args:
        rows: per step, the images that each worker sees.
        stages: how many stages the peers compare.
    """
    distillation = config.distillation
    float_bytes = EXCHANGE_DTYPES[distillation.exchange_dtype].itemsize
    sizes = [
        float_bytes
        * message_floats(
            distillation,
            rows=count,
            classes=classes,
            stages=stages,
            statistics=exchanges_statistics(distillation, step),
        )
        for step, count in enumerate(rows)
        if len(config.peers) > 1 and step % distillation.exchange_every == 0
    ]
    return Messages(
        reduce=build_distiller(distillation).reduce,
        exchanges_per_step=len(sizes) / len(rows),
        mean_bytes=sum(sizes) / len(rows),
        largest_bytes=max(sizes, default=0),
    )
