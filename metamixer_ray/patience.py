"""Storage that fails for a while: trying again, less and less often, and saying what is wrong in a way that helps."""

import errno
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from metamixer_ray.errors import StorageFailed

T = TypeVar("T")

FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0
"""Seconds between two attempts: doubled from one to the next."""

_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or raise the quota",
    errno.EFBIG: "raise the limit of a file's size",
    errno.EROFS: "make it writable",
    errno.EACCES: "give this user access to it",
    errno.EPERM: "give this user access to it",
}


def persistently(
    work: Callable[[], T],
    seconds: float,
    told: Callable[[OSError], None] | None = None,
    wait: Callable[[float], object] | None = None,
) -> T:
    """Do ``work``, and do it again while storage fails, until it succeeds or ``seconds`` are over.

    Args:
        told: hears of every failure that will be tried again.
        wait: waits so many seconds; what is true ends the attempts.

    Raises:
        OSError: what ``work`` raised last.
    """
    wait = wait or threading.Event().wait
    began, delay = time.monotonic(), FIRST_DELAY
    while True:
        try:
            return work()
        except OSError as error:
            left = seconds - (time.monotonic() - began)
            if left <= 0:
                raise
            if told is not None:
                told(error)
            # Not all workers of a large group at the same moment.
            if wait(min(delay * random.uniform(0.5, 1.0), left)):
                raise
            delay = min(2 * delay, LONGEST_DELAY)


def what_helps(error: OSError) -> str:
    """What was wrong, in one line, and the remedy where it is known."""
    wrong = (str(error).strip() or type(error).__name__).splitlines()[0]
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{wrong}; {remedy}" if remedy else wrong


def insist(
    work: Callable[[], T],
    what: str,
    seconds: float,
    warn: Callable[[str], None],
    wait: Callable[[float], object] | None = None,
) -> T:
    """The same for what a person waits for: it is told once that it doesn't go, and again when it can't be.

    Args:
        what: what can't be done, for the message: ``"the summary can't be written to /runs/a"``.
        wait: as for :func:`persistently`.

    Raises:
        StorageFailed: ``seconds`` are over, or ``wait`` ended the attempts.
    """
    warned: list[OSError] = []

    def tell(error: OSError) -> None:
        if not warned:
            warn(f"{what} ({what_helps(error)}); it is tried again for {seconds:g} seconds")
        warned.append(error)

    try:
        return persistently(work, seconds, tell, wait)
    except OSError as error:
        raise StorageFailed(f"{what}: {what_helps(error)}") from error
