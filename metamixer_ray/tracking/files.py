"""Small files of the run folder on any `pyarrow.fs` filesystem: readers see the old file or the new one."""

import contextlib
import json
import os
import posixpath
from pathlib import Path
from typing import IO, Any

from pyarrow import fs

from metamixer_ray.errors import DataError

OBJECT_STORES = frozenset({"s3", "gcs", "abfs"})
"""Filesystems without folders, whose objects become visible whole when they are closed."""


def local_path(filesystem: fs.FileSystem, path: str) -> Path | None:
    """Where ``path`` is on this machine's own disk, or None when the filesystem is not a local one."""
    if isinstance(filesystem, fs.SubTreeFileSystem):
        return local_path(filesystem.base_fs, posixpath.join(filesystem.base_path, path))
    return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None


def read_bytes(filesystem: fs.FileSystem, path: str) -> bytes | None:
    """The file's content, or None when there is no such file.

    Raises:
        DataError: it has no end, or is none: a pipe, a device or a folder.
    """
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.NotFound:
        return None
    if kind == fs.FileType.Unknown:
        raise DataError(f"{path}: this is no file but a pipe or a device; remove it")
    if kind == fs.FileType.Directory:
        raise DataError(f"{path}: this is no file but a folder; remove it")
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_bytes(filesystem: fs.FileSystem, path: str, data: bytes) -> None:
    """Create or replace a file and the folders above it.

    On a local disk the bytes are synced and renamed into place; elsewhere the object is rewritten.
    """
    make_parent(filesystem, path)
    target = local_path(filesystem, path)
    if target is None:
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        # In a folder of somebody else's, it may be a link.
        aside.unlink(missing_ok=True)
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def append_whole(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Append to a local file all of ``data``, or nothing where the disk is full.

    Args:
        sync: have it survive a power cut.
    """
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            # A disk that fills up takes a part first, and refuses the rest.
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def read_json(filesystem: fs.FileSystem, path: str) -> Any:
    """The file's JSON value, or None when there is no such file.

    Raises:
        json.JSONDecodeError: the file is not JSON.
    """
    data = read_bytes(filesystem, path)
    return None if data is None else json.loads(data)


def write_json(filesystem: fs.FileSystem, path: str, value: Any) -> None:
    """Write a value as indented JSON, replacing the file."""
    write_bytes(filesystem, path, json_text(value).encode())


def json_text(value: Any) -> str:
    """A value as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def make_parent(filesystem: fs.FileSystem, path: str) -> None:
    """Create the folder that ``path`` lies in; object stores need none and often forbid it."""
    parent = posixpath.dirname(path)
    base = filesystem.base_fs if isinstance(filesystem, fs.SubTreeFileSystem) else filesystem
    if parent and base.type_name not in OBJECT_STORES:
        filesystem.create_dir(parent, recursive=True)


def sync(file: IO[Any]) -> None:
    """Make what was written to a local file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a new or renamed entry of a local folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
