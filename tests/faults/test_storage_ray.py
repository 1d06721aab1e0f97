"""A whole training whose object store answers with errors for a while, at random moments."""

import io
import math
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from metamixer_ray import train
from metamixer_ray.folder import RunFolder
from metamixer_ray.tracking import Console
from metamixer_ray.train import main
from tests.e2e import tiny
from tests.e2e.object_store import folder_of, object_store
from tests.e2e.waiting import wait_for, workers
from tests.faults.disk import Disk
from tests.faults.injecting import processes
from tests.faults.road import Road

EXAMPLES = int(os.environ.get("FAULTS_EXAMPLES", "1"))
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
def store() -> Iterator[tuple[Road, str]]:
    """The road to an object store, and the URI of a folder in it that goes by it."""
    with object_store() as port:
        proxy = Road(port)
        yield proxy, folder_of(proxy.port)


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_an_object_store_that_fails_again_and_again_changes_nothing(
    uninterrupted: Path, store: tuple[Road, str], tmp_path: Path, seed: int
) -> None:
    """Not even where a worker or the controller is killed meanwhile, which can start from nowhere until it is over."""
    dice, (proxy, uri), told, seen = random.Random(seed), store, io.StringIO(), []
    folder, over = RunFolder(uri).inside("hindered"), threading.Event()

    def until(condition: Callable[[], bool]) -> bool:
        """Whether it came true before training was over."""
        return wait_for(lambda: over.is_set() or condition()) and not over.is_set()

    def outages(longest: Sequence[float], limit: float = math.inf) -> int:
        """How many there were, each long enough to turn somebody away, before training was over.

        Those of less than 6 seconds are what the store's client gets over by itself.
        """
        done = 0
        while done < limit and not over.wait(dice.uniform(0, 2)):
            before = proxy.turned_away
            proxy.close()
            done += until(lambda: proxy.turned_away > before)  # noqa: B023
            over.wait(dice.uniform(0.5, 1.0) * dice.choice(longest))
            proxy.open()
        return done

    def kill_in_the_dark() -> None:
        cries = told.getvalue().count("checkpoints can't be written")
        proxy.close()
        seen.append(until(lambda: told.getvalue().count("checkpoints can't be written") > cries))
        before = set(workers(os.getpid()))
        victim = dice.choice([*before, *processes("ray::TrainController")])
        victim.send_signal(signal.SIGKILL)
        # Those that come after a worker ask for the checkpoint, in vain; without a controller the driver does.
        seen.append(
            until(lambda: bool(set(workers(os.getpid())) - before))
            if victim in before
            else until(lambda: "can't be read (" in told.getvalue())
        )
        asked = proxy.turned_away
        seen.append(until(lambda: proxy.turned_away > asked + 3))
        proxy.open()

    def hinder() -> None:
        rows = dice.randint(1, tiny.EPOCHS - 4)
        try:
            # A command that can't begin says so and ends.
            seen.append(until(lambda: folder.exists("run.json")))
            early = outages([2], limit=dice.randrange(3))
            seen.append(until(lambda: (folder.read("metrics.jsonl") or b"").count(b"\n") >= rows))
            kill_in_the_dark()
            print(f"{early} outages before the long one, {outages([2, 12])} after it")
        finally:
            proxy.open()

    hindrance = threading.Thread(target=hinder)
    hindrance.start()
    config = tiny.config(tmp_path, name="hindered", epochs=tiny.EPOCHS)
    try:
        train(replace(config, run=replace(config.run, storage=uri)), Console(stream=told))
    finally:
        over.set()
        hindrance.join()
        print(told.getvalue())
    assert seen == [True] * 5
    assert "checkpoints are written again" in told.getvalue()
    assert "could not be drawn" not in told.getvalue()
    fetched = RunFolder(uri).fetch("hindered", tmp_path / "fetched")
    tiny.assert_equal_runs(uninterrupted, fetched)
    pictures = [sorted(path.name for path in (run / "figures").iterdir()) for run in (uninterrupted, fetched)]
    assert pictures[0] == pictures[1]
    assert tiny.tracked_epochs(tmp_path) == list(range(1, tiny.EPOCHS + 1))


@pytest.mark.parametrize("disk", [16], indirect=True)
def test_a_disk_that_stays_full_ends_the_run_which_goes_on_once_there_is_room(
    ray_cluster: str, uninterrupted: Path, disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = disk.place / "runs"
    words = tiny.flags(tmp_path, name="full", epochs=tiny.EPOCHS, keep_checkpoints=tiny.EPOCHS, address=ray_cluster)
    words[words.index("--storage") + 1] = str(storage)
    # Some checkpoints have room, all of them don't.
    disk.fill(leave=4_000_000)
    assert main([*words, "--storage-patience", "2"]) == 1
    told = capsys.readouterr()
    (last,) = re.findall(
        r"error: no checkpoint could be written to .*/runs/full for 2 seconds, which is --storage-patience: "
        r".*; free some space there; the last whole checkpoint is (\S+)\n.*--name full --resume goes on",
        told.err,
    )
    assert "training goes on, the newest is tried again and again" in told.out + told.err
    assert (storage / "full" / last / "peer1.json").exists()
    assert 1 <= tiny.recorded(storage / "full") < tiny.EPOCHS
    disk.free()
    assert main([*words, "--storage-patience", "2", "--resume"]) == 0
    tiny.assert_equal_runs(uninterrupted, storage / "full")
    assert tiny.tracked_epochs(tmp_path) == list(range(1, tiny.EPOCHS + 1))
