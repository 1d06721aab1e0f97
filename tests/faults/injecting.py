"""Faults, and the training of two tiny peers that they are injected into."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from metamixer_ray.folder import RunFolder, checkpoint_name, checkpoint_names
from tests.e2e import tiny
from tests.e2e.waiting import loaders, wait_for, workers
from tests.faults.disk import Disk
from tests.faults.test_torn_checkpoints import DAMAGES, damage

HUNG_SECONDS = "8"
"""Instead of the minute that a worker has to answer, so that many may hang within the time of a test."""


@dataclass
class Stage:
    """A cluster of two nodes and a training on it, the driver a process of its own."""

    cluster: Any
    words: list[str]
    folder: Path
    """The run's."""
    dice: random.Random
    disk: Disk
    """Where runs are, all of them."""
    database: Path
    """MLflow's."""
    driver: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What the drivers print, on the disk that runs are on."""
        return self.folder.with_suffix(".log")

    @property
    def told(self) -> str:
        """The end of it."""
        return self.log.read_text()[-10_000:]

    def run(self) -> None:
        """Start the driver, or start it again."""
        environment = {**os.environ, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": HUNG_SECONDS}
        with self.log.open("a") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "metamixer_ray.train", *self.words, "--resume-or-start"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def ended(self) -> int | None:
        """The driver's exit status, None while it runs."""
        assert self.driver is not None
        return self.driver.poll()

    def reap(self, timeout: float | None = 600) -> int:
        """Wait for the driver's end, so many seconds at most; its exit status."""
        assert self.driver is not None
        return self.driver.wait(timeout)


def processes(name: str) -> list[psutil.Process]:
    """Ray's processes of this name under this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def _send(victims: list[psutil.Process], number: int) -> bool:
    """Whether any of them was still there."""
    struck = False
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(number)
            struck = True
    return struck


def _one(victims: list[psutil.Process], dice: random.Random) -> list[psutil.Process]:
    return [dice.choice(victims)] if victims else []


def kill_worker(stage: Stage) -> bool:
    return _send(_one(workers(os.getpid()), stage.dice), signal.SIGKILL)


def kill_workers(stage: Stage) -> bool:
    return _send(workers(os.getpid()), signal.SIGKILL)


def kill_loader(stage: Stage) -> bool:
    """Between epochs, and while workers start, there is none."""
    wait_for(lambda: stage.ended() is not None or bool(loaders(os.getpid())), seconds=60)
    return _send(_one(loaders(os.getpid()), stage.dice), signal.SIGKILL)


def hang_worker(stage: Stage) -> bool:
    return _send(_one(workers(os.getpid()), stage.dice), signal.SIGSTOP)


def terminate_worker(stage: Stage) -> bool:
    return _send(_one(workers(os.getpid()), stage.dice), signal.SIGTERM)


def kill_controller(stage: Stage) -> bool:
    return _send(processes("ray::TrainController"), signal.SIGKILL)


def kill_driver(stage: Stage) -> bool:
    assert stage.driver is not None
    stage.driver.kill()
    return _again(stage)


def stop_driver(stage: Stage) -> bool:
    assert stage.driver is not None
    stage.driver.terminate()
    return _again(stage)


def _again(stage: Stage) -> bool:
    """Start a driver that was ended again. Whether it was: it may have come to its own end just before."""
    struck = stage.reap() != 0
    stage.run()
    return struck


def lose_node(stage: Stage) -> bool:
    """The machine is gone without a word, and after a while another comes."""
    lost = stage.cluster.worker_nodes.copy().pop()
    stage.cluster.remove_node(lost, allow_graceful=False)
    time.sleep(stage.dice.uniform(0, 3))
    add_node(stage.cluster)
    return True


def kill_raylet(stage: Stage) -> bool:
    """Of a machine only Ray's own process dies; after a while it is gone, and another comes."""
    (struck,) = stage.cluster.worker_nodes
    (raylet,) = struck.all_processes["raylet"]
    raylet.process.kill()
    time.sleep(stage.dice.uniform(0, 3))
    return lose_node(stage)


def drain(cluster: Any, node: Any, seconds: float) -> None:
    """Have Ray give notice that ``node`` of ``cluster`` will be gone in so many seconds."""
    words = ["--address", cluster.address, "--node-id", node.node_id, "--deadline-remaining-seconds", str(seconds)]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *words]
    subprocess.run(command, check=True, capture_output=True)


def take_node(stage: Stage) -> bool:
    """The machine is taken with a notice of 30 seconds; another one is there before."""
    leaving = stage.cluster.worker_nodes.copy().pop()
    add_node(stage.cluster)
    drain(stage.cluster, leaving, 30)
    time.sleep(30)
    stage.cluster.remove_node(leaving, allow_graceful=False)
    return True


def add_node(cluster: Any, **options: Any) -> None:
    """One of one CPU. A busy machine doesn't always start it within the 30 seconds that Ray gives it."""
    for attempt in range(5):
        try:
            cluster.add_node(num_cpus=1, **options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == 4:
                raise


def tear_checkpoint(stage: Stage) -> bool:
    """The newest checkpoint is damaged, and a worker dies, so that it would be needed.

    The last epoch's is spared: the training may have ended with it, and then nobody writes another.
    """
    newest = checkpoint_names(RunFolder(str(stage.folder)))[:1]
    if newest == [checkpoint_name(int(stage.words[stage.words.index("--epochs") + 1]))]:
        return False
    torn = False
    for name in newest:
        # Damaged before, its file may be gone, or be empty.
        with suppress(OSError, ValueError):
            damage(stage.folder / name, stage.dice.choice(DAMAGES), stage.dice)
            torn = True
    return kill_worker(stage) and torn


def fill_disk(stage: Stage) -> bool:
    """For a while there is no room for checkpoints and rows."""
    stage.disk.fill()
    time.sleep(stage.dice.uniform(1, 10))
    stage.disk.free()
    return True


def protect_disk(stage: Stage) -> bool:
    """For a while nothing can be written."""
    stage.disk.writable(False)
    time.sleep(stage.dice.uniform(1, 10))
    stage.disk.writable(True)
    return True


def lock_database(stage: Stage) -> bool:
    """For a while somebody else has MLflow's database to themselves."""
    with closing(sqlite3.connect(stage.database, isolation_level=None, timeout=30)) as other:
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(stage.dice.uniform(1, 30))
        other.execute("ROLLBACK")
    return True


FAULTS: dict[str, Callable[[Stage], bool]] = {
    "a worker is killed": kill_worker,
    "all workers are killed": kill_workers,
    "a loader process is killed": kill_loader,
    "a worker hangs": hang_worker,
    "a worker gets SIGTERM": terminate_worker,
    "the controller is killed": kill_controller,
    "the driver is killed": kill_driver,
    "the driver gets SIGTERM": stop_driver,
    "a node is lost": lose_node,
    "a raylet is killed": kill_raylet,
    "a node is taken with notice": take_node,
    "the newest checkpoint is damaged": tear_checkpoint,
    "the disk is full for a while": fill_disk,
    "the disk can't be written to for a while": protect_disk,
    "MLflow's database is locked for a while": lock_database,
}
"""Each injects itself, and says whether it came in time."""


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster of a head without workers and a node of one CPU beside one of its own."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        add_node(cluster, include_dashboard=False)
        add_node(cluster)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def settings(**changed: Any) -> dict[str, Any]:
    """Of the training that is disturbed."""
    return {"checkpoint_seconds": 2, "evaluate_every": 5, "train_limit": 960, "loader_processes": 1, **changed}


def stage_on(cluster: Any, disk: Disk, name: str, seed: int, **changed: Any) -> Stage:
    """A training that is ready to be started on a cluster, with its run on ``disk`` and MLflow's database beside it."""
    storage = disk.place.parent
    words = [*tiny.flags(storage, name=name, **settings(**changed)), "--address", cluster.address]
    words[words.index("--storage") + 1] = str(disk.place)
    return Stage(cluster, words, disk.place / name, random.Random(seed), disk, storage / "mlflow.db")


def training(stage: Stage) -> bool:
    """Whether its workers are there, or its driver ended: then a fault may come."""
    return wait_for(lambda: stage.ended() is not None or len(workers(os.getpid())) == 2, seconds=180)
