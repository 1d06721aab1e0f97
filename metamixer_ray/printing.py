"""Printing to whoever listens, or doesn't: a training goes on where its log can't take a line."""

import contextlib
from typing import Any, TextIO, cast


class _Lenient:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError):
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lenient(stream: TextIO) -> TextIO:
    """``stream``, but printing to it raises nothing when its disk is full, its terminal or its reader is gone.

    What a full disk didn't take comes with a later line, as far as the stream's own buffer holds it; what its encoding
    lacks becomes a question mark.
    """
    return cast(TextIO, _Lenient(stream))
