"""Steps noted on a worker are seen by the driver, and a terminal's bar moves inside of an epoch."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from metamixer_ray.ticker import SECONDS, Ticker
from tests.e2e import tiny

pytestmark = pytest.mark.ray


def test_a_workers_note_is_seen_until_it_is_forgotten(ray_cluster: str) -> None:
    @ray.remote(num_cpus=0.1)
    def work() -> None:
        ticker = Ticker("somebody")
        ticker.note(3, 7, 12)
        ticker.note(3, 8, 12)  # too soon after the first

    ray.get(work.remote())
    reader, other = Ticker("somebody"), Ticker("somebody else")
    assert reader.look() == (3, 7, 12)
    assert reader.look() is None  # too soon
    assert other.look() is None
    reader.forget()
    time.sleep(SECONDS)
    assert reader.look() is None


def test_a_driver_that_asks_to_stop_is_heard_by_its_own_workers_only(ray_cluster: str) -> None:
    @ray.remote(num_cpus=0.1)
    def hears(key: str) -> bool:
        ticker = Ticker(key)
        ticker.note(1, 1, 2)
        return ticker.stopping

    driver = Ticker("somebody")
    assert ray.get(hears.remote("somebody")) is False
    assert driver.ask_to_stop()
    assert ray.get([hears.remote("somebody"), hears.remote("somebody else")]) == [True, False]
    driver.forget()
    assert not driver.ask_to_stop()  # nobody has taken a step since
    driver.forget()
    assert ray.get(hears.remote("somebody")) is False
    Ticker("somebody else").forget()


@pytest.mark.timeout(600)
def test_a_terminal_shows_a_bar_that_moves_inside_an_epoch(ray_cluster: str, tmp_path: Path) -> None:
    # One long epoch: whatever lies between 0 and 100 percent comes from inside of it.
    words = tiny.flags(tmp_path, name="seen", epochs=1, train_limit=1000, image_size=16, batch_size=4)
    ours, theirs = pty.openpty()
    driver = subprocess.Popen(
        [sys.executable, "-m", "metamixer_ray.train", *words, "--address", ray_cluster],
        stdout=theirs,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"},
    )
    os.close(theirs)
    told = b""
    try:
        while chunk := os.read(ours, 4096):
            told += chunk
    except OSError:
        pass  # the other end was closed
    finally:
        os.close(ours)
    assert driver.wait(timeout=60) == 0, told.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.decode())
    seen = {int(found) for found in re.findall(r"(\d+) %", text)}
    assert any(0 < percent < 100 for percent in seen), text
    assert "top-1 %" in text
