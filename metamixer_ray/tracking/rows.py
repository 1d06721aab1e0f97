"""The row: what is recorded of one epoch. The journal keeps it; MLflow, console and figures read it.

Accuracies, agreements and calibration errors are fractions in [0, 1]; losses are in nats; times in seconds.
A value that is missing, ``None`` or not finite means "not measured in this epoch".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class ExchangeRow(TypedDict, total=False):
    """What the exchange between the peers cost, per step."""

    bytes_per_step: float
    seconds_per_step: float
    wait_fraction: float


class ScoresRow(TypedDict, total=False):
    """Scores on the evaluation split."""

    top1: float
    top5: float
    nll: float
    ece: float


class PeerRow(ScoresRow, total=False):
    """One peer in one epoch: training means, and scores when it was evaluated."""

    name: str
    loss: float
    cross_entropy: float
    kd: float
    statistics: float
    train_top1: float
    lr: float
    attention_agreement: list[float] | None


class EpochRow(TypedDict, total=False):
    """One epoch of one training. ``epoch`` counts from 1; ``time`` is when it was recorded (Unix seconds)."""

    epoch: int
    step: int
    time: float
    seconds: float
    elapsed: float
    images_per_second: float
    split: str
    peers: list[PeerRow]
    ensemble: ScoresRow | None
    agreement: float | None
    exchange: ExchangeRow
    skipped_steps: int


Row = Mapping[str, Any]
"""A row as it is read: an `EpochRow`, possibly with more keys than this version knows."""


def number(row: Mapping[str, Any] | None, key: str) -> float | None:
    """``row[key]`` as a float, or None when it is missing, None, not a number or not finite."""
    value = row.get(key) if row else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def peer_names(rows: Sequence[Row]) -> list[str]:
    """The peers' names in their order, from the last row; ``peer 0``... where a row has none."""
    if not rows:
        return []
    return [str(peer.get("name") or f"peer {i}") for i, peer in enumerate(rows[-1]["peers"])]


def evaluated(row: Row) -> bool:
    """Whether any peer was evaluated in this epoch."""
    return any(number(peer, "top1") is not None for peer in row["peers"])


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values there are, None when there is none."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
