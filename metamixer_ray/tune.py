"""A sweep: ``python -m metamixer_ray.tune``. Many trainings, each of peers that learn together, tell what is best."""

import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro
import yaml

from metamixer_ray.cli import run_command, take_config_file
from metamixer_ray.config import TrainConfig, flatten, from_settings, nest, to_yaml
from metamixer_ray.data import load_splits
from metamixer_ray.errors import ConfigError, TrainingFailed, UserError
from metamixer_ray.folder import RunFolder
from metamixer_ray.interruption import Stopped, aside, stoppable
from metamixer_ray.keeping import TrackingPlan, tracking_store
from metamixer_ray.placement import connect
from metamixer_ray.preparation import build_peers
from metamixer_ray.runs import data_facts
from metamixer_ray.sweeps.config import SweepConfig
from metamixer_ray.sweeps.engine import EngineOptions, Room, build_scheduler, run_trials, trial_resources
from metamixer_ray.sweeps.findings import Gain, ranked
from metamixer_ray.sweeps.ledger import Ledger, Trial
from metamixer_ray.sweeps.opening import (
    BEST,
    CONFIRM,
    REFIT,
    SPACE,
    SUMMARY,
    SWEEP,
    TRIALS,
    Sweep,
    for_trials,
    open_sweep,
    sweep_facts,
)
from metamixer_ray.sweeps.portraits import sweep_figures
from metamixer_ray.sweeps.proposing import Proposer, Tpe
from metamixer_ray.sweeps.spaces import Settings, Space, describe, draws, grid, load_spaces
from metamixer_ray.sweeps.trial import SweepPlan
from metamixer_ray.sweeps.watching import Watcher
from metamixer_ray.tracking import Console
from metamixer_ray.tracking.board import Board, settings_text
from metamixer_ray.tracking.naming import run_place, ui_command
from metamixer_ray.tracking.provenance import environment_tags, repeat_command, source_tags
from metamixer_ray.train import train, with_absolute_paths

REACH_SECONDS = 10.0
FINISH_SECONDS = 60.0


def tune(config: SweepConfig, board: Board | None = None) -> dict[str, Any]:
    """Search for better settings, and return the content of the sweep's ``summary.json``.

    Joins the Ray cluster at hand or starts a local one, and leaves it running.

    Raises:
        UserError: what a person must mend: an option, the space, the data.
        TrainingFailed: no trial came to an end.
        Stopped: by Ctrl-C or SIGTERM; it can be resumed.
    """
    began = time.perf_counter()
    asked = replace(config, training=with_absolute_paths(config.training))
    config = for_trials(asked)
    config.check()
    space = load_spaces(config.space)
    points, samples = fixed_points(config, space)
    splits = load_splits(config.training.dataset, processes=os.cpu_count() or 1)
    build_peers(config.training, classes=len(splits.classes), image_size=splits.train.image_size)
    sweep = open_sweep(config)
    training = config.training
    connect(training.placement, verbose=training.run.verbose)
    resources = trial_resources(training)
    board = board or Board(samples, training.epochs, nll=config.objective == "nll")
    room = Room(resources, training.workers, config.max_concurrent)
    board.say(sweep.name)
    for name, text in (
        ("search", f"{config.search} over {', '.join(config.space)}; {samples} trials of {training.epochs} epochs"),
        ("trial", f"{', '.join(training.peers)} on {splits.description}; {training.workers} workers, {resources}"),
        ("at once", f"{room()} now; scheduler {config.scheduler}; objective: {objective_text(config)} (validation)"),
        ("folder", str(sweep.folder)),
    ):
        board.say(f"{name:<9} {text}")

    parent = parent_plan(config, sweep)
    writer = parent.writer(board.warn)
    writer.log_artifact(describe(space).encode(), SPACE)
    writer.log_artifact(sweep.folder.read(SWEEP) or b"", SWEEP)
    writer.wait(REACH_SECONDS)
    plan = SweepPlan(
        name=sweep.name,
        key=sweep.key,
        folder=sweep.folder.inside(TRIALS).uri,
        training=plain_settings(training),
        objective=config.objective,
        resources=resources,
        facts=data_facts(splits),
        tracking_uri=parent.uri,
        artifact_location=parent.artifact_location,
        parent_run_id=writer.run_id,
        tags={"data": training.dataset.data, "mlflow.note.content": f"A trial of the sweep {sweep.name}."},
    )
    status: Any = "FAILED"
    try:
        with stoppable():
            search = Ledger(sweep.folder.inside(TRIALS))
            tpe = None
            if config.search == "tpe":
                tpe = Tpe(space, seed=config.search_seed, random_first=config.random_first)
            run_stage(config, plan, search, points, tpe, samples, room, board)
            order = ranked(search.trials(), maximised=config.maximised)
            if not order:
                raise TrainingFailed(f"no trial came to an end; the reasons are in {sweep.folder}/{TRIALS}")
            best = order[0]
            gain = confirm(config, plan, sweep, best, room, board)
            summary = summarise(config, search.trials(), order, gain, time.perf_counter() - began)
            chosen = with_settings(asked.training, best.settings)
            sweep.folder.write(BEST, to_yaml(replace(chosen, run=replace(chosen.run, name=None, resume=False))))
            for name, png in sweep_figures(config, search).items():
                sweep.folder.write(f"figures/{name}.png", png)
                writer.log_artifact(png, f"figures/{name}.png")
            if config.refit:
                summary["refit"] = refit(asked.training, best, sweep, writer.run_id, board)
            sweep.folder.write_json(SUMMARY, summary)
        for name in (BEST, SUMMARY):
            writer.log_artifact(sweep.folder.read(name) or b"", name)
        writer.log_metrics(parent_metrics(summary), 0)
        writer.set_tags({"mlflow.note.content": "\n\n".join(closing(config, summary))})
        status = "FINISHED"
    except Stopped as stopped:
        status = "KILLED"
        board.warn(f"{stopped}; the same command with --name {sweep.name} --resume goes on")
        raise
    finally:
        board.close()
        writer.finish(status, FINISH_SECONDS)
    for line in closing(config, summary):
        board.say(line)
    place = run_place(parent.uri, parent.experiment, parent.run_name, (writer.experiment_id, writer.run_id))
    for name, where in (
        ("best", f"{sweep.folder}/{BEST}   (python -m metamixer_ray.train --config takes it)"),
        ("figures", f"{sweep.folder}/figures"),
        ("MLflow", place),
        ("open it", ui_command(parent.uri)),
    ):
        if where:
            board.say(f"{name:<9} {where}")
    return summary


def fixed_points(config: SweepConfig, space: Space) -> tuple[list[tuple[Settings, str]], int]:
    """What is tried in any case, each with its origin, and how many trials there are in all: first the defaults."""
    points: list[tuple[Settings, str]] = [({}, "defaults")]
    points += [(read_point(path), "first") for path in config.first]
    if config.search == "grid":
        points += [(point, "grid") for point in grid(space) if works(config.training, point)]
        return points, len(points)
    if config.search == "random":
        number = max(0, config.samples - len(points))
        drawn = (point for point in draws(space, 50 * number, config.search_seed) if works(config.training, point))
        points += [(point, "random") for point in itertools.islice(drawn, number)]
        return points, len(points)
    return points, max(config.samples, len(points))


def works(training: TrainConfig, settings: Settings) -> bool:
    """Whether settings of a space can work together, and with those of the training."""
    try:
        with_settings(training, settings).check()
    except UserError:
        return False
    return True


def read_point(path: str) -> Settings:
    """Settings to try, from a YAML file.

    Raises:
        ConfigError: it can't be read, or holds something else.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--first {path}: {error}") from None
    if not isinstance(settings, Mapping):
        raise ConfigError(f"--first {path} must hold settings as 'name: value'")
    flat: Settings = {}
    for name, value in nest(settings, source=f"--first {path}").items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    from_settings(flat, source=f"--first {path}")
    return flat


def plain_settings(training: TrainConfig) -> dict[str, Any]:
    """All settings of a training, flat, with lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(training).items()}


def with_settings(training: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """A training with some settings changed."""
    return from_settings({**plain_settings(training), **settings})


def parent_plan(config: SweepConfig, sweep: Sweep) -> TrackingPlan:
    """How the sweep itself is written to MLflow: the run that its trials are children of."""
    uri, artifacts = tracking_store(config.training)
    command = repeat_command("metamixer_ray.tune")
    facts = {k: v for k, v in sweep_facts(config).items() if k not in ("max_concurrent", "samples", "first")}
    return TrackingPlan(
        uri=uri,
        experiment=config.training.run.experiment,
        run_name=sweep.name,
        key=sweep.key,
        parameters=facts,
        tags={
            **environment_tags(),
            **source_tags(command),
            "sweep": sweep.name,
            "run_folder": str(sweep.folder),
            "mlflow.note.content": f"A sweep over {', '.join(config.space)}: `{command}`",
        },
        artifact_location=artifacts,
    )


def run_stage(
    config: SweepConfig,
    plan: SweepPlan,
    ledger: Ledger,
    points: Sequence[tuple[Settings, str]],
    tpe: Tpe | None,
    samples: int,
    room: Room,
    board: Board,
) -> None:
    """Run the trials of a ledger that aren't over, and those that are to come."""
    for trial in ledger.trials():
        if trial.over:
            board.known(trial)
    searching = plan.name == ledger.folder.root.rpartition("/")[0].rpartition("/")[2]
    scheduler = build_scheduler(config if searching else replace(config, scheduler="none"))
    options = EngineOptions(failures=config.trial_failures, scheduler=scheduler, verbose=config.training.run.verbose)
    with Watcher(plan, ledger, config.training.epochs, board) as watcher:
        if not all(trial.over for trial in ledger.trials()) or len(ledger.trials()) < samples:
            proposer = Proposer(ledger, points, tpe, samples, room, plan.config)
            aside(lambda: run_trials(plan, proposer, samples, options, watcher))


def confirm(config: SweepConfig, plan: SweepPlan, sweep: Sweep, best: Trial, room: Room, board: Board) -> Gain | None:
    """Train the defaults and the best settings with further seeds; None where there are none, or one failed."""
    if config.confirm_seeds == 0 or not best.settings:
        return None
    first = config.training.seed + 1
    points = [
        ({**settings, "seed": seed}, origin)
        for seed in range(first, first + config.confirm_seeds)
        for settings, origin in (({}, "defaults"), (best.settings, "best"))
    ]
    board.say(f"now the best settings and the defaults with {config.confirm_seeds} further seeds")
    ledger = Ledger(sweep.folder.inside(CONFIRM))
    plan = replace(plan, name=f"{plan.name}-{CONFIRM}", key=f"{plan.key}-{CONFIRM}", folder=ledger.folder.uri)
    again = Board(len(points), config.training.epochs, nll=config.objective == "nll")
    try:
        run_stage(config, plan, ledger, points, None, len(points), room, again)
    finally:
        again.close()
    values = {
        origin: tuple(t.objective for t in ledger.trials() if t.origin == origin and t.objective is not None)
        for origin in ("defaults", "best")
    }
    if not values["best"] or len(values["best"]) != len(values["defaults"]):
        return None
    return Gain(values["defaults"], values["best"])


def refit(
    training: TrainConfig, best: Trial, sweep: Sweep, parent: str | None, board: Board
) -> dict[str, dict[str, Any]]:
    """Train the defaults and the best settings on the whole training set, and test them: their summaries."""
    summaries: dict[str, dict[str, Any]] = {}
    for name, settings in (("defaults", {}), ("best", best.settings)):
        board.say(f"now the {name} on the whole training set")
        place = sweep.folder.inside(REFIT)
        config = with_settings(training, {**settings, "validation_fraction": 0.0, "test": True})
        whole = replace(
            config,
            run=replace(config.run, name=f"{sweep.name}-{name}", storage=place.uri, resume=_begun(place, sweep, name)),
        )
        summaries[name] = train(whole, Console(config.run.verbose))
    return summaries


def _begun(place: RunFolder, sweep: Sweep, name: str) -> bool:
    return place.inside(f"{sweep.name}-{name}").exists("config.yaml")


def summarise(
    config: SweepConfig, trials: Sequence[Trial], order: Sequence[Trial], gain: Gain | None, wall_seconds: float
) -> dict[str, Any]:
    """The content of a sweep's ``summary.json``."""

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
            "seeds": len(gain.best),
            "mean": gain.mean,
            "deviation": gain.deviation,
            "defaults": list(gain.defaults),
            "best": list(gain.best),
        },
        "trials": {
            status: sum(1 for t in trials if t.status == status) for status in ("finished", "stopped", "failed")
        },
        "training_seconds": sum(trial.seconds for trial in trials),
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
    if gain:
        unit, factor = ("", 1.0) if config.objective == "nll" else (" points", 100.0)
        spread = "" if gain["deviation"] is None else f" ± {factor * gain['deviation']:.2f}"
        lines.append(
            f"gain over the defaults: {factor * gain['mean']:+.2f}{spread}{unit}, {gain['seeds']} further seeds each, "
            f"validation ({text(fmean(gain['defaults']))} -> {text(fmean(gain['best']))})"
        )
    for name, found in (summary.get("refit") or {}).items():
        top1 = fmean(peer["top1"] for peer in found["peers"])
        lines.append(f"test, {name} on the whole training set: {100 * top1:.2f} % (mean of the peers)")
    counts = summary["trials"]
    lines.append(
        f"{counts['finished']} trials trained to the end, {counts['stopped']} stopped early, {counts['failed']} failed"
    )
    return lines


def parent_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The sweep's own metrics in MLflow."""
    metrics = {"best/objective": summary["best"]["objective"]}
    if summary["defaults"] and summary["defaults"]["objective"] is not None:
        metrics["defaults/objective"] = summary["defaults"]["objective"]
    if summary["gain"]:
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m metamixer_ray.tune``; returns its exit status."""

    def body(words: Sequence[str]) -> None:
        training, rest = take_config_file(words)
        tune(
            tyro.cli(
                SweepConfig,
                prog="python -m metamixer_ray.tune",
                description=f"{SweepConfig.__doc__}\n\nAll flags of metamixer_ray.train are those of every trial; "
                "--config FILE starts from a YAML file of them.",
                default=SweepConfig(training=training),
                args=rest,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
        )

    return run_command(body, argv)


if __name__ == "__main__":
    sys.exit(main())
