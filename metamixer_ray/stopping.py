"""Ending a training from outside, with all that it reserved given back at once.

The process that called Ray Train could only let go of the controller, and then what the workers reserve stays reserved
until that process ends. So the controller itself looks, as often as it looks at its workers, whether it is to stop.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback


class ToldToStop(Exception):
    """The training was ended from outside."""


@dataclass
class StopWhenTold(WorkerGroupCallback):
    """Ends the training, its workers first, when there is a file at ``path``; the controller runs on the same node."""

    path: str

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """See :class:`WorkerGroupCallback`; also each time that the workers have waited in vain for their place."""
        self._look()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """See :class:`WorkerGroupCallback`."""
        self._look()

    def _look(self) -> None:
        if Path(self.path).exists():
            raise ToldToStop("the training was ended from outside")
