"""The record of truth of a training: ``metrics.jsonl``, one line of JSON per epoch.

It lies beside the checkpoints and needs no server. Everything else that shows metrics can be made from it
again.
"""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from pyarrow import fs

from metamixer_ray.errors import DataError
from metamixer_ray.tracking.files import append_whole, local_path, make_parent, read_bytes, sync_folder, write_bytes


class Journal:
    """Rows of one training on any `pyarrow.fs` filesystem; one process writes, any number may read.

    A line that was torn by a kill or a power cut is passed over, and is gone once the next row is appended: that epoch
    was not recorded. To a reader it may also be one that is just being written. On a local disk a row is appended and
    synced; elsewhere the object is rewritten, which on object stores is atomic.

    Raises:
        DataError: a line before the last is not a row; the message names file and line.
    """

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        self.path = path
        self._filesystem = filesystem
        self._local = local_path(filesystem, path)
        self._rows: dict[int, dict[str, Any]] = {}
        self._torn = False
        self._open()

    def rows(self) -> list[dict[str, Any]]:
        """All recorded rows by ascending epoch."""
        return [self._rows[epoch] for epoch in sorted(self._rows)]

    def append(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Record an epoch and return what is on record for it.

        An epoch that is already recorded stays as it was: a training that repeats epochs after a restart
        does not write them twice. ``time`` (Unix seconds) is added, and values that are not finite become
        null. What could not be written is not recorded, and can be appended again.

        Raises:
            OSError: the row could not be written.
        """
        epoch = int(row["epoch"])
        if epoch not in self._rows:
            recorded = _plain({"time": time.time(), **row})
            line = _line(recorded)
            if self._local is None or self._torn:
                write_bytes(self._filesystem, self.path, self._content() + line)
                self._torn = False
            else:
                append_whole(self._local, line, sync=True)
            self._rows[epoch] = recorded
        return self._rows[epoch]

    def _content(self) -> bytes:
        return b"".join(_line(row) for row in self._rows.values())

    def _open(self) -> None:
        data = read_bytes(self._filesystem, self.path)
        if data is None:
            make_parent(self._filesystem, self.path)
            # A link to nothing would be followed.
            if self._local is not None and not self._local.is_symlink():
                self._local.touch()
                sync_folder(self._local.parent)
            return
        lines = data.split(b"\n")
        if lines and not lines[-1]:
            lines.pop()
        for number, line in enumerate(lines, start=1):
            row = _parse(line)
            if row is None and number < len(lines):
                raise DataError(
                    f"{self.path}, line {number}: this is not a row of metrics; remove the line, "
                    "or move the file away to start a new record"
                )
            if row is not None:
                self._rows.setdefault(int(row["epoch"]), row)
        self._torn = self._content() != data


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        # What can't be written again was not written here: NaN, half a character.
        whole = isinstance(row, dict) and type(row.get("epoch")) is int and bool(_line(row))
    except (ValueError, RecursionError):
        return None
    return row if whole else None


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())  # NumPy and torch scalars and arrays
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
