"""Leaving a place that is taken away: spot machines and Kubernetes give notice, in time for a checkpoint.

Ray hears of it as a node that is drained, and Ray Train tells the workers; or a worker is sent SIGTERM. Either way all
ranks hear of it in the exchange, write a checkpoint after the running step and end. Ray Train then starts the group
again elsewhere, and doesn't count that as a failure; by itself it would wait until the notice's time is up.
"""

import signal
import threading
from types import FrameType
from typing import ClassVar

from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus
from ray.train.v2.api.preemption import PreemptionInfo

_terminated = threading.Event()
_NOW = PreemptionInfo(deadline_ms=1, preempted_node_to_ranks={})


def due() -> bool:
    """Whether this worker has to leave, as far as it knows. Costs nothing."""
    return _terminated.is_set() or get_train_context().preemption_context.preemption_info is not None


class HearSigterm(WorkerCallback):
    """Makes SIGTERM a notice in the workers, which it would end at once."""

    def after_init_train_context(self) -> None:
        """See :class:`WorkerCallback`; called in the main thread, the only one that may set a handler."""

        def hear(signum: int, frame: FrameType | None) -> None:
            _terminated.set()

        signal.signal(signal.SIGTERM, hear)


class LeavingGroup(WorkerGroup):
    """A group that is started again elsewhere as soon as its checkpoint is there."""

    leaving: ClassVar[bool] = False
    """Set by whoever heard that the checkpoint is there."""

    def _start(self) -> None:
        LeavingGroup.leaving = False
        super()._start()

    def poll_status(self, timeout: float | None = None) -> WorkerGroupPollStatus:
        """See :class:`WorkerGroup`; of a group that leaves, that its time is up."""
        status = super().poll_status(timeout)
        if self.leaving:
            for worker in status.worker_statuses.values():
                # All have ended, or are about to: neither is the end of the training, and none is a failure.
                worker.running, worker.error, worker.preemption_info = True, None, _NOW
        return status
