"""Stages that train, such as a sweep's search and its confirmation with further seeds, and what they share."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from metamixer_ray.config import TrainConfig
from metamixer_ray.interruption import aside
from metamixer_ray.sweeps.config import SweepConfig
from metamixer_ray.sweeps.engine import EngineOptions, Room, run_trials
from metamixer_ray.sweeps.findings import Gain
from metamixer_ray.sweeps.ledger import Ledger, Trial
from metamixer_ray.sweeps.opening import CONFIRM, Sweep
from metamixer_ray.sweeps.proposing import Limits, Proposer, Tpe
from metamixer_ray.sweeps.spaces import Settings
from metamixer_ray.sweeps.trial import SweepPlan, objectives, score_of
from metamixer_ray.sweeps.watching import Watcher
from metamixer_ray.tracking.board import Board

# Until all trials have let go of their workers.
HALT_SECONDS = 45.0


@dataclass(frozen=True)
class Stages:
    """How trials are run, be it to search, to confirm or to compare.

    Attributes:
        training: what they have in common.
        failures: how often a trial is taken up again when more than its workers died.
        most: trials at once.
        parent: the id of the sweep's MLflow run, once it is known.
    """

    training: TrainConfig
    failures: int
    plan: SweepPlan
    room: Room
    most: int
    parent: Callable[[], str | None]

    def run(
        self,
        ledger: Ledger,
        points: Sequence[tuple[Settings, str]],
        tpe: Tpe | None,
        samples: int,
        scheduler: TrialScheduler,
        board: Board,
    ) -> None:
        """Run the trials of a ledger that aren't over, and those that are to come.

        When it is interrupted, it ends all trials, which then are to go on another time, before it lets that be known.
        """
        halt, done = threading.Event(), threading.Event()
        for trial in ledger.trials():
            if trial.over:
                board.known(trial)
        options = EngineOptions(
            halted=halt.is_set,
            failures=self.failures,
            scheduler=scheduler,
            verbose=self.training.run.verbose,
        )
        limits = Limits(
            samples=samples,
            most=self.most,
            places=self.room.places,
            workers=lambda settings: self.plan.config(settings).workers,
            placeable=self.room.check,
        )
        with Watcher(self.plan, ledger, self.training.epochs, board, self.parent, halt.is_set) as watcher:
            proposer = Proposer(
                ledger,
                points,
                tpe,
                limits,
                never=watcher.never_began,
                left_out=lambda reason: board.warn(f"left out of the search: {reason}"),
                halted=halt.is_set,
            )
            if all(trial.over for trial in ledger.trials()) and len(ledger.trials()) >= samples:
                return

            def work() -> None:
                try:
                    run_trials(self.plan, proposer, samples, options, watcher)
                finally:
                    done.set()

            try:
                aside(work)
            except BaseException:
                halt.set()
                done.wait(HALT_SECONDS)
                raise


def curves(plan: SweepPlan, ledger: Ledger) -> dict[str, dict[int, float]]:
    """Scores after each epoch of the trials that an earlier attempt ran, by their names."""
    return {
        trial.name: {
            epoch: score_of(value, plan.objective)
            for epoch, value in ledger.read(trial.number, lambda folder: objectives(folder, plan.objective)).items()
        }
        for trial in ledger.trials()
    }


def confirm(config: SweepConfig, stages: Stages, sweep: Sweep, best: Trial, board: Board) -> Gain | None:
    """Train the defaults and the best settings with further seeds; None where there is nothing to confirm."""
    if config.confirm_seeds == 0 or not best.settings:
        return None
    first = config.training.seed + 1
    points = [
        ({**settings, "seed": seed}, origin)
        for seed in range(first, first + config.confirm_seeds)
        for settings, origin in (({}, "defaults"), (best.settings, "best"))
    ]
    board.say(f"now the best settings and the defaults with {config.confirm_seeds} further seeds")
    # Another search may find another best.
    name = f"{CONFIRM}-{best.name}"
    ledger = Ledger(sweep.folder.inside(name), config.training.run.storage_patience, board.warn)
    plan = stages.plan
    plan = replace(plan, name=f"{plan.name}-{name}", key=f"{plan.key}-{name}", folder=ledger.folder.uri)
    again = board.next(len(points))
    try:
        replace(stages, plan=plan).run(ledger, points, None, len(points), FIFOScheduler(), again)
    finally:
        again.close()
    values: dict[str, dict[int, float]] = {"defaults": {}, "best": {}}
    failed = []
    for trial in ledger.trials():
        if trial.status == "finished" and trial.objective is not None:
            values[trial.origin][trial.settings["seed"]] = trial.objective
        else:
            failed.append(f"{trial.origin}, seed {trial.settings['seed']}: {trial.reason}")
    seeds = sorted(values["defaults"].keys() & values["best"].keys())
    before, after = (tuple(values[origin][seed] for seed in seeds) for origin in ("defaults", "best"))
    return Gain(before, after, config.maximised, tuple(failed))
