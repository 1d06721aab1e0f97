"""Finding Parquet files: in local folders, globs and ``pyarrow.fs`` URIs, and telling training from test
files."""

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from metamixer_ray.errors import ConfigError, DataError, Unreachable
from metamixer_ray.masking import masked

SUFFIXES = (".parquet", ".pq")
SECOND = 10**9
_TRAIN_WORDS = ("train", "training")
_TEST_WORDS = ("test", "testing", "eval", "evaluation")
_VALIDATION_WORDS = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class RemoteFile:
    """One Parquet file on some ``pyarrow.fs`` file system."""

    filesystem: Any
    path: str
    """Path inside the file system."""
    shown: str
    """The path as an error message names it."""
    inner: str
    """Path relative to the folder that was asked for; its words tell training from test files."""
    size: int
    modified_ns: int | None

    def check_unchanged(self) -> None:
        """
        Raises:
            DataError: what is there now is another file, or none.
            OSError: the file system can't be asked.
        """
        now = self.filesystem.get_file_info(self.path)
        if now.is_file and (now.size or 0) == self.size and _same_time(now.mtime_ns, self.modified_ns):
            return
        what = f"is {now.size} bytes of another time" if now.is_file else "is gone"
        raise DataError(
            f"{self.shown}: the file has changed since training began: what was {self.size} bytes {what}. Put the file "
            "back and go on from the last checkpoint, or start anew with what is there"
        )

    @property
    def stamp(self) -> list[object]:
        """What tells this content from another: place, size in bytes and modification time."""
        return [self.shown, self.size, self.modified_ns]


def _same_time(one: int | None, other: int | None) -> bool:
    """Whether two modification times are one. Of an object, some stores list fractions of a second which they leave out
    where it is asked for alone."""
    if one is None or other is None or 0 not in (one % SECOND, other % SECOND):
        return one == other
    return one // SECOND == other // SECOND


def is_uri(location: str) -> bool:
    """Whether ``location`` names a file system, like s3:// or file://."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def find_parquet(location: str, *, flag: str) -> list[RemoteFile]:
    """The Parquet files that a file, folder, glob or URI names, sorted by path.

    A folder is searched with all its sub-folders (hidden ones left out); in a glob, ``*`` stands for anything
    within one path component.

    Raises:
        Unreachable: the URI's store does not answer.
        DataError: the URI is none, names nothing, or holds no Parquet file.
        ConfigError: the same for a local path.
    """
    remote = is_uri(location)
    try:
        filesystem, path = _connect(location)
        pattern = None
        info = filesystem.get_file_info(path)
        if info.type.name == "NotFound" and re.search(r"[*?\[]", path):
            pattern = path
            fixed = re.split(r"[*?\[]", path, maxsplit=1)[0]
            path = fixed.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
            info = filesystem.get_file_info(path)
        if info.type.name == "NotFound":
            raise (DataError if remote else ConfigError)(f"{flag} {location}: there is no such file or folder")
        if info.type.name == "File":
            entries = [info]
        else:
            from pyarrow.fs import FileSelector

            entries = [e for e in filesystem.get_file_info(FileSelector(path, recursive=True)) if e.is_file]
    except (DataError, ConfigError):
        raise
    except Exception as error:  # every file system raises its own kinds
        raise (Unreachable if isinstance(error, OSError) else DataError)(
            f"{flag} {location}: cannot be reached ({type(error).__name__}: {in_short(error)}); check the address, the "
            "network and this node's credentials"
        ) from error
    prefix = location.split("://", 1)[0] + "://" if remote else ""
    files = []
    for entry in entries:
        inner = PurePosixPath(entry.path).name if entry.path == path else entry.path.removeprefix(path).lstrip("/")
        if entry.path != path and not entry.path.lower().endswith(SUFFIXES):
            continue
        if any(part.startswith(".") for part in PurePosixPath(inner).parts):
            continue
        if pattern is not None and not _matches(entry.path, pattern):
            continue
        files.append(RemoteFile(filesystem, entry.path, prefix + entry.path, inner, entry.size or 0, entry.mtime_ns))
    if not files:
        raise (DataError if remote else ConfigError)(f"{flag} {location}: no Parquet file (*.parquet) is there")
    return sorted(files, key=lambda file: file.path)


def _connect(location: str) -> tuple[Any, str]:
    from pyarrow import fs

    if not is_uri(location):
        return fs.LocalFileSystem(), Path(os.path.abspath(Path(os.path.expanduser(location)))).as_posix()
    if location.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in location:
        # Arrow's own limit is a quarter of an hour of silence before a wrong bucket or a missing network is
        # reported.
        location += ("&" if "?" in location else "?") + "retry_limit_seconds=60"
    filesystem, path = fs.FileSystem.from_uri(location)
    return filesystem, path.rstrip("/") or "/"


def _matches(path: str, pattern: str) -> bool:
    parts, patterns = PurePosixPath(path).parts, PurePosixPath(pattern).parts
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def in_short(error: BaseException) -> str:
    """What an exception says, on one line of at most 300 characters."""
    # Of a secret that was cut it couldn't be told any more that it is one.
    return masked(" ".join(str(error).split()))[:300]


def split_of(inner: str) -> str | None:
    """Which split a file belongs to by its name: ``train``, ``test``, ``validation``, or None.

    The file's own name counts first (``train.parquet``, ``test-00000-of-00001.parquet``), then its folders
    from the innermost outwards (``train/0000.parquet``), as on the Hugging Face Hub.
    """
    path = PurePosixPath(inner)
    for word in (path.stem, *reversed(path.parent.parts)):
        lowered = word.lower()
        for split, words in (
            ("train", _TRAIN_WORDS),
            ("test", _TEST_WORDS),
            ("validation", _VALIDATION_WORDS),
        ):
            start = "train" if split == "train" else "test" if split == "test" else "valid"
            if lowered.startswith(start) or re.search(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", lowered):
                return split
    return None


def scored_files(data: str) -> list[RemoteFile]:
    """The files of ``data`` that are scored where nothing is to be trained on: its test files, or all."""
    found = find_parquet(data, flag="--data")
    return next(
        (named for part in ("test", "validation") if (named := [f for f in found if split_of(f.inner) == part])), found
    )


def train_and_test(data: str, test_data: str | None) -> tuple[list[RemoteFile], list[RemoteFile]]:
    """The training files of ``data`` and the test files, by their names or from ``test_data``.

    Where both test and validation files are there, the test files are the test part.

    Raises:
        ConfigError: there is no test part, or no file is left for training.
    """
    found = find_parquet(data, flag="--data")
    by_split: dict[str | None, list[RemoteFile]] = {}
    for file in found:
        by_split.setdefault(split_of(file.inner), []).append(file)
    train = by_split.get("train", [])
    if test_data is not None:
        others = find_parquet(test_data, flag="--test-data")
        named = [file for file in others if split_of(file.inner) == "test"] or [
            file for file in others if split_of(file.inner) == "validation"
        ]
        test = named or others
        train = train or found
    else:
        test = by_split.get("test") or by_split.get("validation") or []
        if not test:
            raise ConfigError(
                f"--data {data}: no test images; none of its {len(found)} files (first: {found[0].inner}) "
                "is named test* or validation*. Give them by --test-data FILE"
            )
    if not train:
        raise ConfigError(
            f"--data {data}: no training images; none of its {len(found)} files (first: {found[0].inner}) "
            "is named train*. Name one so, or give the training files by --data and the test files by "
            "--test-data"
        )
    shared = {file.shown for file in train} & {file.shown for file in test}
    if shared:
        raise ConfigError(f"--test-data {test_data}: {min(shared)} is among the training files too")
    return train, test
