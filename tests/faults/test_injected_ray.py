"""One training after another fault: it goes on by itself, and its weights are those of one that nothing happened to."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from metamixer_ray import train
from metamixer_ray.folder import RunFolder, checkpoint_names
from tests.e2e import tiny
from tests.e2e.own_parts import hurry
from tests.e2e.waiting import loaders, wait_for, workers
from tests.faults.injecting import processes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PARTS = "tests.e2e.own_parts"


def hit(victims: list[psutil.Process], number: int) -> psutil.Process:
    assert victims
    victim = random.Random(0).choice(victims)
    victim.send_signal(number)
    return victim


def test_one_fault_after_another_changes_nothing(ray_cluster: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "faulty"
    settings = {"peers": [f"{PARTS}:unhurried", f"{PARTS}:hasty"], "image_size": 16, "epochs": tiny.EPOCHS}
    train(tiny.config(tmp_path / "calm", name="calm", **settings))
    words = tiny.flags(tmp_path, name="faulty", checkpoint_seconds=0.2, loader_processes=1, **settings)
    driver = subprocess.Popen(
        [sys.executable, "-m", "metamixer_ray.train", *words, "--address", ray_cluster],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "4"},
    )
    lost: set[psutil.Process] = set()

    def at(rows: int) -> None:
        """Wait for so many epochs, and for workers that were not there at the last fault."""
        assert wait_for(
            lambda: tiny.recorded(run) >= rows and len(set(workers(os.getpid())) - lost) == 2,
        ), driver.poll()
        lost.update(workers(os.getpid()))

    def kill_loaders() -> bool:
        """Whether that was noticed; those that had loaded their last batch are not missed."""
        for process in loaders(os.getpid()):
            process.kill()
        return not set(workers(os.getpid())) & lost

    try:
        at(1)
        hung = hit(workers(os.getpid()), signal.SIGSTOP)
        at(2)
        assert not hung.is_running()
        hit(processes("ray::TrainController"), signal.SIGKILL)
        at(3)
        assert wait_for(kill_loaders)
        at(4)
        haste = hurry()
        at(5)
        assert not haste.exists()
    finally:
        told, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, told
    for line in (
        "a worker failed (WorkerHealthCheckTimeoutError: ",
        "the training's controller died; going on from the last checkpoint",
        "a worker failed (ProcessKilled: a loader process was killed",
        f"a worker failed (PeersDrifted: peer 1 ({PARTS}:hasty), replica 0, ran out of batches after step 3 of 4",
    ):
        assert line in told, told
    tiny.assert_equal_runs(tmp_path / "calm" / "runs" / "calm", run)
    assert tiny.tracked_epochs(tmp_path) == list(range(1, tiny.EPOCHS + 1))
    assert len(checkpoint_names(RunFolder(str(run)))) == 2
