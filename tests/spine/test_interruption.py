"""A signal ends a command, after those who want to know at once were told."""

import os
import signal
import threading
import time

import pytest

from metamixer_ray.interruption import Stopped, aside, stoppable


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_told_first_and_then_raised(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    told: list[str] = []

    def work() -> None:
        with stoppable() as first:
            first.append(lambda: told.append("told"))
            os.kill(os.getpid(), signum)
            aside(lambda: time.sleep(60))

    with pytest.raises(Stopped, match=rf"stopped by {signum.name}") as caught:
        work()
    assert told == ["told"]
    assert caught.value.signum == signum
    assert signal.getsignal(signum) == before


def test_beside_the_main_thread_signals_are_left_alone() -> None:
    handlers: list[object] = []

    def look() -> None:
        with stoppable():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
