"""Which trials are stopped early. A sweep that goes on tells its scheduler what earlier attempts saw of every trial."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from metamixer_ray.sweeps.config import SweepConfig

Curves = Mapping[str, Mapping[int, float]]
"""Scores after each epoch, by the names of the trials; the more the better."""


def build_scheduler(config: SweepConfig, curves: Curves) -> TrialScheduler:
    """The scheduler that the options name, over epochs.

    Args:
        curves: of the trials of an earlier attempt, those that are to go on included.
    """
    options: dict[str, Any] = {"metric": "score", "mode": "max", "time_attr": "epoch", "grace_period": config.grace}
    if config.scheduler == "asha":
        return _Asha(curves, max_t=config.training.epochs, reduction_factor=config.reduction_factor, **options)
    if config.scheduler == "median":
        # It would otherwise pause trials until there are enough to compare, and ours can't be paused.
        return _Median(curves, min_time_slice=float("inf"), **options)
    return FIFOScheduler()


@dataclass(frozen=True)
class _Known:
    """As much of a trial of an earlier attempt as a scheduler looks at."""

    trial_id: str


class _Asha(AsyncHyperBandScheduler):
    """Successive halving whose rungs know of earlier attempts."""

    def __init__(self, curves: Curves, **options: Any) -> None:
        super().__init__(**options)
        for name, curve in curves.items():
            for epoch, score in sorted(curve.items()):
                # Whether it would go on is no question any more: what counts is that the rungs know of it.
                self._brackets[0].on_result(_Known(name), epoch, score)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """See :class:`TrialScheduler`. A trial that goes on is the one that the rungs know by its name."""
        super().on_trial_add(tune_controller, trial)
        for _, recorded in self._brackets[0]._rungs:
            if (score := recorded.pop(trial_name(trial), None)) is not None:
                recorded[trial.trial_id] = score


class _Median(MedianStoppingRule):
    """The median rule, which compares with earlier attempts as well."""

    def __init__(self, curves: Curves, **options: Any) -> None:
        super().__init__(**options)
        self._known = {name: _Known(name) for name, curve in curves.items() if curve}
        for name, known in self._known.items():
            self._results[known] = _results(curves[name])

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """See :class:`TrialScheduler`. What is known of a trial that goes on is its own."""
        super().on_trial_add(tune_controller, trial)
        if (known := self._known.pop(trial_name(trial), None)) is not None:
            self._results[trial] = self._results.pop(known)


def trial_name(trial: Any) -> str:
    """The name in the ledger of one of Ray Tune's trials."""
    return f"{trial.config['number']:04d}"


def _results(curve: Mapping[int, float]) -> list[dict[str, float]]:
    return [{"epoch": epoch, "score": score} for epoch, score in sorted(curve.items())]
