"""MLflow gone, slow, refusing or locked: nothing waits for it, and in the end it has everything once."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from metamixer_ray.runs import TRACKED
from metamixer_ray.tracking.mlflow_writer import MlflowWriter
from tests.faults.driver import EPOCHS
from tests.faults.proxy import Fault, Proxy, proxy_to
from tests.tracking.examples import make_rows
from tests.tracking.server import Server, tracking_server

FAULTS: list[Fault] = ["hang", "slow", "reset", "lost", 403, 429, 500]
# More of them, at other moments: METAMIXER_FAULTS=500 pytest tests/faults
MANY = int(os.environ.get("METAMIXER_FAULTS", "10"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with tracking_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    # A request that hangs is given up after so many seconds, 30 by default.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with proxy_to(server.port) as proxy:
        yield proxy


def assert_complete(uri: str, name: str, epochs: int) -> Any:
    """There is one run of this name, it is finished and has every epoch once; returns it."""
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"attributes.run_name = '{name}'")
    assert run.info.status == "FINISHED"
    for metric in ("epoch", "peer0/top1"):
        steps = [found.step for found in client.get_metric_history(run.info.run_id, metric)]
        assert sorted(steps) == list(range(1, epochs + 1))
    return run


@pytest.mark.parametrize(
    ("fault", "known"), [*((fault, True) for fault in FAULTS), ("hang", False), ("lost", False), (500, False)]
)
def test_each_fault_is_survived(server: Server, proxy: Proxy, fault: Fault, known: bool) -> None:
    name, rows = uuid.uuid4().hex, make_rows(1, 12)
    writer = MlflowWriter(proxy.uri, "faults", name, key=name, warn=lambda _: None, pauses=(0.1, 0.5))
    if known:
        writer.offer(rows[:4])
        assert writer.wait(60)
    proxy.breaks(fault)
    for row in rows:
        writer.offer([row])
    writer.log_artifact(b"kept", "note.txt")
    writer.set_tags({"late": "yes"})
    assert proxy.hit.wait(60)
    proxy.breaks(None)
    assert writer.finish(timeout=120)
    run = assert_complete(server.uri, name, 12)
    assert run.data.tags["late"] == "yes"
    assert Path(MlflowClient(server.uri).download_artifacts(run.info.run_id, "note.txt")).read_bytes() == b"kept"


def test_faults_at_random_moments_lose_nothing(server: Server, proxy: Proxy) -> None:
    dice = random.Random(7)
    name, rows = uuid.uuid4().hex, make_rows(1, 5 * MANY)
    writer = MlflowWriter(proxy.uri, "faults", name, key=name, warn=lambda _: None, pauses=(0.05, 0.2))
    for row in rows:
        if row["epoch"] % 5 == 0:
            proxy.breaks(dice.choice([fault for fault in FAULTS if fault != "hang"]))
        writer.offer([row])
        time.sleep(dice.uniform(0, 0.1))
        if dice.random() < 0.5:
            proxy.breaks(None)
    proxy.breaks(None)
    assert writer.finish(timeout=120)
    assert proxy.hits > 0
    assert_complete(server.uri, name, len(rows))


def test_a_run_that_the_server_makes_after_all_is_not_left_behind(server: Server, proxy: Proxy) -> None:
    name = uuid.uuid4().hex
    proxy.breaks("late", "runs/create")
    writer = MlflowWriter(proxy.uri, "faults", name, key=name, warn=lambda _: None, pauses=(0.1, 0.5))
    assert proxy.hit.wait(60)
    proxy.breaks(None)
    writer.offer(make_rows(1, 12))
    assert writer.wait(120)
    proxy.released.set()
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("faults")
    while len(client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")) < 2:
        time.sleep(0.1)
    assert writer.finish(timeout=120)
    assert assert_complete(server.uri, name, 12).info.run_id == writer.run_id


def test_uploads_that_hang_do_not_hold_up_the_end_one_after_the_other(server: Server, proxy: Proxy) -> None:
    name = uuid.uuid4().hex
    writer = MlflowWriter(proxy.uri, "faults", name, key=name, warn=lambda _: None)
    assert writer.wait(60)
    proxy.breaks("hang")
    for number in range(20):
        writer.log_artifact(b"content", f"file{number}.txt")
    assert not writer.finish(timeout=0.1)
    assert proxy.hits < 5


def test_a_locked_database_is_survived(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Both by a run that it has already and by one that is new to it."""
    uri, told = f"sqlite:///{tmp_path}/mlflow.db", {"known": list[str](), "new": list[str]()}
    MlflowClient(uri).search_experiments()
    writers = {"known": MlflowWriter(uri, "faults", "known", warn=told["known"].append, pauses=(0.1, 0.5))}
    assert writers["known"].wait(60)
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    writers["new"] = MlflowWriter(uri, "faults", "new", warn=told["new"].append, pauses=(0.1, 0.5))
    for writer in writers.values():
        writer.offer(make_rows(1, 12))
    while not all(told.values()):
        time.sleep(0.1)
    other.execute("ROLLBACK")
    other.close()
    for name, writer in writers.items():
        assert writer.finish(timeout=120)
        assert_complete(uri, name, 12)
        assert "database is locked" in told[name][0]
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture
def drive() -> Iterator[Callable[..., "Driver"]]:
    """Starts drivers, and leaves none behind."""
    drivers: list[Driver] = []

    def start(*words: object) -> Driver:
        drivers.append(Driver(*map(str, words)))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.process.kill()
        driver.process.wait()


class Driver:
    """A process that does what a training's driver does, but for the training."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "tests.faults.driver", *words]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.said: list[str] = []

    def says(self, line: str) -> None:
        """Wait until it has said this."""
        assert self.process.stdout is not None
        for said in self.process.stdout:
            self.said.append(said.rstrip())
            if said.rstrip() == line:
                return
        raise AssertionError(f"it never said {line!r} but {self.said}")

    def goes_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ends(self) -> int:
        """Its exit status."""
        assert self.process.stdout is not None
        self.said += [line.rstrip() for line in self.process.stdout]
        return self.process.wait()


def test_a_driver_is_held_up_by_no_fault_and_the_next_one_sends_all(
    server: Server, proxy: Proxy, tmp_path: Path, drive: Callable[..., Driver]
) -> None:
    name = uuid.uuid4().hex
    proxy.breaks("hang")
    driver = drive(tmp_path, proxy.uri, name, 3)
    # In this it would wait for MLflow practically for ever if it waited at all.
    driver.says("both trained")
    driver.goes_on()
    assert driver.ends() == 0, driver.said
    assert proxy.hits > 0
    assert not (tmp_path / name / TRACKED).exists()

    proxy.breaks(None)
    again = drive(tmp_path, proxy.uri, name, 60, "--resume")
    again.says("both trained")
    again.goes_on()
    assert again.ends() == 0, again.said
    assert (tmp_path / name / TRACKED).exists()
    # One that was killed before it could say so.
    (tmp_path / name / TRACKED).unlink()
    last = drive(tmp_path, proxy.uri, name, 60, "--resume")
    last.says("both trained")
    last.goes_on()
    assert last.ends() == 0, last.said
    run = assert_complete(server.uri, name, EPOCHS)
    alone = assert_complete(server.uri, f"{name}-alone", EPOCHS)
    assert alone.data.tags["mlflow.parentRunId"] == run.info.run_id
    client = MlflowClient(server.uri)
    assert len(client.get_metric_history(run.info.run_id, "gain/peer0")) == 1
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"summary.json"}


@pytest.mark.parametrize("fault", [None, "hang", 500], ids=str)
def test_a_driver_that_is_asked_to_end_ends_whatever_mlflow_does(
    server: Server, proxy: Proxy, tmp_path: Path, drive: Callable[..., Driver], fault: Fault | None
) -> None:
    name = uuid.uuid4().hex
    proxy.breaks(fault)
    driver = drive(tmp_path, proxy.uri, name, 60 if fault is None else 3)
    driver.says("both trained")
    driver.process.send_signal(signal.SIGTERM)
    assert driver.ends() == 128 + signal.SIGTERM
    if fault is None:
        client = MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("metamixer_ray")
        (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        assert run.info.status == "KILLED"
