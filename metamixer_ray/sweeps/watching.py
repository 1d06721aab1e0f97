"""What a sweep's driver does as trials go: keep their records, close their MLflow runs, tell the person."""

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self

from metamixer_ray.config import flatten
from metamixer_ray.errors import UserError
from metamixer_ray.folder import RunFolder
from metamixer_ray.runs import TRACKED, journal_of
from metamixer_ray.starting import give_back
from metamixer_ray.sweeps.ledger import BROKE, ENDED, Ledger, Trial
from metamixer_ray.sweeps.trial import REACH_SECONDS, STOP_SECONDS, SweepPlan, outcomes
from metamixer_ray.tracking.mlflow_writer import Status as MlflowStatus

# For a store that answers, and for one that doesn't; what it then lacks is sent when the sweep is resumed.
CLOSE_SECONDS, AWAY_SECONDS = 60.0, 2.0
_WRITERS = 4
_LOOK_SECONDS = 0.2
_MLFLOW_STATUS: dict[str, MlflowStatus] = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "failed": "FAILED",
    "running": "KILLED",
}


class Board(Protocol):
    """Where a person sees how the trials go."""

    def running(self, trial: Trial) -> None:
        """A trial began, or finished an epoch."""

    def over(self, trial: Trial) -> None:
        """A trial ended."""

    def warn(self, text: str) -> None:
        """Something that asks for attention."""


class Watcher:
    """Hears of every trial from Ray Tune. A context: leaving it waits until MLflow has what it is to have.

    Args:
        plan: of the sweep.
        ledger: the record, see there.
        epochs: of a trial that isn't stopped early.
        board: shows how they go.
        parent: the id of the MLflow run that they are children of, once it is known.
        halted: whether the sweep is being stopped, so that trials that end now are to go on another time.
    """

    def __init__(
        self,
        plan: SweepPlan,
        ledger: Ledger,
        epochs: int,
        board: Board,
        parent: Callable[[], str | None],
        halted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._plan, self._ledger, self._epochs, self._board = plan, ledger, epochs, board
        self._parent, self._halted = parent, halted
        self._warned: set[str] = set()
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="mlflow-close")
        for trial in ledger.trials():
            # What was over when the driver was killed, but not yet told to MLflow.
            if trial.over and not ledger.place(trial.number).exists(TRACKED):
                self._close_later(trial)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for trial in self._ledger.trials():
            if not trial.over:
                self._close_later(trial)
        self._pool.shutdown(wait=True)

    def started(self, number: int) -> None:
        """A trial began, or was taken up again."""
        self._board.running(self._ledger.trial(number))

    def reported(self, number: int, result: Mapping[str, Any]) -> None:
        """An epoch of a trial."""
        if "epoch" in result and not result.get("failed"):
            self._board.running(self._record(number, result))

    def ended(self, number: int, result: Mapping[str, Any]) -> None:
        """A trial ran to its end, was stopped by the scheduler, or failed for good."""
        if self._halted():
            return  # it was not the scheduler that ended it
        if failed := result.get("failed"):
            self._over(self._ledger.update(number, status="failed", reason=failed, epochs=result.get("epoch", 0)))
            return
        finished = result.get("epoch", 0) >= self._epochs
        self._record(number, result)
        self._over(self._ledger.update(number, status="finished" if finished else "stopped"))

    def never_began(self, number: int, reason: str) -> None:
        """A trial whose settings can't work."""
        with suppress(OSError):
            self._ledger.place(number).write(ENDED, "")
        self._over(self._ledger.update(number, status="failed", reason=reason))

    def broke(self, number: int) -> None:
        """A trial failed as often as it may."""
        if not self._halted():
            told = None
            with suppress(OSError):
                told = self._ledger.place(number).read(BROKE)
            reason = told.decode() if told else "its process died, often of a lack of memory on the driver's node"
            self._over(self._ledger.update(number, status="failed", reason=reason))

    def await_ends(self, numbers: Collection[int]) -> None:
        """Return once these trials have let go of their workers, or didn't in a reasonable time."""
        deadline = time.monotonic() + STOP_SECONDS
        for number in numbers:
            self._await_end(self._ledger.place(number), deadline)

    def _await_end(self, folder: RunFolder, deadline: float) -> None:
        # A trial whose process died never says that it ended.
        while time.monotonic() < deadline:
            with suppress(OSError):
                if folder.exists(ENDED):
                    return
            time.sleep(_LOOK_SECONDS)

    def _record(self, number: int, result: Mapping[str, Any]) -> Trial:
        known = {
            "epochs": result["epoch"],
            "objective": result["objective"],
            "score": result["score"],
            "seconds": result["seconds"],
        }
        return self._ledger.update(number, **known)

    def _over(self, trial: Trial) -> None:
        self._board.over(trial)
        self._close_later(trial)

    def _close_later(self, trial: Trial) -> None:
        self._pool.submit(self._close, trial).add_done_callback(self._closed)

    def _warn_once(self, text: str) -> None:
        # What keeps one trial's writer from the store keeps all of them.
        if text not in self._warned:
            self._warned.add(text)
            self._board.warn(text)

    def _closed(self, done: Future[None]) -> None:
        if (error := done.exception()) is not None:
            self._board.warn(f"a trial's MLflow run could not be closed: {error}")

    def _settled(self, trial: Trial) -> Trial:
        """A trial as its record has it: what was stopped trained on until the stop had reached its workers."""
        told = self._ledger.read(trial.number, lambda folder: outcomes(folder, self._plan.objective))
        if trial.status != "stopped" or not told or told[-1]["epoch"] <= trial.epochs:
            return trial
        settled = self._record(trial.number, told[-1])
        return self._ledger.update(trial.number, status="finished") if settled.epochs >= self._epochs else settled

    def _close(self, trial: Trial) -> None:
        """Send MLflow what it lacks of a trial, and close its run with the status that fits."""
        # Its own controller may still be writing to the run.
        self._await_end(self._ledger.place(trial.number), time.monotonic() + STOP_SECONDS)
        self._ledger.read(trial.number, give_back)
        trial = self._settled(trial)
        rows = self._ledger.read(trial.number, lambda folder: journal_of(folder).rows())
        try:
            settings = flatten(self._plan.config(trial.settings))
        except UserError:
            settings = {**self._plan.training, **trial.settings}
        writer = self._plan.tracking(trial.name, settings).writer(self._warn_once)
        writer.offer(rows)
        if (parent := self._parent()) is not None:
            # Also when the store could not be reached when the trial began.
            writer.set_tags({"mlflow.parentRunId": parent})
        writer.set_tags({"sweep.status": trial.status if trial.over else "killed", "sweep.origin": trial.origin})
        if trial.reason:
            writer.set_tags({"sweep.reason": trial.reason})
        if trial.objective is not None:
            writer.log_metrics({"objective": trial.objective}, trial.epochs, rows[-1]["time"] if rows else None)
        writer.wait(REACH_SECONDS)
        patience = CLOSE_SECONDS if writer.run_id is not None else AWAY_SECONDS
        if writer.finish(_MLFLOW_STATUS[trial.status], patience) and trial.over:
            self._ledger.mark(trial.number, TRACKED)
