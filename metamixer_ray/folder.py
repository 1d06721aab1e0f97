"""The run folder: local or on any filesystem that pyarrow knows."""

import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs
from pydantic import TypeAdapter, ValidationError

from metamixer_ray.errors import ConfigError, Unwritable
from metamixer_ray.masking import masked
from metamixer_ray.patience import what_helps
from metamixer_ray.tracking import files

_CHECKPOINT = re.compile(r"checkpoint-epoch(\d+)(?:-step(\d+))?")
T = TypeVar("T")


class RunFolder:
    """Files of one run under ``uri`` (a path, or s3://, gs://, ...).

    Args:
        option: the option that named it, for messages.

    Raises:
        ConfigError: a URI that pyarrow doesn't know, or no path.
    """

    def __init__(self, uri: str, option: str = "--storage") -> None:
        if "\0" in uri:
            raise ConfigError(f"{option} {uri!r}: no path has a NUL in it")
        self.option = option
        self.uri = uri.rstrip("/") if "://" in uri else str(Path(os.path.expanduser(uri)).absolute())
        try:
            self.filesystem, root = fs.FileSystem.from_uri(self.uri if "://" in self.uri else Path(self.uri).as_uri())
        except Exception as error:
            raise ConfigError(masked(f"{option} {uri}: {error}")) from error
        self.root = root.rstrip("/")

    @classmethod
    def again(cls, uri: str) -> "RunFolder":
        """The folder of a run that is under way, whose URI was right when it began.

        Raises:
            OSError: it can't be reached for now: pyarrow asks some stores where they are.
        """
        try:
            return cls(uri)
        except ConfigError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None when it is elsewhere."""
        return files.local_path(self.filesystem, self.root)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.root.rpartition("/")[2]

    def __str__(self) -> str:
        return str(self.local or masked(self.uri))

    def inside(self, name: str) -> "RunFolder":
        """A folder in this one."""
        # A URI may end in a query, such as the endpoint of an S3-compatible server.
        path, mark, query = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return RunFolder(f"{path.rstrip('/')}/{name}{mark}{query}", self.option)

    def path(self, name: str) -> str:
        """A file's path on :attr:`filesystem`."""
        return f"{self.root}/{name}"

    def create(self) -> None:
        """Make the folder, and see whether files can be written there.

        Raises:
            Unwritable: they can't.
        """
        with self.to_be_written():
            self.filesystem.create_dir(self.root, recursive=True)
            # Others may be at it at the same moment.
            probe = f".probe-{uuid.uuid4().hex}"
            self.write(probe, "can be written")
            self.remove(probe)

    @contextmanager
    def to_be_written(self) -> Iterator[None]:
        """What can't be written inside becomes an Unwritable that names the option."""
        try:
            yield
        except OSError as error:
            raise Unwritable(f"{self.option} {self} can't be written: {what_helps(error)}") from None

    @contextmanager
    def to_be_read(self) -> Iterator[None]:
        """What can't be read inside becomes a ConfigError that names the option."""
        try:
            yield
        except Unwritable:
            raise
        except OSError as error:
            raise ConfigError(f"{self.option} {self} can't be read: {what_helps(error)}") from None

    def exists(self, name: str) -> bool:
        """Whether a file or folder is in it."""
        return bool(self.filesystem.get_file_info(self.path(name)).type != fs.FileType.NotFound)

    def children(self) -> list[str]:
        """Names of the folders inside, sorted; none when the folder itself is not there."""
        found = self.filesystem.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def write(self, name: str, content: bytes | str) -> None:
        """Create or replace a file; a reader sees the old one or the new one.

        Raises:
            ConfigError: a link in the folder leads out of it.
        """
        if self.local is not None and not self._holds(self.local, (self.local / name).parent):
            raise ConfigError(f"{self}/{name} would be written outside of {self}, where a link leads: remove the link")
        data = content.encode() if isinstance(content, str) else content
        files.write_bytes(self.filesystem, self.path(name), data)

    def check_links(self) -> None:
        """See that whatever is written inside stays inside: a folder may be a stranger's.

        Raises:
            ConfigError: a link in the folder leads out of it.
        """
        if self.local is None:
            return
        for place, folders, names in os.walk(self.local):
            for path in (Path(place) / name for name in [*folders, *names]):
                if path.is_symlink() and not self._holds(self.local, path):
                    raise ConfigError(
                        f"{path} is a link that leads out of {self}: remove it, or put there what it means"
                    )

    @staticmethod
    def _holds(root: Path, folder: Path) -> bool:
        return folder.resolve().is_relative_to(root.resolve())

    def read(self, name: str) -> bytes | None:
        """A file's content, or None when there is no such file."""
        return files.read_bytes(self.filesystem, self.path(name))

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        if self.exists(name):
            self.filesystem.delete_file(self.path(name))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a mapping as JSON."""
        self.write(name, files.json_text(value))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON mapping, or None when there is no such file.

        Raises:
            ConfigError: the file is none.
        """
        return self.read_as(name, dict[str, Any])

    def read_as(self, name: str, kind: type[T]) -> T | None:
        """Read JSON as a ``kind`` that pydantic can check, such as a dataclass; None when there is no such file.

        Raises:
            ConfigError: the file is none.
        """
        content = self.read(name)
        if content is None:
            return None
        try:
            return TypeAdapter(kind).validate_json(content)
        except ValidationError as error:
            first = error.errors(include_input=False, include_context=False)[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise ConfigError(
                f"{self}/{name} is torn or changed ({where}{first['msg']}): put back the file that was written, or "
                "move the folder away"
            ) from None

    def remove_folder(self, name: str) -> None:
        """Delete a folder inside with all that is in it, if it is there."""
        if self.exists(name):
            self.filesystem.delete_dir(self.path(name))

    def fetch(self, name: str, target: Path, files: Sequence[str] | None = None) -> Path:
        """A folder inside as a local path, copied to ``target`` when it is elsewhere.

        Args:
            files: what is wanted of it, as far as it is there; None: all.
        """
        if self.local:
            return self.local / name
        target.mkdir(parents=True, exist_ok=True)
        if files is None:
            fs.copy_files(self.path(name), str(target), source_filesystem=self.filesystem)
        for file in files or ():
            if self.exists(f"{name}/{file}"):
                fs.copy_files(self.path(f"{name}/{file}"), str(target / file), source_filesystem=self.filesystem)
        return target

    def fill(self, name: str, write: Callable[[Path], None]) -> None:
        """Have ``write`` put files into a folder inside, by way of a temporary one when that is elsewhere."""
        if self.local:
            (self.local / name).mkdir(parents=True, exist_ok=True)
            write(self.local / name)
            return
        with tempfile.TemporaryDirectory(prefix="metamixer_ray-") as scratch:
            try:
                write(Path(scratch))
            except OSError as error:
                raise OSError(error.errno, error.strerror, scratch) from None
            files.make_parent(self.filesystem, self.path(f"{name}/any"))
            fs.copy_files(scratch, self.path(name), destination_filesystem=self.filesystem)


def checkpoint_name(epoch: int, step: int = 0) -> str:
    """The name of the checkpoint after so many epochs and so many steps of the next."""
    return f"checkpoint-epoch{epoch:04d}" + (f"-step{step:06d}" if step else "")


def checkpoint_names(folder: RunFolder, until: str | None = None) -> list[str]:
    """Names of the checkpoints in a run's folder, newest first, whole or not; those up to the one named ``until``."""
    found = sorted(((at, name) for name in folder.children() if (at := _position(name))), reverse=True)
    last = _position(until) if until is not None else None
    return [name for at, name in found if last is None or at <= last]


def _position(name: str) -> tuple[int, int] | None:
    """Epoch and step of the checkpoint of that name; None where it is none."""
    match = _CHECKPOINT.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None
