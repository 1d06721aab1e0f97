"""Deaths, as they look from afar: what Ray, the collectives and helpers raise where a process is gone."""

import re
from collections.abc import Sequence

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

from metamixer_ray.errors import ProcessKilled

GONE = (RayActorError, OutOfMemoryError)
"""What a call to an actor raises whose process is gone. Before a machine's memory is full Ray kills processes on it,
whoever filled it."""
# What the collectives' backends say of a process that is gone.
_CUT = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|remote process exited")


def cause_of(error: BaseException) -> BaseException:
    """The exception that a worker raised, out of the wrappers that Ray puts around it."""
    for name in ("cause", "_base_exc", "health_check_failure"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return cause_of(inner)
    return error


def tells_of_a_death(causes: Sequence[BaseException]) -> bool:
    """Whether a group failed because a worker, a process that helps it or its machine is gone, or doesn't answer, which
    says less of the next attempt than what code raises. What the others raise then doesn't count, and may be all that
    is known."""
    gone = any(isinstance(cause, (*GONE, ProcessKilled, WorkerHealthCheckTimeoutError)) for cause in causes)
    return gone or all(_CUT.search(str(cause)) for cause in causes)
