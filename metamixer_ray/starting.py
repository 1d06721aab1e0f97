"""Workers that die while Ray Train starts their group: the group is started again, as it is when they die later.

Ray Train (2.60) does so itself only for a death in some of the moments of a start. In the others it gives up, or starts
again without giving back what the first group had reserved, and then waits for it for ever. Where this reaches into
what Ray keeps to itself, it is through the attribute and the callback that are there to be replaced.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup

# Starts that fail in a row: the next would fail as well.
HOPELESS_STARTS = 3
SIGN_OF_LIFE_SECONDS = 10.0


class TidyWorkerGroup(WorkerGroup):
    """A group that gives everything back when it can't be started, and says so in a way that is tried again."""

    allowed: ClassVar[int] = HOPELESS_STARTS
    failed_in_a_row: ClassVar[int] = 0

    def _start(self) -> None:
        cls = type(self)
        try:
            super()._start()
        except Exception as error:
            lost = isinstance(error, RayActorError | WorkerGroupStartupFailedError)
            if self.has_started():
                # What the others met is often only what the death of one looks like from afar.
                lost = lost or any(is_dead(worker) for worker in self.get_workers())
                state = self.get_worker_group_state()
                self._clear_state()
                state.shutdown()
            if not lost:
                raise
            cls.failed_in_a_row += 1
            if cls.failed_in_a_row >= cls.allowed:
                raise RuntimeError(
                    f"a worker died while the workers were being started, {cls.failed_in_a_row} times in a row; "
                    "the workers' log files under Ray's session folder tell why, often it is memory"
                ) from error
            raise WorkerGroupStartupFailedError("it died while the workers were being started") from error
        cls.failed_in_a_row = 0


def is_dead(worker: Worker) -> bool:
    """Whether a worker's process is gone; one that is slow to answer is not."""
    try:
        ray.get(worker.actor.get_metadata.remote(), timeout=SIGN_OF_LIFE_SECONDS)
    except GetTimeoutError:
        return False
    except RayActorError:
        return True
    return False


@dataclass
class SafeStarts(ControllerCallback):
    """Has the controller start tidy groups, and tells the person when one had to be started again.

    Args:
        live: the file that the driver's console follows.
        max_failures: 0 when nothing may be started again.
    """

    live: str
    max_failures: int

    def after_controller_start(self, train_run_context: Any) -> None:
        """See :class:`ControllerCallback`; no group has been started yet."""
        TidyWorkerGroup.allowed = min(HOPELESS_STARTS, self.max_failures + 1)
        TrainController.worker_group_cls = TidyWorkerGroup

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """See :class:`ControllerCallback`."""
        error = getattr(getattr(current_state, "training_failed_error", None), "controller_failure", None)
        if isinstance(error, WorkerGroupStartupFailedError):
            with Path(self.live).open("a") as file:
                file.write(json.dumps({"event": "failure", "message": str(error)}) + "\n")
