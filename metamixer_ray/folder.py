"""The run folder: local or on any filesystem that pyarrow knows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyarrow import fs

from metamixer_ray.errors import ConfigError
from metamixer_ray.masking import masked
from metamixer_ray.tracking import files


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
        """Create or replace a file; a reader sees the old one or the new one."""
        data = content.encode() if isinstance(content, str) else content
        files.write_bytes(self.filesystem, self.path(name), data)

    def read(self, name: str) -> bytes | None:
        """A file's content, or None when there is no such file."""
        return files.read_bytes(self.filesystem, self.path(name))

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        if self.exists(name):
            self.filesystem.delete_file(self.path(name))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a mapping as JSON."""
        files.write_json(self.filesystem, self.path(name), value)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON mapping, or None when there is no such file."""
        value: dict[str, Any] | None = files.read_json(self.filesystem, self.path(name))
        return value

    def fetch(self, name: str, target: Path) -> Path:
        """A folder inside as a local path, copied to ``target`` when it is elsewhere."""
        if self.local:
            return self.local / name
        target.mkdir(parents=True, exist_ok=True)
        fs.copy_files(self.path(name), str(target), source_filesystem=self.filesystem)
        return target
