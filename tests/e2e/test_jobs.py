"""``ray job submit`` from a source tree to a head with token authentication; an MLflow server keeps the runs."""

import json
import re
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.e2e import tiny
from tests.e2e.jobs import Head, head_with_token
from tests.e2e.waiting import wait_for
from tests.ports import listening
from tests.tracking.server import Server, tracking_server

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
EPOCHS = 30
# A network of the submitter's own. It takes its time, so that the training isn't over before somebody can stop it.
MINE = """
import time

from torch import nn


class Slow(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))

    def forward(self, images):
        if self.training:
            time.sleep(0.1)
        return self.head(self.body(images))


def network(*, classes, image_size):
    return Slow(classes)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_with_token() as head:
        yield head


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with tracking_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a clone has of the program, and nothing that was installed."""
    tree = tmp_path / "tree"
    for name in ("metamixer_ray", "tune_spaces"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "mine.py").write_text(MINE)
    return tree


def submission(server: Server, tmp_path: Path, *words: str, name: str) -> list[str]:
    """The words of ``ray job submit``, where the job's environment names the server and a home folder."""
    variables = {"MLFLOW_TRACKING_URI": server.uri, "METAMIXER_HOME": str(tmp_path / "home")}
    environment = json.dumps({"env_vars": variables})
    return ["submit", f"--submission-id={name}", "--working-dir=.", "--runtime-env-json", environment, *words]


def training(*own: str, module: str = "metamixer_ray.train", **settings: object) -> list[str]:
    """The command to submit: a tiny training's, or one of another module with words of its ``own``."""
    words = tiny.flags(Path("unused"), **settings)
    # Store and storage are what the job's environment says.
    for option in ("--tracking-uri", "--storage"):
        at = words.index(option)
        del words[at : at + 2]
    return ["--", sys.executable, "-m", module, *own, *words]


def test_a_submission_that_is_stopped_goes_on_when_it_is_submitted_again(
    head: Head, server: Server, tree: Path, tmp_path: Path
) -> None:
    peers = ["mine:network", "resnet8"]
    words = training(name="submitted", peers=peers, image_size=16, epochs=EPOCHS, resume_or_start=True)
    run = tmp_path / "home" / "runs" / "submitted"
    first = head.job(*submission(server, tmp_path, "--no-wait", name="first"), *words, cwd=tree)
    assert first.returncode == 0, first.stderr
    assert wait_for(lambda: tiny.recorded(run) >= 2)
    assert head.job("stop", "first", cwd=tree).returncode == 0
    log = head.job("logs", "first", cwd=tree).stdout
    assert "stopped by SIGTERM; the same command with --name submitted --resume goes on" in log
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x1b]", log.partition("submitted\n")[2])
    done = tiny.recorded(run)
    assert 2 <= done < EPOCHS
    # One that only a stop leaves, since by time there are none within these minutes.
    assert re.fullmatch(rf"checkpoint-epoch{done:04d}-step\d+", max(path.name for path in run.glob("checkpoint-*")))
    client = MlflowClient(server.uri)
    (tracked,) = client.search_runs([client.get_experiment_by_name("metamixer_ray").experiment_id])
    assert (tracked.info.status, tracked.data.tags["ray_job"]) == ("KILLED", "first")
    # Its address was in the log before it ended, and leads to it.
    address = re.search(rf"{server.uri}/#/experiments/(\d+)/runs/(\w+)", log)
    assert address is not None
    assert address.group(2) == tracked.info.run_id

    again = head.job(*submission(server, tmp_path, name="second"), *words, cwd=tree)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [row["epoch"] for row in tiny.rows(run)] == list(range(1, EPOCHS + 1))
    assert (run / "summary.json").exists()
    told, tags = _told(server, tracked.info.run_id)
    assert (told["info"]["status"], tags["ray_job"], tags["mlflow.source.type"]) == ("FINISHED", "second", "JOB")
    assert [metric.step for metric in client.get_metric_history(tracked.info.run_id, "epoch")] == [
        *range(1, EPOCHS + 1)
    ]


def test_a_submitted_sweep_is_on_the_server_with_its_trials(
    head: Head, server: Server, tree: Path, tmp_path: Path
) -> None:
    # A peer per trial, so that both trials run at once on the head's two CPUs.
    one = {"peers": ["resnet8"], "distiller": "none", "epochs": 2, "experiment": "swept"}
    own = ["--space", "tune_spaces.mixing", "--search", "random", "--samples", "2", "--confirm-seeds", "0"]
    words = training(*own, module="metamixer_ray.tune", name="mixing", **one)
    done = head.job(*submission(server, tmp_path, name="sweep"), *words, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    log = head.job("logs", "sweep", cwd=tree).stdout
    assert "2 trials trained to the end, 0 stopped early, 0 failed" in log
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x1b]", log.partition("mixing\n")[2])
    client = MlflowClient(server.uri)
    runs = client.search_runs([client.get_experiment_by_name("swept").experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "mixing"]
    told, tags = _told(server, parent.info.run_id)
    assert (told["info"]["status"], tags["ray_job"]) == ("FINISHED", "sweep")
    address = f"{server.uri}/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"
    assert address in log
    figures = {file.path for file in client.list_artifacts(parent.info.run_id, "figures")}
    assert {"figures/sweep-history.png", "figures/sweep-curves.png"} <= figures
    summary = json.loads((tmp_path / "home" / "runs" / "mixing" / "summary.json").read_text())
    children = [run for run in runs if run is not parent]
    assert sorted(run.info.run_name for run in children) == ["mixing-0000", "mixing-0001"]
    for child in children:
        told, tags = _told(server, child.info.run_id)
        assert (told["info"]["status"], tags["sweep.status"]) == ("FINISHED", "finished")
        assert (tags["mlflow.parentRunId"], tags["ray_job"]) == (parent.info.run_id, "sweep")
    assert max(run.data.metrics["objective"] for run in children) == summary["best"]["objective"]


def test_a_job_that_fails_says_why_in_its_last_line_and_by_its_status(
    head: Head, server: Server, tree: Path, tmp_path: Path
) -> None:
    words = training(name="failing", peers=["resnet8", "resnet33"])
    failed = head.job(*submission(server, tmp_path, name="failing"), *words, cwd=tree)
    assert failed.returncode != 0
    *_, last = head.job("logs", "failing", cwd=tree).stdout.strip().splitlines()
    assert re.match(r"error: .*resnet33", last)


def test_without_the_token_nobody_gets_in(head: Head, server: Server, tree: Path, tmp_path: Path) -> None:
    words = training(name="stranger")
    for token in ("", "0" * 64):
        refused = head.job(
            *submission(server, tmp_path, name="stranger"), *words, cwd=tree, RAY_AUTH_TOKEN=token, HOME=str(tmp_path)
        )
        assert refused.returncode != 0
        assert "token" in (refused.stdout + refused.stderr).lower()
    assert "stranger" not in head.job("list", cwd=tree).stdout
    assert not (tmp_path / "home").exists()


def test_other_machines_do_not_reach_the_job_server(head: Head) -> None:
    job_server = int(head.dashboard.rpartition(":")[2])
    assert {place for _, place, port in listening(head.process.pid) if port == job_server} == {"127.0.0.1"}


def _told(server: Server, run_id: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A run and its tags, as the server's REST API tells of them."""
    run = json.loads(_asked(f"{server.uri}/api/2.0/mlflow/runs/get?run_id={run_id}"))["run"]
    return run, {tag["key"]: tag["value"] for tag in run["data"]["tags"]}


def _asked(address: str) -> bytes:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=60) as answer:
        content: bytes = answer.read()
    return content
