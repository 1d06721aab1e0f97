"""A worker's checkpoints on their way to storage, which may fail for a while: training goes on meanwhile."""

import threading
import time
from collections.abc import Callable
from typing import Any

from metamixer_ray.errors import StorageFailed
from metamixer_ray.patience import persistently, what_helps

UNWRITTEN = "unwritten"
"""Stands in the report of a worker that could not write its files of the checkpoint."""


class Upload:
    """One checkpoint on its way."""

    def __init__(self) -> None:
        self.settled = threading.Event()
        """It is over, or has failed and is to be tried again."""
        self.superseded = threading.Event()
        """There is a newer one, which is tried instead as soon as this one has failed."""


class Uploads:
    """All checkpoints of one worker, one after another.

    Args:
        place: where they go, for messages.
        patience: seconds for which none may succeed before the training is ended.
        trouble: hears what is wrong, each time.
    """

    def __init__(self, place: str, patience: float, trouble: Callable[[str], None]) -> None:
        self._place, self._patience, self._trouble = place, patience, trouble
        self._last = Upload()
        self._last.settled.set()
        self._failing_since: float | None = None

    def begin(self) -> Upload:
        """The next checkpoint. Waits for the one before, unless that fails for now: then it is given up.

        Before a report without a checkpoint as well: its ``write`` does nothing.
        """
        self._last.settled.wait()
        self._last.superseded.set()
        self._last = Upload()
        return self._last

    def carry_out(self, upload: Upload, write: Callable[[], Any]) -> bool:
        """Have ``write`` put a checkpoint where it belongs, again and again. Returns whether it is there: a newer one
        may have come first.

        Raises:
            StorageFailed: nothing could be written for longer than there is patience.
        """

        def failed(error: OSError) -> None:
            self._failing_since = self._failing_since or time.monotonic()
            self._trouble(
                f"checkpoints can't be written to {self._place} ({what_helps(error)}); training goes on, the "
                "newest is tried again and again, and epochs are shown and recorded once they are in a checkpoint"
            )
            upload.settled.set()

        try:
            past = 0.0 if self._failing_since is None else time.monotonic() - self._failing_since
            persistently(write, self._patience - past, failed, upload.superseded.wait)
        except OSError as error:
            if upload.superseded.is_set():
                return False
            raise StorageFailed(
                f"no checkpoint could be written to {self._place} for {self._patience:g} seconds, which is "
                f"--storage-patience: {what_helps(error)}"
            ) from error
        finally:
            upload.settled.set()
        self._failing_since = None
        return True
