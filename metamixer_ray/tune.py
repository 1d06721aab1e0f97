"""A sweep: ``python -m metamixer_ray.tune``. Many trainings, each of peers that learn together, tell what is best."""

import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import tyro

from metamixer_ray.capacity import WorkerResources
from metamixer_ray.cli import STARTING_POINTS, run_command, take_starting_point
from metamixer_ray.config import (
    TrainConfig,
    afresh,
    from_settings,
    nest,
    plain_settings,
    to_yaml,
    with_settings,
)
from metamixer_ray.data import load_splits
from metamixer_ray.distill import needs_validation
from metamixer_ray.errors import TrainingFailed, UserError
from metamixer_ray.placement import connect
from metamixer_ray.preparation import batch_order, build_peers, part_of
from metamixer_ray.runs import CONFIG
from metamixer_ray.settings_text import read_settings
from metamixer_ray.sharing import check_shared
from metamixer_ray.sweeps.config import DEFAULT_VALIDATION, SweepConfig
from metamixer_ray.sweeps.engine import trial_resources
from metamixer_ray.sweeps.findings import ranked
from metamixer_ray.sweeps.ledger import Ledger, Trial
from metamixer_ray.sweeps.opening import (
    BEST,
    REFIT,
    SPACE,
    SUMMARY,
    SWEEP,
    TRIALS,
    Sweep,
    create_sweep,
    facts_of,
    for_trials,
    open_sweep,
)
from metamixer_ray.sweeps.plans import parent_plan
from metamixer_ray.sweeps.portraits import sweep_figures
from metamixer_ray.sweeps.proposing import Tpe
from metamixer_ray.sweeps.schedulers import build_scheduler
from metamixer_ray.sweeps.spaces import Settings, Space, describe, draws, grid, load_spaces, searchable
from metamixer_ray.sweeps.stages import confirm, curves
from metamixer_ray.sweeps.telling import closing, objective_text, parent_metrics, refitted, summarise, trained_on
from metamixer_ray.sweeps.underway import Underway, underway
from metamixer_ray.tracking import Console
from metamixer_ray.tracking.board import Board
from metamixer_ray.tracking.files import json_text
from metamixer_ray.train import train, with_absolute_paths


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
    training, facts = config.training, facts_of(config, splits.fingerprint)
    part = part_of(training, splits, peer=0)
    batch_order(training, part)
    sweep = open_sweep(SWEEP, training, facts, spaces_text(config))
    connect(training.placement, verbose=training.run.verbose)
    check_shared(training)
    resources = trial_resources(training)
    create_sweep(sweep, facts)
    board = board or Board(samples, training.epochs, nll=config.objective == "nll")
    announce(config, sweep, part.description, resources, samples, board)
    subject = f"over {', '.join(config.space)}"
    parent = parent_plan(training, sweep, facts, module="metamixer_ray.tune", subject=subject, data=part.description)
    with underway(
        training,
        sweep,
        parent,
        splits,
        resources,
        board,
        most=config.max_concurrent,
        failures=config.trial_failures,
        objective=config.objective,
    ) as running:
        running.writer.log_artifact(describe(space).encode(), SPACE)
        stages, search = running.stages, Ledger(sweep.folder.inside(TRIALS), training.run.storage_patience, board.warn)
        scheduler = build_scheduler(config, curves(stages.plan, search))
        searching = time.perf_counter()
        stages.run(search, points, build_tpe(config, space), samples, scheduler, board)
        search_seconds = time.perf_counter() - searching
        order = ranked(search.trials(), maximised=config.maximised)
        if not order:
            raise TrainingFailed(f"no trial came to an end; the reasons are in {sweep.folder}/{TRIALS}")
        gain = confirm(config, stages, sweep, order[0], board)
        wall_seconds = time.perf_counter() - began
        summary = summarise(
            config, search.trials(), order, gain, search_seconds=search_seconds, wall_seconds=wall_seconds
        )
        running.keep(BEST, to_yaml(best_config(asked.training, order[0])))
        publish(config, running, summary)
        for line in closing(config, summary):
            board.say(line)
        draw(config, running, search, board)
        if config.refit:
            # Whatever becomes of these, what was found is written and told.
            summary["refit"] = refit(asked.training, order[0], sweep, board, running.writer.run_id)
            publish(config, running, summary)
            for line in refitted(summary):
                board.say(line)
    board.say(f"{'best':<9} {sweep.folder}/{BEST}   (python -m metamixer_ray.train --config takes it)")
    board.say(f"{'figures':<9} {sweep.folder}/figures")
    for line in running.places():
        board.say(line)
    return summary


def publish(config: SweepConfig, running: Underway, summary: Mapping[str, Any]) -> None:
    """Write what was found to the sweep's folder and to its MLflow run."""
    running.keep(SUMMARY, json_text(summary))
    running.writer.log_metrics(parent_metrics(summary), 0)
    running.describe("\n\n".join([*closing(config, summary), *refitted(summary)]))


def draw(config: SweepConfig, running: Underway, search: Ledger, board: Board) -> None:
    """Draw the sweep's figures; without them it is still whole."""
    try:
        figures = sweep_figures(config, search)
    except Exception as error:
        board.warn(f"the figures could not be drawn: {error}")
        return
    for name, png in figures.items():
        running.keep(f"figures/{name}.png", png)


def best_config(training: TrainConfig, best: Trial) -> TrainConfig:
    """What ``train --config`` takes to train with the best settings and test them, see :func:`for_testing`."""
    (chosen,) = for_testing(training, [best.settings])
    return afresh(chosen)


def for_testing(training: TrainConfig, chosen: Sequence[Settings]) -> list[TrainConfig]:
    """Trainings with these settings that end with the test images, all on the same training images: the whole set,
    but where a distiller asks for a validation split, what it leaves."""
    configs = [with_settings(training, {**settings, "test": True}) for settings in chosen]
    held_out = training.dataset.validation_fraction or DEFAULT_VALIDATION
    fraction = held_out if any(needs_validation(config.distillation) for config in configs) else 0.0
    return [with_settings(config, {"validation_fraction": fraction}) for config in configs]


def spaces_text(config: SweepConfig) -> str:
    """The names of what is searched, for a folder's name."""
    return "-".join(name.rpartition("/")[2].removesuffix(".py").rpartition(".")[2] for name in config.space)


def announce(
    config: SweepConfig,
    sweep: Sweep,
    data: str,
    resources: WorkerResources,
    samples: int,
    board: Board,
) -> None:
    """What the person is told before the first trial."""
    training = config.training
    board.say(sweep.name)
    for name, text in (
        ("search", f"{config.search} over {', '.join(config.space)}; {samples} trials of {training.epochs} epochs"),
        ("trial", f"{', '.join(training.peers)} on {data}; {training.workers} workers, {resources}"),
        ("objective", f"{objective_text(config)} (validation); scheduler {config.scheduler}"),
        ("folder", str(sweep.folder)),
    ):
        board.say(f"{name:<9} {text}")


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
    settings = read_settings(path, source=f"--first {path}")
    flat: Settings = {}
    for name, value in nest(settings, source=f"--first {path}").items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    from_settings(flat, source=f"--first {path}")
    # Of a whole configuration, what trials have in common is the sweep's.
    return {name: value for name, value in flat.items() if searchable(name)}


def build_tpe(config: SweepConfig, space: Space) -> Tpe | None:
    """HyperOpt's proposals, where the options ask for them."""
    if config.search != "tpe":
        return None
    return Tpe(
        space,
        seed=config.search_seed,
        random_first=config.random_first,
        defaults=plain_settings(config.training),
    )


def refit(
    training: TrainConfig, best: Trial, sweep: Sweep, board: Board, parent_run_id: str | None
) -> dict[str, dict[str, Any]]:
    """Train the defaults and the best settings once more, and test them (:func:`for_testing`): their summaries."""
    summaries: dict[str, dict[str, Any]] = {}
    place = sweep.folder.inside(REFIT)
    names = {"defaults": "defaults", "best": f"best-{best.name}"}
    for (condition, name), config in zip(names.items(), for_testing(training, [{}, best.settings]), strict=True):
        if condition == "best" and not best.settings:
            summaries[condition] = summaries["defaults"]
            continue
        held_out = config.dataset.validation_fraction
        board.say(f"now the {condition} on {trained_on(held_out)}")
        # A sweep that is taken up again with more trials may have another best, which holds out something or nothing.
        name = f"{sweep.name}-{name}" + (f"-without-{held_out:g}" if held_out else "")
        begun = place.inside(name).exists(CONFIG)
        whole = replace(config, run=replace(config.run, name=name, storage=place.uri, resume=begun))
        found = train(whole, Console(config.run.verbose), parent_run_id=parent_run_id)
        summaries[condition] = {**found, "held_out": held_out}
    return summaries


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m metamixer_ray.tune``; returns its exit status."""

    def body(words: Sequence[str]) -> None:
        training, rest = take_starting_point(words)
        tune(
            tyro.cli(
                SweepConfig,
                prog="python -m metamixer_ray.tune",
                description=f"{SweepConfig.__doc__}\n\nAll flags of metamixer_ray.train are those of every trial. "
                f"{STARTING_POINTS}",
                default=SweepConfig(training=training),
                args=rest,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
        )

    return run_command(body, argv)


if __name__ == "__main__":
    sys.exit(main())
