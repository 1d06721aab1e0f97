"""Killed and resumed trainings end with the bits of uninterrupted ones."""

import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from metamixer_ray import train
from metamixer_ray.checkpoint import read_peer
from metamixer_ray.errors import TrainingFailed
from metamixer_ray.folder import RunFolder, checkpoint_names
from metamixer_ray.starting import HOPELESS_STARTS
from metamixer_ray.tracking import Console
from metamixer_ray.train import main
from tests.e2e import tiny
from tests.e2e.object_store import SECRET, folder_of, object_store
from tests.e2e.own_parts import patience
from tests.e2e.tiny import EPOCHS
from tests.e2e.waiting import wait_for, workers

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
def store() -> Iterator[str]:
    with object_store() as port:
        yield folder_of(port)


def test_a_start_that_always_fails_is_given_up(ray_cluster: str, tmp_path: Path) -> None:
    ended = threading.Event()
    killed: set[int] = set()

    def kill_all() -> None:
        while not ended.wait(0.05):
            for worker in workers(os.getpid()):
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(signal.SIGKILL)
                    killed.add(worker.pid)

    killer = threading.Thread(target=kill_all)
    killer.start()
    told = rf"died while the workers were being started, {HOPELESS_STARTS} times in a row"
    try:
        with pytest.raises(TrainingFailed, match=told):
            train(tiny.config(tmp_path, name="hopeless", epochs=EPOCHS))
    finally:
        ended.set()
        killer.join()
    assert len(killed) >= HOPELESS_STARTS
    assert wait_for(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], seconds=20)


def test_killed_workers_change_nothing(uninterrupted: Path, store: str, tmp_path: Path) -> None:
    """Not even where the run lies in an object store."""
    folder, dice, told = RunFolder(store).inside("hunted"), random.Random(0), io.StringIO()
    killed: list[int] = []

    def recorded() -> int:
        return (folder.read("metrics.jsonl") or b"").count(b"\n")

    def kill_one() -> None:
        # Ray's processes stem from this one, which started the session's cluster.
        if victims := workers(os.getpid()):
            victim = dice.choice(victims)
            victim.send_signal(signal.SIGKILL)
            killed.append(victim.pid)

    def kill_some() -> None:
        # One while the group is started, one while it trains.
        for rows in (0, 2):
            if wait_for(lambda rows=rows: recorded() >= rows and bool(workers(os.getpid()))):
                kill_one()
        # The next at a moment like any other: while the group is started again, or while it trains.
        if wait_for(lambda: bool(workers(os.getpid())) and killed[-1] not in map(_pid, workers(os.getpid())), 60):
            time.sleep(dice.uniform(0.0, 8.0))
            kill_one()

    killer = threading.Thread(target=kill_some)
    killer.start()
    # Also checkpoints inside of epochs, which must not change a bit either.
    config = tiny.config(tmp_path, name="hunted", epochs=EPOCHS, checkpoint_seconds=0.05)
    train(replace(config, run=replace(config.run, storage=store)), Console(stream=told))
    killer.join()
    assert len(killed) >= 2
    assert "a worker failed (it died while the workers were being started)" in told.getvalue()
    # What the first group had reserved is free again.
    assert wait_for(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], seconds=20)
    assert SECRET not in told.getvalue()
    tiny.assert_equal_runs(uninterrupted, RunFolder(store).fetch("hunted", tmp_path / "fetched"))
    assert tiny.tracked_epochs(tmp_path) == list(range(1, EPOCHS + 1))


def _pid(process: psutil.Process) -> int:
    return process.pid


def test_a_lost_node_is_waited_for(ray_nodes: Any, tmp_path: Path) -> None:
    """A training of two peers, each on a node of its own, of which one goes in the midst of it and comes back."""
    run, log = tmp_path / "runs" / "halved", tmp_path / "log"
    settings = {"peers": ["tests.e2e.own_parts:patient", "resnet8"], "peer_labels": ["kind=a", "kind=b"]}
    words = [*tiny.flags(tmp_path, name="halved", image_size=16, **settings), "--address", ray_nodes.address]
    # Ray Train looks for a place for so long (60 seconds else) until it says that there is none.
    hasty = {**os.environ, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
    with log.open("w") as told, patience():
        driver = subprocess.Popen([sys.executable, "-m", "metamixer_ray.train", *words], stdout=told, env=hasty)
        try:
            assert wait_for(lambda: tiny.recorded(run) >= 1)
            (lost,) = ray_nodes.worker_nodes
            ray_nodes.remove_node(lost)
            try:
                assert wait_for(lambda: "waiting since" in log.read_text()), log.read_text()
            finally:
                ray_nodes.add_node(num_cpus=1, labels={"kind": "b"})
            assert wait_for(lambda: "all workers have their place" in log.read_text()), log.read_text()
        except BaseException:
            driver.kill()
            raise
    assert driver.wait(timeout=200) == 0, log.read_text()
    assert re.search(r"waiting since \d\d:\d\d:\d\d for .*kind=b", log.read_text())
    assert [row["epoch"] for row in tiny.rows(run)] == [1, 2, 3]
    assert tiny.tracked_epochs(tmp_path) == [1, 2, 3]


def test_a_stopped_and_killed_driver_is_resumed_by_the_same_command(
    ray_cluster: str, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny.flags(tmp_path, epochs=EPOCHS), "--address", ray_cluster]
    folder = tmp_path / "runs"
    code, told = _ended(words, folder, rows=2, signum=signal.SIGINT)
    assert code == 130, told
    assert "Traceback" not in told
    (run,) = folder.iterdir()
    assert re.search(rf"--name {run.name} .*--resume", told), told
    assert tiny.tracked(tmp_path)[1].info.status == "KILLED"
    assert not workers(os.getpid())
    # Taken up again, it gets no time to end tidily; and it is taken up once more.
    code, told = _ended(["--resume", *words], folder, rows=5, signum=signal.SIGKILL)
    assert code == -signal.SIGKILL, told
    assert not (run / "summary.json").exists()
    # The controller writes rows after checkpoints are whole: it may die any number of rows behind.
    record = run / "metrics.jsonl"
    record.write_text(record.read_text().splitlines(keepends=True)[0])
    assert main([*words, "--resume"]) == 0
    assert (run / "summary.json").exists()
    assert list(folder.iterdir()) == [run]
    tiny.assert_equal_runs(uninterrupted, run)
    assert tiny.tracked_epochs(tmp_path) == list(range(1, EPOCHS + 1))
    # Nothing of this configuration is unfinished now.
    assert main([*words, "--resume"]) == 2
    assert "--resume: no unfinished run of this configuration" in capsys.readouterr().err


def _ended(words: list[str], runs: Path, *, rows: int, signum: signal.Signals) -> tuple[int, str]:
    """Run the command until a run has so many rows, send the signal; its exit status and what it printed."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "metamixer_ray.train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert wait_for(lambda: any(tiny.recorded(run) >= rows for run in runs.glob("*")))
    driver.send_signal(signum)
    told, _ = driver.communicate(timeout=120)
    return driver.returncode, told


def test_hopeless_values_stop_the_run_and_name_the_peer(ray_cluster: str, tmp_path: Path) -> None:
    # The steps from the eleventh on, in the third epoch, are skipped, and the twentieth of these is in the eighth: all
    # checkpoints in between may hold what spoilt them.
    told = (
        r"non-finite values in peer 1 \(tests.e2e.own_parts:fragile\).* last good checkpoint is checkpoint-epoch0002$"
    )
    peers = ["resnet8", "tests.e2e.own_parts:fragile"]
    with pytest.raises(TrainingFailed, match=told):
        train(tiny.config(tmp_path, name="hopeless", peers=peers, image_size=16, epochs=10))
    folder = tmp_path / "runs" / "hopeless"
    assert checkpoint_names(RunFolder(str(folder))) == ["checkpoint-epoch0002", "checkpoint-epoch0001"]
    assert [read_peer(folder / "checkpoint-epoch0002", peer)["progress"]["skipped_steps"] for peer in (0, 1)] == [0, 0]
    assert [row["skipped_steps"] for row in tiny.rows(folder)] == [0, 0, 2, 6, 10, 14, 18]


def test_what_always_fails_is_given_up(ray_cluster: str, tmp_path: Path) -> None:
    peers = ["tests.e2e.own_parts:breaks_later", "resnet8"]
    with pytest.raises(TrainingFailed, match=r"failed \d+ times in a row without any progress; last: .*worn out"):
        train(tiny.config(tmp_path, name="broken", peers=peers, image_size=16, epochs=5))
    # The epoch before it broke was recorded once, and is still there.
    assert [row["epoch"] for row in tiny.rows(tmp_path / "runs" / "broken")] == [1]
