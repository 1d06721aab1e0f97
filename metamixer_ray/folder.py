"""The run folder: local or on any filesystem that pyarrow knows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs
from pydantic import TypeAdapter, ValidationError

from metamixer_ray.errors import ConfigError
from metamixer_ray.tracking import files
from metamixer_ray.tracking.naming import masked

T = TypeVar("T")


class RunFolder:
    """Files of one run under ``uri`` (a path, or s3://, gs://, ...).

    Args:
        option: the option that named it, for messages.

    Raises:
        ConfigError: a URI that pyarrow doesn't know.
    """

    def __init__(self, uri: str, option: str = "--storage") -> None:
        self.option = option
        self.uri = uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().absolute())
        try:
            self.filesystem, root = fs.FileSystem.from_uri(self.uri if "://" in self.uri else Path(self.uri).as_uri())
        except Exception as error:
            raise ConfigError(masked(f"{option} {uri}: {error}")) from None
        self.root = root.rstrip("/")

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
        """Make the folder.

        Raises:
            ConfigError: it can't be written to.
        """
        try:
            self.filesystem.create_dir(self.root, recursive=True)
        except OSError as error:
            raise ConfigError(f"{self.option} {self} can't be written: {error}") from None

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

    def fetch(self, name: str, target: Path) -> Path:
        """A folder inside as a local path, copied to ``target`` when it is elsewhere."""
        if self.local:
            return self.local / name
        target.mkdir(parents=True, exist_ok=True)
        fs.copy_files(self.path(name), str(target), source_filesystem=self.filesystem)
        return target
