"""One trial: a whole training of peers on its own Ray Train workers, whose epochs Ray Tune hears of.

The trial's own process only waits: it reserves next to nothing, and runs where the sweep's driver runs. What it leaves
is an ordinary run folder, so a trial that is taken up again goes on from its last checkpoint.
"""

import logging
import os
import queue
import shlex
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from ray import tune

from metamixer_ray.capacity import WorkerResources
from metamixer_ray.config import TrainConfig, flatten, from_settings
from metamixer_ray.errors import TrainingDiverged, UserError
from metamixer_ray.fitting import fit
from metamixer_ray.folder import RunFolder
from metamixer_ray.keeping import TrackingPlan, tracked_parameters
from metamixer_ray.patience import insist
from metamixer_ray.placement import connect
from metamixer_ray.reporting import first_line
from metamixer_ray.runs import CONFIG, check_images, journal_of, write_run
from metamixer_ray.sweeps.config import ObjectiveName
from metamixer_ray.sweeps.ledger import BROKE, ENDED
from metamixer_ray.tracking.summary import trial_description

logger = logging.getLogger(__name__)

WORST_NLL = 100.0
STOP_SECONDS = 30.0
SILENCE_SECONDS = 2.0
REACH_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What all trials of a sweep have in common, as plain data that travels to them."""

    name: str
    key: str
    folder: str
    """URI of the folder that holds the trials' run folders."""
    training: Mapping[str, Any]
    """All settings of the sweep's training, flat."""
    objective: ObjectiveName
    split: Literal["test", "validation"]
    """On which it is watched; a search never looks at the test set."""
    resources: WorkerResources
    facts: Mapping[str, Any]
    """What ``run.json`` tells of the data."""
    tracking_uri: str
    artifact_location: str | None
    parent_run_id: str | None
    about: str
    """What each of them is, in words."""
    tags: Mapping[str, str]
    environment: Mapping[str, str]
    """How MLflow and storage are reached: processes of a cluster that was joined don't have the driver's variables."""

    def config(self, settings: Mapping[str, Any]) -> TrainConfig:
        """The configuration of a trial.

        Raises:
            UserError: the settings don't fit together.
        """
        config = from_settings({**self.training, **settings}, source="trial")
        config.check()
        return config

    def tracking(self, name: str, settings: Mapping[str, Any]) -> TrackingPlan:
        """How a trial is written to MLflow."""
        flat = {**self.training, **settings}
        folder = RunFolder(self.folder).inside(name)
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        changed = {key: value for key, value in plain.items() if value != self.training.get(key)}
        command = shlex.join(["python", "-m", "metamixer_ray.train", "--config", f"{folder}/{CONFIG}"])
        return TrackingPlan(
            uri=self.tracking_uri,
            experiment=str(flat["experiment"]),
            run_name=f"{self.name}-{name}",
            key=f"{self.key}-{name}",
            parameters=tracked_parameters(flat),
            tags={
                **self.tags,
                "sweep": self.name,
                "sweep.trial": name,
                "mixer": flat["mixer"],
                "distiller": flat["distiller"],
                "run_folder": str(folder),
                "mlflow.note.content": trial_description(self.about, flat, changed, str(folder), command),
            },
            artifact_location=self.artifact_location,
            parent_run_id=self.parent_run_id,
        )


def objective_of(row: Mapping[str, Any], objective: ObjectiveName) -> float | None:
    """How good an epoch was on the split that is watched; None when it wasn't evaluated."""
    peers: Sequence[Mapping[str, Any]] = row["peers"]
    if peers[0].get("top1") is None:
        return None
    if objective == "ensemble":
        return float((row["ensemble"] or peers[0])["top1"])
    if objective == "nll":
        return fmean(WORST_NLL if peer["nll"] is None else peer["nll"] for peer in peers)
    hits = [peer["top1"] for peer in peers]
    return float({"mean": fmean(hits), "best": max(hits), "worst": min(hits)}[objective])


def outcome_of(row: Mapping[str, Any], kind: ObjectiveName) -> dict[str, Any] | None:
    """How far a trial got and how good it was there; None for an epoch that wasn't evaluated."""
    if (objective := objective_of(row, kind)) is None:
        return None
    score = score_of(objective, kind)
    return {"epoch": int(row["epoch"]), "objective": objective, "score": score, "seconds": row["elapsed"]}


def outcomes(folder: RunFolder, kind: ObjectiveName) -> list[dict[str, Any]]:
    """What came of a trial after each epoch that was evaluated, from the record in its run folder."""
    found = (outcome_of(row, kind) for row in journal_of(folder).rows())
    return [outcome for outcome in found if outcome is not None]


def objectives(folder: RunFolder, kind: ObjectiveName) -> dict[int, float]:
    """The objective after each epoch of a trial that was evaluated."""
    return {outcome["epoch"]: outcome["objective"] for outcome in outcomes(folder, kind)}


def score_of(objective: float, kind: ObjectiveName) -> float:
    """The objective turned so that more is better."""
    return -objective if kind == "nll" else objective


class PeersTrial(tune.Trainable):
    """Ray Tune's view of a trial: each of its steps is an epoch of the training that goes on meanwhile."""

    def setup(self, config: dict[str, Any], plan: SweepPlan | None = None) -> None:
        """See :class:`ray.tune.Trainable`; ``config`` has the ``number`` and the ``settings``."""
        assert plan is not None
        os.environ.update(plan.environment)
        self._plan, self._settings = plan, config["settings"]
        self._name = f"{config['number']:04d}"
        self._folder = RunFolder(plan.folder).inside(self._name)
        self._news: queue.Queue[Mapping[str, Any] | BaseException | None] = queue.Queue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._last: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        """The next epoch that was evaluated; ``done`` with the last one, and when the trial failed for good.

        Tune can't stop a trial in the midst of a step, so a long epoch is many steps that say nothing.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="trial", daemon=True)
            self._thread.start()
        try:
            news = self._news.get(timeout=SILENCE_SECONDS)
        except queue.Empty:
            return {"done": False}
        # Storage that fails will do so for a while only: then it is taken up again, as after its process died.
        if isinstance(news, UserError | TrainingDiverged) and not isinstance(news, OSError):
            return self._ended(failed=str(news).splitlines()[0])
        if isinstance(news, BaseException):
            with suppress(OSError):
                self._folder.write(BROKE, first_line(news))
            raise news
        if news is None:
            return self._ended()
        self._last = outcome_of(news, self._plan.objective) or {}
        return {**self._last, "done": False}

    def cleanup(self) -> None:
        """End the training, if it still runs, so that its workers are free before this returns."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
        with suppress(OSError):
            self._folder.write(ENDED, "")

    def _ended(self, failed: str | None = None) -> dict[str, Any]:
        worst = WORST_NLL if self._plan.objective == "nll" else 0.0
        nothing = {"epoch": 0, "objective": worst, "score": score_of(worst, self._plan.objective), "seconds": 0.0}
        if failed is None:
            return {**nothing, **self._last, "done": True}
        return {**nothing, "epoch": self._last.get("epoch", 0), "failed": failed, "done": True}

    def _train(self) -> None:
        plan, folder = self._plan, self._folder
        try:
            config = plan.config(self._settings)
            connect(config.placement, verbose=config.run.verbose)
            what, patience = f"{folder} can't be used", config.run.storage_patience
            if rows := insist(lambda: self._open(config), what, patience, logger.warning):
                # Those before the last were told before the trial was interrupted.
                self._tell(rows[-1])
            tracking = plan.tracking(self._name, flatten(config))
            writer = tracking.writer()
            try:
                images = plan.facts["data_fingerprint"]
                fit(config, plan.resources, folder, tracking.key, images, writer, _Listener(self._tell), self._stop)
            finally:
                writer.wait(REACH_SECONDS)
            self._news.put(None)
        except BaseException as error:
            self._news.put(error)

    def _open(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Make the trial's folder a run's; its rows.

        Raises:
            DataError: an earlier attempt was on other images.
        """
        check_images(self._folder, self._plan.facts["data_fingerprint"])
        self._folder.remove(ENDED)
        self._folder.remove(BROKE)
        write_run(self._folder, config, {**self._plan.facts, "key": f"{self._plan.key}-{self._name}"})
        return journal_of(self._folder).rows()

    def _tell(self, row: Mapping[str, Any]) -> None:
        assert row["split"] == self._plan.split
        if objective_of(row, self._plan.objective) is not None:
            self._news.put(row)


class _Listener:
    """Passes the epochs on, and keeps the rest to itself: the sweep's console has no room for it."""

    def __init__(self, tell: Any) -> None:
        self.epoch = tell

    def step(self, epoch: int, step: int, steps: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
