"""Parquet files with Hugging Face image columns: ``struct<bytes: binary, path: string>`` and integer
labels."""

import json
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

from metamixer_ray.data.sources.base import CHUNK_ROWS, Chunk, Part, Source, Split
from metamixer_ray.data.sources.locations import RemoteFile, in_short, scored_files, train_and_test
from metamixer_ray.errors import ConfigError, DataError, Unreachable
from metamixer_ray.patience import persistently

logger = logging.getLogger(__name__)
T = TypeVar("T")

SILENCE_SECONDS, BELIEVED = 1800.0, 3
"""How long a store may not answer, and after how many attempts a file that it gives is believed to be damaged."""
FILES_AT_A_TIME = 16
"""Footers and labels are small reads, which on remote storage are all waiting."""


def open_parquet(
    data: str,
    *,
    test_data: str | None,
    image_column: str | None,
    label_column: str | None,
    scored_only: bool = False,
) -> Source:
    """Images and labels of Parquet files, as the Hugging Face Hub serves them.

    Args:
        data: file, folder, glob or ``pyarrow.fs`` URI; files named test* or validation* in it are the test
            part.
        test_data: where the test part is, if not in ``data``.
        image_column: column of ``struct<bytes, path>`` or binary; None finds the only one of the first type.
        label_column: integer column; None finds the only one, or the only one marked as ClassLabel.
        scored_only: nothing is to be trained on: both parts are the test part, or all where no file is named so.

    Raises:
        ConfigError: nothing is there, or there is no test part, or a column must be named.
        DataError: a URI cannot be reached; on opening, a file is damaged or lacks a column.
    """
    train, test = (scored_files(data),) * 2 if scored_only else train_and_test(data, test_data)
    files = {"train": train, "test": test}

    def open_part(split: Split) -> Part:
        return _open(files[split], image_column, label_column)

    name = re.split(r"[*?\[]", data.partition("?")[0])[0].rstrip("/").rpartition("/")[2]
    return Source(
        name=name.removesuffix(".parquet") or "parquet",
        identity=["parquet", [file.stamp for file in train], [file.stamp for file in test]],
        open=open_part,
        parquet={"train": train, "test": test},
    )


@dataclass(frozen=True)
class Survey:
    """What the footers of the files of one part say.

    Attributes:
        footers: pyarrow's metadata of each file.
        image, label: names of the columns.
        classes: names in label order; None when there are only numbers.
        where: the files, as an error message names them.
    """

    footers: list[Any]
    image: str
    label: str
    classes: tuple[str, ...] | None
    where: str

    @property
    def rows(self) -> int:
        """Images in all files."""
        return sum(footer.num_rows for footer in self.footers)


def survey(files: Sequence[RemoteFile], image_column: str | None, label_column: str | None) -> Survey:
    """Read the files' footers, several at a time, and see that they belong together.

    Raises:
        DataError: a file is damaged, lacks a column or differs from the first.
        ConfigError: a column must be named.
    """
    with ThreadPoolExecutor(FILES_AT_A_TIME, thread_name_prefix="footers") as pool:
        footers = list(pool.map(_footer, files))
    columns: tuple[str, str] | None = None
    classes: tuple[str, ...] | None = None
    for file, footer in zip(files, footers, strict=True):
        with reading(file):
            schema = footer.schema.to_arrow_schema()
        image, label = find_columns(schema, file.shown, image_column, label_column)
        names = class_names(schema.metadata, label)
        if columns is not None and columns != (image, label):
            raise DataError(
                f"{file.shown}: columns {image} and {label} differ from {files[0].shown}'s {columns[0]} and "
                f"{columns[1]}; give --image-column and --label-column, or only files of one data set"
            )
        if columns is not None and names != classes:
            raise DataError(f"{file.shown}: its class names differ from {files[0].shown}'s; give files of one data set")
        columns, classes = (image, label), names
    assert columns is not None, "train_and_test never returns an empty list"
    where = files[0].shown if len(files) == 1 else f"{files[0].shown} and {len(files) - 1} more"
    return Survey(footers, *columns, classes, where)


def _footer(file: RemoteFile) -> Any:
    def read() -> Any:
        with reading(file), open_file(file) as parquet:
            file.check_unchanged()
            return parquet.metadata

    return patiently(file, read)


def first_image(files: Sequence[RemoteFile], image_column: str | None, label_column: str | None) -> bytes:
    """The first image of the files, as encoded there; empty if there is none."""
    import pyarrow.compute as pc

    def first(file: RemoteFile) -> bytes | None:
        # In small reads, since a row group may be large.
        with reading(file), open_file(file, buffer_size=2**16) as parquet:
            image, _ = find_columns(parquet.schema_arrow, file.shown, image_column, label_column)
            for batch in parquet.iter_batches(batch_size=1, columns=[image]):
                column = batch.column(0)
                column = pc.struct_field(column, "bytes") if is_image(column.type) else column
                return column[0].as_py() or b""
        return None

    found = (patiently(file, partial(first, file)) for file in files)
    return next((image for image in found if image is not None), b"")


def _open(files: Sequence[RemoteFile], image_column: str | None, label_column: str | None) -> Part:
    found = survey(files, image_column, label_column)
    chunks = _chunks(files, found.image, found.label)
    return Part(chunks, rows=found.rows, where=found.where, classes=found.classes)


def find_columns(schema: Any, shown: str, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """The names of the image and the label column of an Arrow ``schema``.

    Raises:
        DataError: a column is missing, of another type, or of the same name as another.
        ConfigError: several columns fit and none is named.
    """
    listed = ", ".join(f"{field.name} ({_type_name(field.type)})" for field in schema)
    images = [field.name for field in schema if is_image(field.type)]
    labels = [field.name for field in schema if _is_integer(field.type)]
    features = _features(schema.metadata)
    marked = [name for name in labels if features.get(name, {}).get("_type") == "ClassLabel"]
    if image_column is not None:
        _check_named(schema, shown, "--image-column", image_column, listed)
        if not (is_image(schema.field(image_column).type) or _is_binary(schema.field(image_column).type)):
            raise DataError(
                f"{shown}: column {image_column} is {_type_name(schema.field(image_column).type)}, but "
                f"images are struct<bytes, path> or binary; its columns are {listed}. Name another by "
                "--image-column"
            )
    if label_column is not None:
        _check_named(schema, shown, "--label-column", label_column, listed)
        if label_column not in labels:
            raise DataError(
                f"{shown}: column {label_column} is {_type_name(schema.field(label_column).type)}, but "
                f"labels are integers; its columns are {listed}. Name another by --label-column"
            )
    image = image_column or _only(images, shown, "image", "--image-column", "struct<bytes, path>", listed)
    label = label_column or _only(
        marked if len(marked) == 1 else labels, shown, "label", "--label-column", "integer", listed
    )
    for name in (image, label):
        # Of the other type, perhaps.
        if schema.names.count(name) > 1:
            raise _same_names(shown, name, schema.names.count(name))
    return image, label


def _check_named(schema: Any, shown: str, flag: str, name: str, listed: str) -> None:
    if name not in schema.names:
        raise DataError(f"{shown} has no column {name}; its columns are {listed}. Name one of them by {flag}")
    if schema.names.count(name) > 1:
        raise _same_names(shown, name, schema.names.count(name))


def _same_names(shown: str, name: str, count: int) -> DataError:
    number = "two" if count == 2 else str(count)
    return DataError(
        f"{shown} has {number} columns named {name}, which can't be told apart; write the file again with another name "
        "for all but one"
    )


def _only(candidates: list[str], shown: str, what: str, flag: str, kind: str, listed: str) -> str:
    if len(candidates) == 1:
        return candidates[0]
    alone = [name for name in candidates if candidates.count(name) == 1]
    if candidates and not alone:
        raise _same_names(shown, candidates[0], candidates.count(candidates[0]))
    if candidates:
        raise ConfigError(
            f"{shown} has {len(candidates)} columns that could hold the {what}s: {', '.join(candidates)}. "
            f"Choose one by {flag}, like {flag} {alone[0]}"
        )
    raise DataError(f"{shown} has no {what} column (of type {kind}); its columns are {listed}. Name one by {flag}")


def is_image(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_struct(kind) and any(
        kind.field(i).name == "bytes" and _is_binary(kind.field(i).type) for i in range(kind.num_fields)
    )


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_integer(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_integer(kind)


def _type_name(kind: Any) -> str:
    return "struct<" + ", ".join(f.name for f in kind) + ">" if str(kind).startswith("struct") else str(kind)


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def class_names(metadata: dict[bytes, bytes] | None, label_column: str) -> tuple[str, ...] | None:
    """Class names in label order from a schema's metadata, or None.

    They are the ``names`` of the label's ClassLabel in the ``huggingface`` entry; failing that, a
    ``class_names`` entry with a JSON list or names between commas.
    """
    names = _features(metadata).get(label_column, {}).get("names")
    if not names and metadata and b"class_names" in metadata:
        text = metadata[b"class_names"].decode(errors="replace")
        try:
            names = json.loads(text)
        except (ValueError, RecursionError):
            names = [name.strip() for name in text.split(",")]
    if not isinstance(names, list) or not names:
        return None
    # They come to figures, terminals and other files: no line breaks, escape sequences or halves of characters.
    return tuple(re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "?", str(name)) for name in names)


def open_file(file: RemoteFile, footer: Any = None, **options: Any) -> Any:
    """A ``pyarrow.parquet.ParquetFile``, to be closed by the caller; with its ``footer`` nothing is read yet."""
    import pyarrow.parquet as pq

    # Without pre_buffer, which would hold all of the file's columns: one read per column and row group is enough.
    # Checksums are compared where the file has them.
    return pq.ParquetFile(
        file.filesystem.open_input_file(file.path), metadata=footer, page_checksum_verification=True, **options
    )


def patiently(file: RemoteFile, read: Callable[[], T], wait: Callable[[float], object] | None = None) -> T:
    """What ``read`` returns of ``file``, again where its store fails for a while.

    Args:
        wait: waits so many seconds; what is true ends the attempts.

    Raises:
        DataError: the file is damaged. What a network breaks looks alike, so that is believed the third time.
        Unreachable: the store didn't answer for ``SILENCE_SECONDS``.
    """
    if file.filesystem.type_name == "local":
        return read()
    damaged = 0

    def attempt() -> T:
        nonlocal damaged
        try:
            return read()
        except DataError as error:
            damaged += not isinstance(error, Unreachable)
            if isinstance(error.__cause__, OSError) and 0 < damaged < BELIEVED:
                raise Unreachable(str(error)) from error.__cause__
            raise

    return persistently(attempt, SILENCE_SECONDS, lambda error: logger.warning("%s; it is tried again", error), wait)


class reading:  # noqa: N801 - reads as a word in the with statement
    """Turns whatever Arrow or a file system raises while reading ``file`` into one DataError that names it, and tells a
    file that changed meanwhile from a damaged one, and from one whose store doesn't answer (Unreachable)."""

    def __init__(self, file: RemoteFile) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, DataError | ConfigError):
            return
        # Of a file that is another one by now, all that went wrong comes from that.
        try:
            self.file.check_unchanged()
        except OSError as silent:
            raise Unreachable(f"{self.file.shown}: cannot be reached ({in_short(silent)})") from error
        reason = "it is empty (0 bytes)" if self.file.size == 0 else in_short(error)
        raise DataError(
            f"{self.file.shown}: not a whole Parquet file or not readable: {reason}. Fetch or write the file again"
        ) from error


def _chunks(files: Sequence[RemoteFile], image: str, label: str) -> Iterator[Chunk]:
    for file in files:
        first = 0
        with ExitStack() as opened:
            reader = _Rows(file, [image, label], opened)
            while True:
                images, labels = patiently(file, partial(reader.after, first))
                if not images:
                    break
                yield Chunk(images, labels, [f"{file.shown}, row {first + i}" for i in range(len(images))])
                first += len(images)


class _Rows:
    """Reads a file's rows in order, and after a failure goes on where it was.

    Args:
        columns: of the images and of the labels.
        opened: closes the file in the end.
    """

    def __init__(self, file: RemoteFile, columns: list[str], opened: ExitStack) -> None:
        self._file, self._columns, self._opened = file, columns, opened
        self._batches: Iterator[Any] | None = None

    def after(self, first: int) -> tuple[list[Any], list[Any]]:
        """Images (bytes or None) and labels (int or None) of some rows from row ``first`` on; none after the last."""
        import pyarrow.compute as pc

        going, self._batches = self._batches, None
        with reading(self._file):
            going = self._from(first) if going is None else going
            if (batch := next(going, None)) is None:
                self._file.check_unchanged()
                return [], []
            column = batch.column(self._columns[0])
            column = pc.struct_field(column, "bytes") if is_image(column.type) else column
            rows = column.to_pylist(), batch.column(self._columns[1]).to_pylist()
        self._batches = going
        return rows

    def _from(self, first: int) -> Iterator[Any]:
        self._opened.close()
        parquet = self._opened.enter_context(open_file(self._file))
        rows = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
        ends = list(accumulate(rows))
        group = bisect_right(ends, first)
        skipped = first - (ends[group - 1] if group else 0)
        # One by one: of several, pyarrow reads all columns at once, however large they are.
        for number in range(group, len(rows)):
            for batch in parquet.iter_batches(batch_size=CHUNK_ROWS, row_groups=[number], columns=self._columns):
                if skipped < len(batch):
                    yield batch.slice(skipped)
                skipped = max(0, skipped - len(batch))
