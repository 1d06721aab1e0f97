"""One driver per run: a folder belongs to the process that trains in it, for as long as that process lives."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import filelock

from metamixer_ray.errors import ConfigError
from metamixer_ray.folder import RunFolder

LOCK = ".lock"

logger = logging.getLogger(__name__)


@contextmanager
def claimed(folder: RunFolder) -> Iterator[None]:
    """Within, no other process can claim ``folder``. The system lets go of it however this process ends.

    On an object store nothing is claimed: it has no lock that a killed process would lose. Nor is it where a file
    system knows of no locks, which is said: a file instead of a lock would outlive a machine that is lost.

    Raises:
        ConfigError: another process has it, or it can't be written, or a link in it leads out of it.
    """
    lock = None
    if folder.local is not None:
        folder.check_links()
        folder.create()
        lock = filelock.FileLock(folder.local / LOCK, fallback_to_soft=False)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(
                f"--name {folder.name!r} is taken: another process is at work in {folder}; wait until it ends, "
                "stop it, or choose another name"
            ) from None
        except OSError as error:
            # A file system that knows of no locks. If it only can't be written, that is told where it is written.
            logger.warning("%s can't be locked (%s): make sure that no other process works on this run", folder, error)
            lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
