"""What the trainings of a comparison came to, and how methods compare over seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from scipy import stats

from metamixer_ray.comparison.methods import REFERENCE, Method
from metamixer_ray.results import tested_row

CONFIDENCE = 0.95
# Costs are told relative to it.
COST_REFERENCE = "dml"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one training came to: on the test set, after the last epoch. Shares are fractions."""

    seed: int
    top1: tuple[float, ...]
    """Of each peer."""
    ensemble: float
    nlls: tuple[float, ...]
    """Of each peer, in nats; infinite where it is not finite."""
    eces: tuple[float, ...]
    """Of each peer, the expected calibration error; infinite where it is not finite."""
    step_seconds: float
    """Of a training step, without evaluation; the median epoch's."""
    bytes_per_step: float
    """That a worker hands to the exchange."""

    @property
    def mean(self) -> float:
        """Top-1 of the peers' mean."""
        return fmean(self.top1)

    @property
    def nll(self) -> float:
        """Mean of the peers."""
        return fmean(self.nlls)

    @property
    def ece(self) -> float:
        """Mean of the peers."""
        return fmean(self.eces)


def read_outcome(rows: Sequence[Mapping[str, Any]], seed: int, batch_size: int) -> Outcome:
    """The outcome of a training from the rows of its ``metrics.jsonl``."""
    last = tested_row(rows[-1])
    peers = last["peers"]
    speeds = [row["images_per_second"] for row in rows if row["images_per_second"]]
    return Outcome(
        seed=seed,
        top1=tuple(peer["top1"] for peer in peers),
        ensemble=(last["ensemble"] or peers[0])["top1"],
        nlls=tuple(_or_infinite(peer["nll"]) for peer in peers),
        eces=tuple(_or_infinite(peer["ece"]) for peer in peers),
        step_seconds=batch_size / median(speeds),
        bytes_per_step=fmean(row["exchange"]["bytes_per_step"] for row in rows),
    )


def _or_infinite(value: float | None) -> float:
    """A score from a row, which has None for what isn't finite."""
    return math.inf if value is None else value


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over the seeds."""

    mean: float
    deviation: float | None
    """None for a single seed."""


@dataclass(frozen=True)
class Gain:
    """The mean difference to the reference over the seeds that both have."""

    mean: float
    half_width: float | None
    """Of Student's confidence interval of the paired differences; None for a single seed."""
    seeds: int


@dataclass(frozen=True)
class Standing:
    """A method among others."""

    method: Method
    outcomes: tuple[Outcome, ...]
    """By seed."""
    failed: tuple[str, ...] = ()
    """The trainings that came to no end: the seed, and why."""
    gain: Gain | None = None
    """In the peers' mean top-1 over the reference; None for itself, and without a seed that both have."""
    step_ratio: float | None = None
    """Seconds per step over those of plain DML; None where that wasn't trained."""
    bytes_ratio: float | None = None

    def spread(self, value: Callable[[Outcome], float]) -> Spread | None:
        """A value over the seeds; None where nothing was trained to the end."""
        return spread([value(outcome) for outcome in self.outcomes])


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and deviation; None of nothing."""
    if not values:
        return None
    finite = len(values) > 1 and all(map(math.isfinite, values))
    return Spread(fmean(values), stdev(values) if finite else None)


def paired_gain(of: Sequence[Outcome], over: Sequence[Outcome]) -> Gain | None:
    """The gain in the peers' mean top-1, seed by seed."""
    before = {outcome.seed: outcome.mean for outcome in over}
    differences = [outcome.mean - before[outcome.seed] for outcome in of if outcome.seed in before]
    if not differences:
        return None
    number = len(differences)
    if number == 1:
        return Gain(differences[0], None, 1)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, number - 1))
    return Gain(fmean(differences), quantile * stdev(differences) / math.sqrt(number), number)


def compare_outcomes(
    methods: Sequence[Method], outcomes: Mapping[str, Sequence[Outcome]], failed: Mapping[str, Sequence[str]]
) -> list[Standing]:
    """How the methods stand, in their order.

    Args:
        outcomes, failed: by the method's name, see :class:`Standing`.
    """
    reference = outcomes.get(REFERENCE, ())
    dml = outcomes.get(COST_REFERENCE, ())

    def ratio(own: Sequence[Outcome], value: Callable[[Outcome], float]) -> float | None:
        if not own or not dml or (base := fmean(map(value, dml))) == 0:
            return None
        return fmean(map(value, own)) / base

    return [
        Standing(
            method,
            own := tuple(sorted(outcomes.get(method.name, ()), key=lambda outcome: outcome.seed)),
            tuple(failed.get(method.name, ())),
            None if method.name == REFERENCE else paired_gain(own, reference),
            ratio(own, lambda outcome: outcome.step_seconds),
            ratio(own, lambda outcome: outcome.bytes_per_step),
        )
        for method in methods
    ]
