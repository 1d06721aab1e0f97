"""Being stopped: Ctrl-C and SIGTERM end a command tidily, wherever it is waiting."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WAKE_SECONDS = 0.2


class Stopped(KeyboardInterrupt):
    """Somebody asked the process to end; ``signum`` says how."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@contextmanager
def stoppable() -> Iterator[list[Callable[[], None]]]:
    """Within, SIGINT and SIGTERM raise :class:`Stopped` in the main thread (only there can handlers be set).

    What is put into the list that this gives is called before: who asked may have little patience.

    Enter it after ``ray.init``, which sets a handler for SIGTERM that aborts the process with a stack trace.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    first: list[Callable[[], None]] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        for call in first:
            call()
        raise Stopped(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def aside(work: Callable[[], Any]) -> Any:
    """Run ``work`` in a thread and return what it returns, or raise what it raises; signals are heard meanwhile.

    Ray Train sets a SIGINT handler of its own when it is run in the main thread, one that ends in silence.
    """
    outcome: list[Any] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as raised:
            error.append(raised)

    thread = threading.Thread(target=run, name="aside", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(WAKE_SECONDS)
    if error:
        raise error[0]
    return outcome[0]
