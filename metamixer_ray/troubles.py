"""Troubles that pass: whoever has one says so, wherever it runs, and the driver tells it once, and when it is over.

They stand in the cluster's key-value store, since a checkpoint that can't be written holds its report up, too.
"""

import time
from collections.abc import Callable

from ray.experimental import internal_kv

KINDS = ("checkpoints", "metrics")
SECONDS = 1.0
"""Between two looks."""
_NAMESPACE = b"metamixer_ray"


class Troubles:
    """One training's.

    Args:
        key: of the training; no other may have it.
    """

    def __init__(self, key: str) -> None:
        self._keys = {kind: f"trouble-with-{kind}-of-{key}".encode() for kind in KINDS}
        self._known: dict[str, str] = {}
        self._next = 0.0

    def say(self, kind: str, text: str | None) -> None:
        """``text`` says what is wrong with a kind of thing that is written; None that nothing is."""
        if text is None:
            internal_kv._internal_kv_del(self._keys[kind], namespace=_NAMESPACE)
        else:
            internal_kv._internal_kv_put(self._keys[kind], text.encode(), overwrite=True, namespace=_NAMESPACE)

    def look(self, warn: Callable[[str], None], note: Callable[[str], None]) -> None:
        """Tell what is new, if a second has passed since the last look."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SECONDS
        for kind, key in self._keys.items():
            told = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
            if told is not None and kind not in self._known:
                self._known[kind] = told.decode()
                warn(self._known[kind])
            elif told is None and self._known.pop(kind, None) is not None:
                note(f"{kind} are written again")

    def forget(self) -> None:
        """Take them away, told or not."""
        for key in self._keys.values():
            internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
