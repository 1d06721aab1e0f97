"""Printing to whoever listens, or doesn't: a training goes on where its log can't take a line."""

import atexit
import contextlib
import os
from collections.abc import Iterator
from typing import Any, TextIO, cast


class _Lenient:
    def __init__(self, stream: TextIO) -> None:
        self._stream, self._losing = stream, False

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with self._forgiven():
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._forgiven():
            self._stream.flush()

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if not self._losing:
                self._losing = True
                atexit.register(_give_up_rest, self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _give_up_rest(stream: TextIO) -> None:
    """Lose what a stream still doesn't take: Python would try again as it ends, and change the exit status."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def lenient(stream: TextIO) -> TextIO:
    """``stream``, but printing to it raises nothing when its disk is full, its terminal or its reader is gone.

    What a full disk didn't take comes with a later line, as far as the stream's own buffer holds it; what its encoding
    lacks becomes a question mark.
    """
    return cast(TextIO, _Lenient(stream))
