"""The writer against a real SQLite store."""

import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from metamixer_ray.tracking.figures import learning_curves
from metamixer_ray.tracking.mlflow_run import MlflowRun, RunIdentity, sqlite_file
from metamixer_ray.tracking.mlflow_writer import MlflowWriter
from tests.tracking.examples import make_rows

ROWS = make_rows(2, 6)


def steps(client: MlflowClient, run_id: str | None, name: str = "peer1/top1") -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


def test_a_training_is_logged_whole(store: tuple[str, str], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    uri, artifacts = store
    (tmp_path / "some.yaml").write_text("a: 1")
    writer = MlflowWriter(
        uri,
        request.node.name,
        "a run",
        parameters={"mixer": "metamixer", "kd_weight": 1.0, "storage": "s3://me:pw@b/x"},
        tags={"mlflow.note.content": "# what it was"},
        artifact_location=artifacts,
    )
    for row in ROWS:
        writer.offer([row])
    writer.log_figures({"learning_curves": learning_curves(ROWS)})
    writer.log_artifact(tmp_path / "some.yaml", "config.yaml")
    writer.log_artifacts(tmp_path, "folder")
    writer.set_tags({"mlflow.note.content": "# at the end"})
    assert writer.finish()
    client = MlflowClient(uri)
    run = client.get_run(writer.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith(artifacts)
    assert run.data.params == {"mixer": "metamixer", "kd_weight": "1.0", "storage": "s3://***@b/x"}
    assert run.data.tags["mlflow.note.content"] == "# at the end"
    history = client.get_metric_history(writer.run_id, "peer1/top1")
    assert [(m.step, m.value, m.timestamp) for m in sorted(history, key=lambda m: m.step)] == [
        (row["epoch"], row["peers"][1]["top1"], int(row["time"] * 1000)) for row in ROWS
    ]
    assert [file.path for file in client.list_artifacts(writer.run_id, "figures")] == ["figures/learning_curves.png"]
    assert "config.yaml" in [file.path for file in client.list_artifacts(writer.run_id)]
    assert Path(client.download_artifacts(writer.run_id, "folder/some.yaml")).read_text() == "a: 1"


@pytest.mark.parametrize("known", ["run_id", "key"])
def test_a_continued_training_adds_only_what_is_missing(store: tuple[str, str], known: str) -> None:
    uri, artifacts = store
    first = MlflowWriter(
        uri, f"continue {known}", "r", parameters={"epochs": 4}, artifact_location=artifacts, key=known
    )
    first.offer(ROWS[:4])
    assert first.finish("KILLED")
    again = MlflowWriter(
        uri,
        f"continue {known}",
        "r",
        first.run_id if known == "run_id" else None,
        parameters={"epochs": 6, "lr": 0.1},
        key=known if known == "key" else None,
    )
    again.offer(ROWS)
    again.offer(ROWS[2:])
    assert again.finish()
    assert again.run_id == first.run_id
    client = MlflowClient(uri)
    assert steps(client, again.run_id) == [1, 2, 3, 4, 5, 6]
    run = client.get_run(again.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"epochs": "4", "lr": "0.1"}
    assert run.data.tags["changed_parameters"] == "epochs: 4 -> 6"


def test_a_run_that_is_gone_is_made_anew(store: tuple[str, str]) -> None:
    uri, artifacts = store
    writer = MlflowWriter(uri, "gone", "r", "0123456789abcdef0123456789abcdef", artifact_location=artifacts)
    writer.offer(ROWS)
    assert writer.finish()
    assert writer.run_id != "0123456789abcdef0123456789abcdef"
    assert steps(MlflowClient(uri), writer.run_id) == [1, 2, 3, 4, 5, 6]


def test_a_child_run_lies_under_its_parent(store: tuple[str, str]) -> None:
    uri, artifacts = store
    parent = MlflowWriter(uri, "sweep", "parent", artifact_location=artifacts)
    assert parent.wait(60)
    child = MlflowWriter(uri, "sweep", "child", parent_run_id=parent.run_id)
    child.offer(ROWS[:1])
    assert child.finish()
    assert parent.finish()
    client = MlflowClient(uri)
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_a_status_is_shown_at_once_and_rows_are_taken_after_it(store: tuple[str, str]) -> None:
    uri, artifacts = store
    client = MlflowClient(uri)
    writer = MlflowWriter(uri, "marked", "r", artifact_location=artifacts)
    assert writer.wait(60)
    writer.mark("KILLED")
    assert writer.wait(60)
    assert client.get_run(writer.run_id).info.status == "KILLED"
    writer.offer(ROWS)
    assert writer.finish("KILLED")
    run = client.get_run(writer.run_id)
    assert (run.info.status, run.info.end_time is None) == ("KILLED", False)
    assert steps(client, writer.run_id) == [1, 2, 3, 4, 5, 6]


def test_many_rows_exceed_one_request_and_arrive_once(store: tuple[str, str]) -> None:
    uri, artifacts = store
    rows = make_rows(8, 30)
    writer = MlflowWriter(uri, "many", "r", artifact_location=artifacts)
    writer.offer(reversed(rows))
    assert writer.finish()
    assert steps(MlflowClient(uri), writer.run_id, "peer7/nll") == list(range(1, 31))


def test_sending_twice_stores_once(store: tuple[str, str]) -> None:
    uri, artifacts = store
    identity = RunIdentity(tracking_uri=uri, experiment="twice", run_name="r", key="twice", artifact_location=artifacts)
    run = MlflowRun(identity)
    assert run.open({}, {}) == set()
    for _ in range(2):
        assert list(run.send(ROWS)) == [[1, 2, 3, 4, 5, 6]]
    assert steps(MlflowClient(uri), run.run_id) == [1, 2, 3, 4, 5, 6]


def test_a_lost_file_is_told_and_holds_nothing_up(store: tuple[str, str], tmp_path: Path) -> None:
    uri, artifacts = store
    told: list[str] = []
    writer = MlflowWriter(uri, "lost", "r", artifact_location=artifacts, warn=told.append)
    writer.log_artifact(tmp_path / "never.txt", "never.txt")
    writer.log_artifact(b"bytes", "deep/er/there.txt")
    writer.offer(ROWS)
    assert writer.finish()
    assert len(told) == 1
    assert "never.txt" in told[0]
    client = MlflowClient(uri)
    assert Path(client.download_artifacts(writer.run_id, "deep/er/there.txt")).read_bytes() == b"bytes"


def test_artifacts_that_cannot_be_stored_do_not_keep_metrics_or_status_back(tmp_path: Path, store) -> None:
    uri, _ = store
    (tmp_path / "file").touch()
    told: list[str] = []
    writer = MlflowWriter(
        uri, "no room", "r", artifact_location=f"{tmp_path}/file/below", warn=told.append, pauses=(0.1, 0.2)
    )
    writer.log_artifact(b"x", "x.txt")
    writer.offer(ROWS)
    assert not writer.finish(timeout=5)
    run = MlflowClient(uri).get_run(writer.run_id)
    assert run.info.status == "FINISHED"
    assert steps(MlflowClient(uri), writer.run_id) == [1, 2, 3, 4, 5, 6]
    assert len(told) == 2
    assert "1 files or models are missing" in told[1]


def test_without_a_server_there_is_one_warning_without_the_password_and_an_end() -> None:
    told: list[str] = []
    writer = MlflowWriter("http://ann:pa55word@127.0.0.1:9", "e", "r", warn=told.append, pauses=(0.05, 0.1))
    began = time.monotonic()
    for row in ROWS:
        writer.offer([row])
    offered = time.monotonic() - began
    deadline = time.monotonic() + 60
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)
    assert offered < 1
    assert len(told) == 1
    assert "127.0.0.1:9" in told[0]
    assert writer.pending == 6
    assert not writer.finish(timeout=1)
    assert len(told) == 2
    assert "6 epochs" in told[1]
    assert not any("pa55word" in text or "ann" in text.split("//")[1] for text in told)
    for thread in threading.enumerate():
        if thread.name == "mlflow-writer":
            thread.join(5)


def test_artifacts_lie_beside_a_sqlite_store_and_never_in_the_working_directory(
    store: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, artifacts = store
    monkeypatch.chdir(tmp_path)
    writer = MlflowWriter(uri, "no location", "r")
    writer.log_artifact(b"x", "x.txt")
    assert writer.finish()
    assert MlflowClient(uri).get_run(writer.run_id).info.artifact_uri.startswith(artifacts)
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_store() -> None:
    assert sqlite_file("sqlite:////home/ann/a%20b/mlflow.db?x=1") == Path("/home/ann/a%20b/mlflow.db")
    assert sqlite_file("sqlite:///mlflow.db") == Path("mlflow.db")
    assert sqlite_file("http://127.0.0.1:5000") is None


def test_slow_uploads_are_waited_for_while_they_go_on(
    store: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri, artifacts = store
    upload = MlflowRun.upload

    def slowly(run: MlflowRun, source: Path | bytes, destination: str) -> None:
        time.sleep(1.5)
        upload(run, source, destination)

    monkeypatch.setattr(MlflowRun, "upload", slowly)
    writer = MlflowWriter(uri, "slow uploads", "r", artifact_location=artifacts)
    assert writer.wait(60)
    for number in range(3):
        writer.log_artifact(b"x", f"{number}.txt")
    assert writer.finish(timeout=0.1)
    client = MlflowClient(uri)
    assert [file.path for file in client.list_artifacts(writer.run_id)] == ["0.txt", "1.txt", "2.txt"]
    assert client.get_run(writer.run_id).info.status == "FINISHED"


def test_what_the_store_will_never_take_is_told_and_given_up(store: tuple[str, str], tmp_path: Path) -> None:
    uri, artifacts = store
    told: list[str] = []
    writer = MlflowWriter(uri, "refused", "r", artifact_location=artifacts, warn=told.append)
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    writer.log_model(tmp_path, "a:name")
    assert writer.finish()
    (text,) = told
    assert text.startswith("model a:name was not logged to MLflow: ")
