"""A machine that is taken away with a notice, as spot machines are: a checkpoint in time, no step done twice, and no
failure spent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from metamixer_ray.placement import WATCHER
from tests.e2e import tiny
from tests.e2e.own_parts import steps_taken
from tests.e2e.waiting import wait_for, workers
from tests.faults.injecting import drain

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
GRACE_SECONDS = 30
EPOCHS = 24


def test_a_notice_costs_neither_a_step_nor_a_failure(ray_nodes: Any, tmp_path: Path) -> None:
    """Ray's first, of a node; then Kubernetes' own to a worker."""
    run, log = tmp_path / "runs" / "moved", tmp_path / "log"
    peers = ["tests.e2e.own_parts:unhurried", "resnet8"]
    words = tiny.flags(tmp_path, name="moved", image_size=16, epochs=EPOCHS, peers=peers, max_failures=0)
    words += ["--address", ray_nodes.address]
    before = steps_taken()

    def left(times: int) -> bool:
        return log.read_text().count("a machine is being taken away") == times

    with log.open("w") as told:
        # The cluster of the tests looks out for no notices.
        watchful = {**os.environ, WATCHER: "1"}
        driver = subprocess.Popen([sys.executable, "-m", "metamixer_ray.train", *words], stdout=told, env=watchful)
        ray_nodes.add_node(num_cpus=1, labels={"kind": "b"})
        leaving = None
        try:
            assert wait_for(lambda: tiny.recorded(run) >= 1), log.read_text()
            taken = {worker.ppid() for worker in workers(os.getpid())}
            leaving = next(n for n in ray_nodes.worker_nodes if n.all_processes["raylet"][0].process.pid in taken)
            drain(ray_nodes, leaving, GRACE_SECONDS)
            noticed = time.monotonic()
            # There is no other reason for one in the midst of an epoch.
            assert wait_for(lambda: bool(list(run.glob("checkpoint-*-step*/peer1.json"))), seconds=GRACE_SECONDS)
            assert wait_for(lambda: left(1), seconds=GRACE_SECONDS), log.read_text()
            assert time.monotonic() - noticed < GRACE_SECONDS
            done = tiny.recorded(run)
            assert wait_for(lambda: tiny.recorded(run) > done), log.read_text()
            workers(os.getpid())[0].send_signal(signal.SIGTERM)
            assert wait_for(lambda: left(2)), log.read_text()
            assert driver.wait(timeout=200) == 0, log.read_text()
        finally:
            driver.kill()
            ray_nodes.remove_node(leaving or ray_nodes.worker_nodes.copy().pop())
    assert [row["epoch"] for row in tiny.rows(run)] == list(range(1, EPOCHS + 1))
    # Without a notice that was heard, a step that was under way, or more, would have been taken twice.
    assert steps_taken() - before == tiny.rows(run)[-1]["step"]
