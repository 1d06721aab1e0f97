"""What the first worker and the driver tell each other while workers compute: how far they are, and to stop.

They note it in the cluster's key-value store. Reports to Ray Train make all workers wait for each other; this makes
nobody wait.
"""

import json
import time

from ray.experimental import internal_kv

SECONDS = 1.0
"""Between two notes, and between two looks."""
_NAMESPACE = b"metamixer_ray"


class Ticker:
    """One training's notes.

    Args:
        key: of the training; no other may have it.
    """

    def __init__(self, key: str) -> None:
        self._key, self._stop = f"step-of-{key}".encode(), f"stop-of-{key}".encode()
        self._next = 0.0
        self.stopping = False
        """Whether :meth:`note` has seen that the driver asked to stop."""

    def note(self, epoch: int, step: int, steps: int) -> None:
        """Note that ``step`` of the ``steps`` of ``epoch`` (both from 1) are done, if the last note is old enough, and
        see whether to stop."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + SECONDS
        internal_kv._internal_kv_put(
            self._key, json.dumps([epoch, step, steps]).encode(), overwrite=True, namespace=_NAMESPACE
        )
        self.stopping = bool(internal_kv._internal_kv_exists(self._stop, namespace=_NAMESPACE))

    def look(self) -> tuple[int, int, int] | None:
        """The last note, if a second has passed since the last look and there is one."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + SECONDS
        content = internal_kv._internal_kv_get(self._key, namespace=_NAMESPACE)
        if content is None:
            return None
        epoch, step, steps = json.loads(content)
        return epoch, step, steps

    def ask_to_stop(self) -> bool:
        """Ask the workers to write a checkpoint and to end; whether they take steps, between which they hear it."""
        internal_kv._internal_kv_put(self._stop, b"1", overwrite=True, namespace=_NAMESPACE)
        return bool(internal_kv._internal_kv_exists(self._key, namespace=_NAMESPACE))

    def rest(self) -> None:
        """Workers take no steps for now: their note is taken away, until there is another."""
        internal_kv._internal_kv_del(self._key, namespace=_NAMESPACE)

    def forget(self) -> None:
        """Take the notes away."""
        for key in (self._key, self._stop):
            internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
