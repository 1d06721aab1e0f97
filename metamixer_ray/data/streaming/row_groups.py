"""Encoded images out of Parquet files, one row group at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metamixer_ray.data.sources.locations import RemoteFile
from metamixer_ray.data.sources.parquet import is_image, open_file, patiently, reading


class RowGroups:
    """Reads row groups of ``files``; any number of threads may read at once."""

    def __init__(self, files: Sequence[RemoteFile], image_column: str) -> None:
        self.files = files
        self._column = image_column
        self._footers: dict[int, Any] = {}

    def read(
        self,
        file: int,
        number: int,
        rows: NDArray[np.int64],
        wait: Callable[[float], object] | None = None,
    ) -> list[bytes | None]:
        """Some images of a row group, in the order of ``rows``; None where nothing is stored.

        While it reads, the image column of the whole row group is in memory.

        Args:
            file: which of the files.
            number: which of its row groups.
            rows: int64 [n], inside the row group.
            wait: waits so many seconds until a store that fails is asked again; what is true ends that.
        Raises:
            DataError: the file cannot be read or is another one by now.
            Unreachable: its store didn't answer for long.
        """
        return patiently(self.files[file], lambda: self._read(file, number, rows), wait)

    def _read(self, file: int, number: int, rows: NDArray[np.int64]) -> list[bytes | None]:
        import pyarrow.compute as pc

        source = self.files[file]
        with reading(source):
            parquet = open_file(source, self._footers.get(file))
            self._footers.setdefault(file, parquet.metadata)
            # Of struct<bytes, path> the bytes alone.
            nested = is_image(parquet.schema_arrow.field(self._column).type)
            leaf = f"{self._column}.bytes" if nested else self._column
            column = parquet.read_row_group(number, columns=[leaf], use_threads=False).column(0)
            if nested:
                column = pc.struct_field(column, "bytes")
            # Afterwards, so that it holds for what was read.
            source.check_unchanged()
            return [column[row].as_py() for row in rows.tolist()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_footers": {}}
