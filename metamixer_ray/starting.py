"""Workers that die while Ray Train starts their group: the group is started again, as it is when they die later.

Ray Train (2.60) does so itself only for a death in some of the moments of a start. In the others it gives up, or starts
again without giving back what the first group had reserved, and then waits for it for ever. Where this reaches into
what Ray keeps to itself, it is through the attribute and the callback that are there to be replaced.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Timer
from typing import Any, ClassVar

import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import GetTimeoutError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import PreemptingState, RestartingState, RunningState
from ray.train.v2._internal.execution.worker_group import Worker
from ray.util.placement_group import PlacementGroup, remove_placement_group

from metamixer_ray.deaths import GONE
from metamixer_ray.departure import LeavingGroup
from metamixer_ray.folder import RunFolder
from metamixer_ray.reporting import tell

# Starts in which a worker dies, in a row: the next would fail as well. Fewer than deaths later on, since what starts
# first is often what takes too much memory.
HOPELESS_STARTS = 5
SIGN_OF_LIFE_SECONDS = 10.0
# How many times as long as for an answer workers may take to start: imports and process groups take their time.
START_SHARE = 10
# Is there while workers have reserved something: the placement group's id.
RESERVED = ".reserved"


class TidyWorkerGroup(LeavingGroup):
    """A group that gives everything back when it can't be started, and says so in a way that is tried again."""

    allowed: ClassVar[int] = HOPELESS_STARTS
    failed_in_a_row: ClassVar[int] = 0
    folder_uri: ClassVar[str] = ""
    _hung: Timer | None = None

    def _create_placement_group(self, *args: Any) -> Any:
        handle = super()._create_placement_group(*args)
        # Before anybody waits for it, which may take hours in which the controller may die. That storage fails is no
        # reason to end.
        with suppress(OSError):
            RunFolder.again(self.folder_uri).write(RESERVED, handle.placement_group.id.hex())
        return handle

    def _create_workers(self, num_workers: int, placement_group: PlacementGroup, *args: Any, **others: Any) -> Any:
        # From here until they train Ray waits for them without an end. Without their place they are killed, and that
        # it hears of.
        self._hung = Timer(START_SHARE * self._worker_health_check_timeout_s, remove_placement_group, [placement_group])
        self._hung.daemon = True
        self._hung.start()
        return super()._create_workers(num_workers, placement_group, *args, **others)

    def _start(self) -> None:
        cls = type(self)
        try:
            super()._start()
        except Exception as error:
            hung = self._hung is not None and self._hung.finished.is_set()
            lost = hung or isinstance(error, (*GONE, WorkerGroupStartupFailedError))
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
            what = "hung" if hung else "died"
            raise WorkerGroupStartupFailedError(f"it {what} while the workers were being started") from error
        finally:
            if self._hung is not None:
                self._hung.cancel()
        cls.failed_in_a_row = 0


def is_dead(worker: Worker) -> bool:
    """Whether a worker's process is gone; one that is slow to answer is not."""
    try:
        ray.get(worker.actor.get_metadata.remote(), timeout=SIGN_OF_LIFE_SECONDS)
    except GetTimeoutError:
        return False
    except GONE:
        return True
    return False


class PeersTrainer(TorchTrainer):
    """Ray Train's trainer without two helpers, each a process that imports for seconds before anything starts.

    One serves Ray's own datasets. The other gives back what a killed controller had reserved, where a dashboard runs
    that tells it of the death; :class:`SafeStarts` makes a note of it instead.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        unused = DatasetsCallback | PlacementGroupCleanerCallback
        return [callback for callback in callbacks if not isinstance(callback, unused)]


def give_back(folder: RunFolder) -> None:
    """Give back what the workers of a run's earlier attempt had reserved, if its controller died before it could.

    Ray does that by itself only when the process that called Ray Train ends.
    """
    if note := folder.read(RESERVED):
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(note.decode())))
        folder.remove(RESERVED)


@dataclass
class SafeStarts(ControllerCallback, WorkerGroupCallback):
    """Has the controller start tidy groups, notes what they reserve, and tells when they wait for it, have it, or must
    be started again.

    Args:
        live: the file that the driver's console follows.
        folder_uri: the run's.
        max_failures: 0 when nothing may be started again.
    """

    live: str
    folder_uri: str
    max_failures: int

    def after_controller_start(self, train_run_context: Any) -> None:
        """See :class:`ControllerCallback`; no group has been started yet."""
        TidyWorkerGroup.allowed = min(HOPELESS_STARTS, self.max_failures + 1)
        TidyWorkerGroup.folder_uri = self.folder_uri
        TrainController.worker_group_cls = TidyWorkerGroup

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """See :class:`WorkerGroupCallback`."""
        with suppress(OSError):
            RunFolder.again(self.folder_uri).remove(RESERVED)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """See :class:`ControllerCallback`."""
        error = getattr(getattr(current_state, "training_failed_error", None), "controller_failure", None)
        if isinstance(error, WorkerGroupStartupFailedError):
            self._tell({"event": "failure", "message": f"a worker failed ({error})"})
        elif isinstance(error, WorkerGroupStartupTimeoutError):
            self._tell({"event": "waiting"})
        elif isinstance(current_state, RunningState) and not isinstance(previous_state, RunningState):
            self._tell({"event": "placed"})
        elif isinstance(previous_state, PreemptingState) and isinstance(current_state, RestartingState):
            self._tell({"event": "left"})

    def _tell(self, event: Mapping[str, Any]) -> None:
        tell(self.live, event)
