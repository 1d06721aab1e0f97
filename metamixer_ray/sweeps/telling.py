"""A sweep's result in words and numbers: ``summary.json``, the closing lines, MLflow's metrics of the parent run."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from metamixer_ray.sweeps.config import SweepConfig
from metamixer_ray.sweeps.findings import Gain
from metamixer_ray.sweeps.ledger import Trial
from metamixer_ray.tracking.board import settings_text


def summarise(
    config: SweepConfig,
    trials: Sequence[Trial],
    order: Sequence[Trial],
    gain: Gain | None,
    *,
    search_seconds: float,
    wall_seconds: float,
) -> dict[str, Any]:
    """The content of a sweep's ``summary.json``.

    Args:
        trials: of the search.
        order: those of them that can be compared, the best first.
        gain: of the best settings over the defaults.
        search_seconds: that this attempt spent in the search.
        wall_seconds: of this attempt so far.
    """

    def told(trial: Trial) -> dict[str, Any]:
        return {name: getattr(trial, name) for name in ("number", "objective", "epochs", "status", "settings")}

    default = next((trial for trial in trials if trial.origin == "defaults"), None)
    return {
        "objective": config.objective,
        "split": "validation",
        "best": told(order[0]),
        "defaults": told(default) if default else None,
        "top": [told(trial) for trial in order[:5]],
        "gain": None
        if gain is None
        else {
            "seeds": gain.seeds,
            "mean": gain.mean if gain.seeds else None,
            "deviation": gain.deviation,
            "failed": list(gain.failed),
            "defaults": list(gain.defaults),
            "best": list(gain.best),
        },
        "trials": {
            status: sum(1 for t in trials if t.status == status) for status in ("finished", "stopped", "failed")
        },
        "training_seconds": sum(trial.seconds for trial in trials),
        "search_seconds": search_seconds,
        "wall_seconds": wall_seconds,
    }


def closing(config: SweepConfig, summary: Mapping[str, Any]) -> list[str]:
    """What is told at the end."""
    text = (lambda v: f"{v:.4f}") if config.objective == "nll" else (lambda v: f"{100 * v:.2f} %")
    best, default, gain = summary["best"], summary["defaults"], summary["gain"]
    lines = [f"best: {text(best['objective'])}, trial {best['number']}: {settings_text(best['settings'], 400)}"]
    if default and default["objective"] is not None:
        epochs = f" after {default['epochs']} epochs" if default["status"] == "stopped" else ""
        lines.append(f"defaults: {text(default['objective'])}{epochs}")
    if gain and gain["seeds"]:
        unit, factor = ("", 1.0) if config.objective == "nll" else (" points", 100.0)
        spread = "" if gain["deviation"] is None else f" (sd {factor * gain['deviation']:.2f})"
        number = f"{gain['seeds']} further seed{'s' * (gain['seeds'] > 1)}"
        lines.append(
            f"gain over the defaults: {factor * gain['mean']:+.2f}{unit}{spread}, mean of {number}, "
            f"validation ({text(fmean(gain['defaults']))} -> {text(fmean(gain['best']))})"
        )
    lines += [f"a further seed failed: {failed}" for failed in (gain or {}).get("failed", ())]
    counts = summary["trials"]
    lines.append(
        f"{counts['finished']} trials trained to the end, {counts['stopped']} stopped early, {counts['failed']} failed"
    )
    return lines


def trained_on(held_out: float) -> str:
    """The training images of these, by the share that was held out for validation."""
    return f"the training set without {100 * held_out:g} % of it" if held_out else "the whole training set"


def refitted(summary: Mapping[str, Any]) -> list[str]:
    """What is told of the trainings that ended with the test images."""
    return [
        f"test, {name} on {trained_on(found['held_out'])}: "
        f"{100 * fmean(peer['top1'] for peer in found['peers']):.2f} % (mean of the peers)"
        for name, found in (summary.get("refit") or {}).items()
    ]


def parent_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The sweep's own metrics in MLflow."""
    metrics = {"best/objective": summary["best"]["objective"]}
    if summary["defaults"] and summary["defaults"]["objective"] is not None:
        metrics["defaults/objective"] = summary["defaults"]["objective"]
    if summary["gain"] and summary["gain"]["seeds"]:
        metrics["gain"] = summary["gain"]["mean"]
    for status, number in summary["trials"].items():
        metrics[f"trials/{status}"] = float(number)
    for name, found in (summary.get("refit") or {}).items():
        metrics[f"refit/{name}/top1"] = fmean(peer["top1"] for peer in found["peers"])
    return metrics


def objective_text(config: SweepConfig) -> str:
    """The objective in words."""
    return {
        "mean": "mean top-1 of the peers",
        "ensemble": "the ensemble's top-1",
        "best": "the best peer's top-1",
        "worst": "the worst peer's top-1",
        "nll": "mean negative log-likelihood of the peers",
    }[config.objective]
