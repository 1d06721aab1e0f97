"""A comparison: ``python -m metamixer_ray.compare``. Methods under one protocol, and the table that compares them."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tyro
from ray.tune.schedulers import FIFOScheduler

from metamixer_ray.cli import STARTING_POINTS, run_command, take_starting_point
from metamixer_ray.comparison.config import CompareConfig
from metamixer_ray.comparison.methods import Method, read_method, read_methods
from metamixer_ray.comparison.outcomes import CONFIDENCE, Outcome, Standing, compare_outcomes, read_outcome
from metamixer_ray.comparison.table import as_csv, as_markdown, facts, metrics, trainings_csv
from metamixer_ray.config import with_settings
from metamixer_ray.data import load_splits
from metamixer_ray.errors import ConfigError, TrainingFailed, UserError
from metamixer_ray.placement import connect
from metamixer_ray.preparation import batch_order, build_peers, part_of
from metamixer_ray.runs import journal_of
from metamixer_ray.sharing import check_shared
from metamixer_ray.sweeps.engine import trial_resources
from metamixer_ray.sweeps.ledger import Ledger
from metamixer_ray.sweeps.opening import COMPARISON, SUMMARY, TRIALS, Sweep, create_sweep, facts_of, open_sweep
from metamixer_ray.sweeps.plans import parent_plan
from metamixer_ray.sweeps.spaces import Settings
from metamixer_ray.sweeps.underway import Underway, underway
from metamixer_ray.tracking.board import Board
from metamixer_ray.tracking.figures import comparison_sheet, figure_png
from metamixer_ray.tracking.figures.comparison_sheet import MethodBar
from metamixer_ray.tracking.files import json_text
from metamixer_ray.train import with_absolute_paths

TABLE, TABLE_CSV, TRAININGS_CSV, FIGURE = "table.md", "table.csv", "trainings.csv", "figures/comparison.png"


def compare(config: CompareConfig, board: Board | None = None) -> dict[str, Any]:
    """Train every method with every seed, and return the content of the comparison's ``summary.json``.

    Joins the Ray cluster at hand or starts a local one, and leaves it running. What a resumed comparison holds already
    isn't trained again, and stands in its table also where its method isn't named this time.

    Raises:
        UserError: what a person must mend: an option, a method, the data.
        TrainingFailed: no training came to an end.
        Stopped: by Ctrl-C or SIGTERM; it can be resumed.
    """
    began = time.perf_counter()
    config = replace(config, training=with_absolute_paths(config.training))
    config.check()
    run = replace(config.training.run, log_models=False)
    training = replace(config.training, test=True, run=run)
    methods = read_methods(config.methods, training)
    splits = load_splits(training.dataset, processes=os.cpu_count() or 1)
    part = part_of(training, splits, peer=0)
    build_peers(training, classes=len(splits.classes), image_size=splits.train.image_size)
    for method in methods:
        chosen = with_settings(training, method.settings)
        try:
            build_peers(chosen, classes=len(splits.classes), image_size=splits.train.image_size)
            batch_order(chosen, part_of(chosen, splits, peer=0))
        except UserError as error:
            raise ConfigError(f"--methods: {method.name}: {error}") from None
    protocol = facts_of(config, splits.fingerprint)
    sweep = open_sweep(COMPARISON, training, protocol, "-".join(training.peers))
    connect(training.placement, verbose=training.run.verbose)
    check_shared(training)
    resources = trial_resources(training)
    create_sweep(sweep, protocol)
    ledger = Ledger(sweep.folder.inside(TRIALS), training.run.storage_patience, board.warn if board else None)
    points = grid(methods, training.seed, config.seeds)
    known = [trial.settings for trial in ledger.trials()]
    samples = len(known) + sum(settings not in known for settings, _ in points)
    board = board or Board(samples, training.epochs)
    announce(config, methods, sweep, part.description, samples, board)
    subject = f"of {', '.join(method.name for method in methods)}"
    parent = parent_plan(
        training, sweep, protocol, module="metamixer_ray.compare", subject=subject, data=part.description
    )
    with underway(
        training,
        sweep,
        parent,
        splits,
        resources,
        board,
        most=config.max_concurrent,
        failures=config.trial_failures,
    ) as running:
        running.stages.run(ledger, points, None, samples, FIFOScheduler(), board)
        standings = stand(methods, ledger, training.batch_size)
        if not any(standing.outcomes for standing in standings):
            raise TrainingFailed(f"no training came to an end; the reasons are in {sweep.folder}/{TRIALS}")
        summary = {
            "methods": [facts(standing) for standing in standings],
            "peers": list(training.peers),
            "epochs": training.epochs,
            "data": part.description,
            "wall_seconds": time.perf_counter() - began,
        }
        publish(running, standings, summary, board)
    for line in as_markdown(standings).splitlines():
        board.say(line)
    for name, file in (("table", TABLE), ("figure", FIGURE)):
        board.say(f"{name:<9} {sweep.folder}/{file}")
    for line in running.places():
        board.say(line)
    return summary


def grid(methods: Sequence[Method], first_seed: int, seeds: int) -> list[tuple[Settings, str]]:
    """All that is to be trained, seed by seed, so that an unfinished comparison compares as well."""
    return [
        ({**method.settings, "seed": seed}, method.name)
        for seed in range(first_seed, first_seed + seeds)
        for method in methods
    ]


def stand(methods: Sequence[Method], ledger: Ledger, batch_size: int) -> list[Standing]:
    """How the methods stand by what the ledger's trainings came to; those that aren't named this time come last."""
    outcomes: dict[str, list[Outcome]] = {}
    failed: dict[str, list[str]] = {}
    known = {method.name: method for method in methods}
    for trial in ledger.trials():
        known.setdefault(trial.origin, read_method(trial.origin))
        seed = trial.settings["seed"]
        if trial.status == "finished":
            rows = ledger.read(trial.number, lambda folder: journal_of(folder).rows())
            outcomes.setdefault(trial.origin, []).append(read_outcome(rows, seed, batch_size))
        else:
            failed.setdefault(trial.origin, []).append(f"seed {seed}: {trial.reason}")
    return compare_outcomes(list(known.values()), outcomes, failed)


def publish(running: Underway, standings: Sequence[Standing], summary: dict[str, Any], board: Board) -> None:
    """Write the table, the figure and the summary to the folder and to the MLflow run."""
    running.keep(SUMMARY, json_text(summary))
    table = as_markdown(standings)
    running.keep(TABLE, table)
    running.keep(TABLE_CSV, as_csv(standings))
    running.keep(TRAININGS_CSV, trainings_csv(standings))
    running.writer.log_metrics(metrics(standings), 0)
    running.describe(table)
    title = f"{', '.join(summary['peers'])}; {summary['data']}; {summary['epochs']} epochs"
    try:
        sheet = comparison_sheet([bar(standing) for standing in standings], title=title, confidence=CONFIDENCE)
        running.keep(FIGURE, figure_png(sheet))
    except Exception as error:
        board.warn(f"the figure could not be drawn: {error}")


def bar(standing: Standing) -> MethodBar:
    """What the figure shows of a method."""

    def percent(mean: float, around: float | None) -> tuple[float, float | None]:
        return 100 * mean, None if around is None else 100 * around

    def over_seeds(value: Callable[[Outcome], float]) -> tuple[float, float | None] | None:
        found = standing.spread(value)
        return None if found is None else percent(found.mean, found.deviation)

    gain = standing.gain
    return MethodBar(
        name=standing.method.name,
        means=[100 * outcome.mean for outcome in standing.outcomes],
        ensembles=[100 * outcome.ensemble for outcome in standing.outcomes],
        mean=over_seeds(lambda outcome: outcome.mean),
        ensemble=over_seeds(lambda outcome: outcome.ensemble),
        gain=None if gain is None else percent(gain.mean, gain.half_width),
    )


def announce(
    config: CompareConfig, methods: Sequence[Method], sweep: Sweep, data: str, samples: int, board: Board
) -> None:
    """What the person is told before the first training."""
    training = config.training
    board.say(sweep.name)
    for name, text in (
        ("methods", ", ".join(method.name for method in methods)),
        ("trainings", f"{samples} of {training.epochs} epochs; {', '.join(training.peers)} on {data}"),
        ("folder", str(sweep.folder)),
    ):
        board.say(f"{name:<9} {text}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m metamixer_ray.compare``; returns its exit status."""

    def body(words: Sequence[str]) -> None:
        training, rest = take_starting_point(words)
        compare(
            tyro.cli(
                CompareConfig,
                prog="python -m metamixer_ray.compare",
                description=f"{CompareConfig.__doc__}\n\nAll flags of metamixer_ray.train are those of every training. "
                f"{STARTING_POINTS}",
                default=CompareConfig(training=training),
                args=rest,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
        )

    return run_command(body, argv)


if __name__ == "__main__":
    sys.exit(main())
