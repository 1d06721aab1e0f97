"""The writer against a real server that comes late, is killed while it is written to, and comes back."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from metamixer_ray.tracking.mlflow_writer import MlflowWriter
from tests.tracking.examples import make_rows
from tests.tracking.server import Server, tracking_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


def test_a_login_is_asked_for_and_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(1, 2)
    told: list[str] = []
    with tracking_server(tmp_path, ("someone", "a long password")) as server:

        def offered(name: str) -> MlflowWriter:
            writer = MlflowWriter(server.uri, "e", name, parameters={}, warn=told.append, pauses=(0.1, 0.5))
            writer.offer(rows)
            return writer

        stranger = offered("stranger")
        while not told:
            time.sleep(0.05)
        assert "it asks for a user and a password: give them in MLFLOW_TRACKING_USERNAME and" in told[0]
        # MLflow looks for them at every request.
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "someone")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a long password")
        assert stranger.finish(timeout=60)
        friend = offered("friend")
        assert friend.finish(timeout=60)
        client = MlflowClient(server.uri)
        for writer in (stranger, friend):
            assert client.get_run(writer.run_id).info.status == "FINISHED"
    assert len(told) == 1


@pytest.mark.timeout(600)
def test_nothing_is_lost_and_nothing_is_there_twice(server: Server) -> None:
    rows = make_rows(2, 60)
    told: list[str] = []
    writer = MlflowWriter(server.uri, "e", "r", parameters={"lr": 0.1}, warn=told.append, pauses=(0.1, 0.5))
    writer.offer(rows[:5])
    while not told:
        time.sleep(0.05)
    server.start()
    assert writer.wait(120)
    assert writer.pending == 0
    run_id = writer.run_id

    for row in rows[5:40]:  # the server dies in the middle of these
        writer.offer([row])
        time.sleep(0.01)
        if row["epoch"] == 20:
            server.kill()
    writer.log_artifact(b"what was missed", "note.txt")
    assert writer.pending >= 20
    server.start()
    writer.offer(rows[40:])
    assert writer.finish(timeout=120)

    assert len(told) == 1
    client = MlflowClient(server.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert len(client.search_runs([run.info.experiment_id])) == 1
    for name, value in (
        ("peer1/top1", lambda row: row["peers"][1]["top1"]),
        ("epoch", lambda row: row["epoch"]),
    ):
        history = sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.step)
        assert [(m.step, m.value) for m in history] == [(row["epoch"], value(row)) for row in rows]
    assert Path(client.download_artifacts(run_id, "note.txt")).read_bytes() == b"what was missed"
