"""Which figures a sweep draws, from its ledger."""

from collections.abc import Mapping
from typing import Any

from metamixer_ray.config import flatten
from metamixer_ray.keeping import tracked_parameters
from metamixer_ray.sweeps.config import SweepConfig
from metamixer_ray.sweeps.findings import common_epoch, importance
from metamixer_ray.sweeps.ledger import Ledger, Trial
from metamixer_ray.sweeps.trial import objectives
from metamixer_ray.tracking.figures import figure_png
from metamixer_ray.tracking.figures.sweep_sheets import (
    Dot,
    Measure,
    sweep_curves,
    sweep_history,
    sweep_importance,
    sweep_settings,
)


def sweep_figures(config: SweepConfig, ledger: Ledger) -> dict[str, bytes]:
    """The sweep's figures as PNG, by name; those that have nothing to show are left out."""
    trials = ledger.trials()
    began = min((trial.begun for trial in trials), default=0.0)
    names = {name for trial in trials for name in trial.settings}
    defaults = {name: value for name, value in tracked_parameters(flatten(config.training)).items() if name in names}
    dots = [_dot(trial, ledger, config, began, defaults) for trial in trials]
    nll = config.objective == "nll"
    label = "negative log-likelihood (validation)" if nll else "top-1 on the validation split (%)"
    measure = Measure(label, 1.0 if nll else 100.0, not nll)
    figures = {
        "sweep-history": sweep_history(dots, measure),
        "sweep-settings": sweep_settings(dots, measure),
        "sweep-curves": sweep_curves(dots, measure),
    }
    sound = [dot for dot in dots if dot.status != "failed"]
    epoch = common_epoch([dot.curve for dot in sound])
    if epoch is not None:
        there = [dot for dot in sound if epoch in dot.curve]
        found = importance([dot.settings for dot in there], [dot.curve[epoch] for dot in there])
        if found is not None:
            figures["sweep-importance"] = sweep_importance(found, epoch=epoch, trials=len(there))
    return {name: figure_png(figure) for name, figure in figures.items() if figure is not None}


def _dot(trial: Trial, ledger: Ledger, config: SweepConfig, began: float, defaults: Mapping[str, Any]) -> Dot:
    return Dot(
        number=trial.number,
        # What a search leaves out has no meaning beside what it chose; what a person leaves out is as it is by default.
        settings={**(defaults if trial.origin in ("defaults", "first") else {}), **trial.settings},
        status=trial.status,
        objective=trial.objective,
        curve=objectives(ledger.place(trial.number), config.objective),
        minutes=None if trial.ended is None else (trial.ended - began) / 60,
        default=trial.origin == "defaults",
    )
