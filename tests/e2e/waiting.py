"""Waiting for what other processes do, and finding the training workers among them."""

import time
from collections.abc import Callable

import psutil


def wait_for(condition: Callable[[], bool], seconds: float = 200.0) -> bool:
    """Whether ``condition`` became true within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def workers(root: int) -> list[psutil.Process]:
    """The training workers among the processes that stem from ``root``."""
    found = _titled(root)
    return [process for process, parent in found.items() if parent not in {other.pid for other in found}]


def loaders(root: int) -> list[psutil.Process]:
    """The processes that load images for those workers, which bear their title."""
    found = _titled(root)
    return [process for process, parent in found.items() if parent in {other.pid for other in found}]


def _titled(root: int) -> dict[psutil.Process, int]:
    """The processes with a worker's title, and their parents' numbers."""
    found = {}
    for process in psutil.Process(root).children(recursive=True):
        try:
            if any("RayTrainWorker" in word for word in process.cmdline()):
                found[process] = process.ppid()
        except psutil.NoSuchProcess:
            continue
    return found
