"""A small disk that tests fill up and make read-only."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

BALLAST = "ballast"
"""The file that fills a disk."""


@dataclass(frozen=True)
class Disk:
    """The file system mounted at ``place``."""

    place: Path

    @property
    def _ballast(self) -> Path:
        return self.place / BALLAST

    def fill(self, *, leave: int = 0) -> None:
        """Use up all space but about ``leave`` bytes."""
        with suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with self._ballast.open("rb+") as file:
            file.truncate(max(0, self._ballast.stat().st_size - leave))

    def free(self) -> None:
        """Give the space back."""
        self._ballast.unlink()

    def writable(self, yes: bool) -> None:
        """Refuse to open anything for writing, or allow it again."""
        if yes:
            subprocess.run(["umount", "--lazy", self.place], check=True)
            return
        # Over itself: as it is it can't be protected while anybody has a file open for writing, a lock for instance.
        subprocess.run(["mount", "--bind", self.place, self.place], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", self.place], check=True)


class Unmountable(Exception):
    """Whoever runs this may not mount a disk; says why."""


@contextmanager
def mounted(place: Path, megabytes: int) -> Iterator[Disk]:
    """A disk of that size, mounted at a folder that is made for it.

    Raises:
        Unmountable: there is none.
    """
    place.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", place]
    mount = subprocess.run(words, capture_output=True, text=True)
    if mount.returncode != 0:
        raise Unmountable(mount.stderr.strip())
    try:
        yield Disk(place)
    finally:
        # Twice where it was left protected.
        while place.is_mount():
            subprocess.run(["umount", "--lazy", place], check=True)
