"""Many trainings while they run: the MLflow run that they are children of, and how it ends."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from metamixer_ray.capacity import WorkerResources
from metamixer_ray.claiming import claimed
from metamixer_ray.config import TrainConfig
from metamixer_ray.data import Splits
from metamixer_ray.growth import startable
from metamixer_ray.interruption import Stopped, stoppable
from metamixer_ray.keeping import TrackingPlan, ui_command
from metamixer_ray.patience import insist
from metamixer_ray.sweeps.config import ObjectiveName
from metamixer_ray.sweeps.engine import Room, most_at_once
from metamixer_ray.sweeps.opening import Sweep
from metamixer_ray.sweeps.plans import plan_trials
from metamixer_ray.sweeps.stages import Stages
from metamixer_ray.tracking import MlflowWriter
from metamixer_ray.tracking.board import Board

REACH_SECONDS = 10.0
FINISH_SECONDS = 60.0


@dataclass(frozen=True)
class Underway:
    """A sweep or a comparison whose trainings run: where they are run, and where what they come to is kept."""

    sweep: Sweep
    stages: Stages
    writer: MlflowWriter
    parent: TrackingPlan
    patience: float
    """Seconds for which a folder that can't be written is tried again."""
    warn: Callable[[str], None]

    def keep(self, name: str, content: bytes | str) -> None:
        """Write a file to the folder and to the MLflow run."""
        data = content.encode() if isinstance(content, str) else content
        folder = self.sweep.folder
        insist(lambda: folder.write(name, data), f"{folder}/{name} can't be written", self.patience, self.warn)
        self.writer.log_artifact(data, name)

    def describe(self, found: str) -> None:
        """Put what came of it (Markdown) above the description of the MLflow run."""
        self.writer.set_tags({"mlflow.note.content": f"{found}\n\n{self.parent.tags['mlflow.note.content']}"})

    def places(self) -> list[str]:
        """Where a person finds all this in MLflow."""
        plan = self.parent
        lines = (
            ("MLflow", plan.place(self.writer.experiment_id, self.writer.run_id)),
            ("open it", ui_command(plan.uri)),
        )
        return [f"{name:<9} {text}" for name, text in lines if text]


@contextmanager
def underway(
    training: TrainConfig,
    sweep: Sweep,
    parent: TrackingPlan,
    splits: Splits,
    resources: WorkerResources,
    board: Board,
    *,
    most: int | None,
    failures: int,
    objective: ObjectiveName = "mean",
) -> Iterator[Underway]:
    """What trainings that differ from ``training`` in their settings need while they run.

    Args:
        parent: how all of it is written to MLflow.
        resources: of each worker.
        most: trainings at once; None: as many as this node has memory for.
        failures: how often one is taken up again when more than its workers died.

    Raises:
        ConfigError: another process is at work on them.
        Stopped: by Ctrl-C or SIGTERM; the person is told how to go on.
    """
    claim = ExitStack()
    claim.enter_context(claimed(sweep.folder))
    writer = parent.writer(board.warn, board.say)
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        with stoppable() as first:
            first.append(lambda: writer.mark("KILLED"))
            facts, patience = sweep.kind.facts, training.run.storage_patience
            read = insist(lambda: sweep.folder.read(facts), f"{sweep.folder} can't be read", patience, board.warn)
            writer.log_artifact(read or b"", facts)
            writer.wait(REACH_SECONDS)
            room = Room(resources, startable(training.placement.grows_to))
            plan = plan_trials(training, sweep, parent, resources, splits, writer.run_id, objective)
            stages = Stages(training, failures, plan, room, most_at_once(most), lambda: writer.run_id)
            board.say(f"{'at once':<9} {max(1, min(room.places() // training.workers, stages.most))} now")
            yield Underway(sweep, stages, writer, parent, patience, board.warn)
        status = "FINISHED"
    except Stopped as stopped:
        status = "KILLED"
        board.warn(f"{stopped}; the same command with --name {sweep.name} --resume goes on")
        raise
    finally:
        board.close()
        writer.finish(status, FINISH_SECONDS)
        claim.close()
