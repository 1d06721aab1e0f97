"""Killed and resumed trainings end with the bits of uninterrupted ones."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from metamixer_ray import train
from metamixer_ray.errors import TrainingFailed
from tests.e2e import tiny

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

EPOCHS = 8


@pytest.fixture(scope="module")
def uninterrupted(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    storage = tmp_path_factory.mktemp("uninterrupted")
    train(tiny.config(storage, name="calm", epochs=EPOCHS))
    return storage / "runs" / "calm"


def _wait_for(condition: Callable[[], bool], seconds: float = 200.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _recorded(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _workers(root: int) -> list[psutil.Process]:
    """The training workers among the processes that stem from ``root``."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if any("RayTrainWorker" in word for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _assert_equal_runs(calm: Path, other: Path) -> None:
    tiny.assert_same_weights(calm, other, peers=2)
    ours, theirs = tiny.rows(calm), tiny.rows(other)
    assert [row["epoch"] for row in theirs] == list(range(1, EPOCHS + 1))
    assert [tiny.without_times(row) for row in ours] == [tiny.without_times(row) for row in theirs]


def _tracked_epochs(storage: Path) -> list[int]:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("metamixer_ray")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "ensemble/top1")]


def test_a_killed_worker_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "wounded"
    killed: list[int] = []

    def kill_one() -> None:
        # Ray's processes stem from this one, which started the session's cluster.
        if _wait_for(lambda: _recorded(folder) >= 2):
            victim = _workers(os.getpid())[-1]
            killed.append(victim.pid)
            victim.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    # Also checkpoints inside of epochs, which must not change a bit either.
    train(tiny.config(tmp_path, name="wounded", epochs=EPOCHS, checkpoint_seconds=0.05))
    killer.join()
    assert killed
    _assert_equal_runs(uninterrupted, folder)
    assert _tracked_epochs(tmp_path) == list(range(1, EPOCHS + 1))


def test_a_killed_driver_is_resumed_by_the_same_command(ray_cluster: str, uninterrupted: Path, tmp_path: Path) -> None:
    words = [*tiny.flags(tmp_path, epochs=EPOCHS), "--address", ray_cluster]
    folder = tmp_path / "runs"
    driver = subprocess.Popen([sys.executable, "-m", "metamixer_ray.train", *words], stdout=subprocess.DEVNULL)
    try:
        assert _wait_for(lambda: any(_recorded(run) >= 2 for run in folder.glob("*")))
    finally:
        driver.kill()
        driver.wait()
    (run,) = folder.iterdir()
    assert not (run / "summary.json").exists()
    again = tiny.command(*words, "--resume")
    assert again.returncode == 0, again.stderr
    assert (run / "summary.json").exists()
    assert list(folder.iterdir()) == [run]
    _assert_equal_runs(uninterrupted, run)
    assert _tracked_epochs(tmp_path) == list(range(1, EPOCHS + 1))
    # Nothing of this configuration is unfinished now.
    nothing = tiny.command(*words, "--resume")
    assert nothing.returncode == 2
    assert "--resume: no unfinished run of this configuration" in nothing.stderr


def test_hopeless_values_stop_the_run_and_name_the_peer(ray_cluster: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"non-finite values in peer 1 \(tests.e2e.own_parts:fragile\)"):
        train(tiny.config(tmp_path, peers=["resnet8", "tests.e2e.own_parts:fragile"], image_size=16, epochs=10))


def test_a_torn_snapshot_is_survived(uninterrupted: Path, tmp_path: Path) -> None:
    config = tiny.config(tmp_path, name="torn", epochs=EPOCHS)
    folder = tmp_path / "runs" / "torn"
    stop = threading.Thread(target=lambda: _wait_for(lambda: _recorded(folder) >= 3) and _kill_all())
    stop.start()
    with pytest.raises(TrainingFailed):
        train(replace(config, placement=replace(config.placement, max_failures=0)))
    stop.join()
    snapshot = folder / "checkpoint_manager_snapshot.json"
    snapshot.write_text(snapshot.read_text()[:100])
    train(replace(config, run=replace(config.run, resume=True)))
    _assert_equal_runs(uninterrupted, folder)


def _kill_all() -> None:
    for worker in _workers(os.getpid()):
        worker.send_signal(signal.SIGKILL)


def test_what_always_fails_is_given_up(ray_cluster: str, tmp_path: Path) -> None:
    peers = ["tests.e2e.own_parts:breaks_later", "resnet8"]
    with pytest.raises(TrainingFailed, match=r"failed 3 times in a row without any progress; last: .*worn out"):
        train(tiny.config(tmp_path, name="broken", peers=peers, image_size=16, epochs=5))
    # The epoch before it broke was recorded once, and is still there.
    assert [row["epoch"] for row in tiny.rows(tmp_path / "runs" / "broken")] == [1]
