"""Sweeps on a real cluster: stopped early, resumed after kills; what MLflow has of them."""

import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from mlflow import MlflowClient

from metamixer_ray.config import read_yaml
from metamixer_ray.errors import ConfigError
from metamixer_ray.folder import RunFolder
from metamixer_ray.sweeps.config import SweepConfig
from metamixer_ray.sweeps.ledger import Ledger, Trial
from metamixer_ray.sweeps.trial import objective_of
from metamixer_ray.tracking.board import settings_text
from metamixer_ray.tune import main, tune
from tests.e2e import tiny
from tests.e2e.waiting import wait_for, workers

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

EPOCHS = 4
MIXING = """
from hyperopt import hp
def space():
    return {"pairing": hp.choice("pairing", ["cross-class", "within-class"]), "local_alpha": hp.uniform("a", 0.5, 2.0)}
"""
RATES = """
from hyperopt import hp
def space():
    return {"lr": hp.choice("lr", [0.001, 0.05])}
"""


def _trials(folder: Path) -> list[Trial]:
    return Ledger(RunFolder(str(folder / "trials"))).trials()


def _free() -> bool:
    return ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


@dataclass
class Swept:
    """A sweep that ended, and what it left."""

    storage: Path
    folder: Path
    summary: dict[str, Any]
    killed: int


@pytest.fixture(scope="module")
def swept(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Two spaces joined, asha, settings that diverge or break, and a worker killed on the way."""
    storage = tmp_path_factory.mktemp("swept")
    (storage / "mixing.py").write_text(MIXING)
    (storage / "rates.py").write_text(RATES)
    (storage / "diverges.yaml").write_text(yaml.safe_dump({"lr": 1e12, "batch_size": 4}))
    (storage / "breaks.yaml").write_text(yaml.safe_dump({"peers": ["tests.e2e.own_parts:breaks_later", "resnet8"]}))
    folder = storage / "runs" / "swept"
    killed: list[int] = []

    def kill_one() -> None:
        if wait_for(lambda: tiny.recorded(folder / "trials" / "0000") >= 1):
            victim = workers(os.getpid())[0]
            victim.send_signal(signal.SIGKILL)
            killed.append(victim.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    config = SweepConfig(
        space=(str(storage / "mixing.py"), str(storage / "rates.py")),
        samples=5,
        random_first=2,
        first=(str(storage / "diverges.yaml"), str(storage / "breaks.yaml")),
        trial_failures=0,
        grace_epochs=1,
        reduction_factor=2,
        confirm_seeds=1,
        training=tiny.config(storage, name="swept", epochs=EPOCHS),
    )
    summary = tune(config)
    killer.join()
    return Swept(storage, folder, summary, len(killed))


def test_every_trial_has_an_end_and_a_reason(swept: Swept) -> None:
    trials = _trials(swept.folder)
    assert len(trials) == 5
    assert swept.killed == 1
    defaults, diverged, broken, *others = trials
    assert (defaults.origin, defaults.settings, defaults.status) == ("defaults", {}, "finished")
    assert (diverged.origin, diverged.status) == ("first", "failed")
    assert "non-finite values" in diverged.reason
    assert (broken.origin, broken.status) == ("first", "failed")
    assert "worn out" in broken.reason
    assert {trial.status for trial in others} <= {"finished", "stopped"}
    assert any(trial.status == "stopped" and trial.epochs < EPOCHS for trial in trials)
    assert all("lr" in trial.settings and "pairing" in trial.settings for trial in others)
    # A killed worker changes nothing: each epoch is there once.
    assert [row["epoch"] for row in tiny.rows(swept.folder / "trials" / "0000")] == list(range(1, EPOCHS + 1))
    assert wait_for(_free, seconds=30)


def test_the_test_set_is_left_alone(swept: Swept) -> None:
    for trial in _trials(swept.folder):
        if trial.status == "failed":
            continue
        for row in tiny.rows(swept.folder / "trials" / trial.name):
            assert row["split"] == "validation"
            assert "test" not in row


def test_the_best_settings_are_a_configuration(swept: Swept) -> None:
    finished = [trial for trial in _trials(swept.folder) if trial.status == "finished"]
    best = max(finished, key=lambda trial: trial.objective or 0.0)
    assert swept.summary["best"]["number"] == best.number
    config = read_yaml(swept.folder / "best.yaml")
    config.check()
    assert config.test
    assert config.dataset.validation_fraction == 0
    for name, value in best.settings.items():
        assert getattr(config.mixing, name, None) == value or config.optimisation.lr == (value,)
    gain = swept.summary["gain"]
    if best.settings:
        assert gain["seeds"] == 1
        assert gain["mean"] == pytest.approx(gain["best"][0] - gain["defaults"][0])
    else:
        assert gain is None


def test_mlflow_holds_a_parent_and_a_child_per_trial(swept: Swept) -> None:
    client = MlflowClient(f"sqlite:///{swept.storage}/mlflow.db")
    experiment = client.get_experiment_by_name("metamixer_ray")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "swept"]
    assert parent.info.status == "FINISHED"
    assert re.match(
        r"best: (.*\n)+A sweep over .*: resnet8, resnet8 on digits.*", parent.data.tags["mlflow.note.content"]
    )
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {
        *("best.yaml", "summary.json", "sweep.yaml", "space.txt", "figures")
    }
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "figures")} >= {
        *("figures/sweep-history.png", "figures/sweep-curves.png", "figures/sweep-settings.png")
    }
    children = {r.info.run_name: r for r in runs if r.data.tags["sweep"] == "swept" and r is not parent}
    assert len(children) == 5
    for trial in _trials(swept.folder):
        child = children[f"swept-{trial.name}"]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["sweep.status"] == trial.status
        assert child.info.status == ("FAILED" if trial.status == "failed" else "FINISHED")
        float(child.data.params["lr"])  # a number, for parallel coordinates
        assert (child.data.tags["mixer"], child.data.tags["distiller"]) == ("metamixer", "dml")
        note = child.data.tags["mlflow.note.content"]
        assert "training of the sweep swept on digits" in note
        (told,) = re.findall(r"- settings: (.*)", note)
        assert set(told.split()) <= {*settings_text(trial.settings, 1000).split(), "defaults"}
        assert trial.settings.get("lr", 0.1) == 0.1 or f"lr={trial.settings['lr']:.3g}" in told
        assert f"metamixer_ray.train --config {swept.folder}/trials/{trial.name}/config.yaml" in note
        if trial.status == "failed":
            assert child.data.tags["sweep.reason"] == trial.reason
            continue
        assert child.data.metrics["objective"] == pytest.approx(trial.objective)
        rows = tiny.rows(swept.folder / "trials" / trial.name)
        steps = [metric.step for metric in client.get_metric_history(child.info.run_id, "peers/top1_mean")]
        assert steps == [row["epoch"] for row in rows]
        # Also where it trained on for some epochs before the scheduler's stop had reached it.
        assert (trial.epochs, trial.objective) == (rows[-1]["epoch"], objective_of(rows[-1], "mean"))


def test_the_same_name_and_a_typo_are_refused_before_anything_runs(swept: Swept) -> None:
    config = SweepConfig(training=tiny.config(swept.storage, name="swept", epochs=EPOCHS))
    with pytest.raises(ConfigError, match=r"--name 'swept' is taken .* add --resume"):
        tune(config)
    with pytest.raises(ConfigError, match=r"did you mean 'tune_spaces.mixing'"):
        tune(replace(config, space=("tune_spaces.mxing",)))


def test_a_killed_sweep_goes_on(ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The second trial is what the defaults are as well.
    (tmp_path / "rates.py").write_text(RATES.replace("0.001, 0.05", "0.1"))
    own = ["--space", str(tmp_path / "rates.py"), "--search", "grid", "--scheduler", "none", "--confirm-seeds", "0"]
    words = [*own, *tiny.flags(tmp_path, name="killed", epochs=EPOCHS), "--address", ray_cluster]
    folder = tmp_path / "runs" / "killed"
    driver = subprocess.Popen([sys.executable, "-m", "metamixer_ray.tune", *words], stdout=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: tiny.recorded(folder / "trials" / "0001") >= 1)
    finally:
        driver.kill()
        driver.wait()
    assert [trial.status for trial in _trials(folder)] == ["finished", "running"]
    assert main([*words, "--resume"]) == 0
    assert "  1/2" not in capsys.readouterr().out  # what was over is not shown again
    assert [trial.status for trial in _trials(folder)] == ["finished"] * 2
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("metamixer_ray").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["killed", *(f"killed-000{n}" for n in range(2))]
    assert {run.info.status for run in runs} == {"FINISHED"}
    for number in range(2):
        assert [row["epoch"] for row in tiny.rows(folder / "trials" / f"000{number}")] == list(range(1, EPOCHS + 1))
    # The one that was interrupted ended as the one that was not.
    tiny.assert_same_weights(folder / "trials" / "0000", folder / "trials" / "0001", peers=2)
    assert main([*words, "--resume", "--samples", "3", "--grace-epochs", "2"]) == 2
    assert "--grace-epochs is 2 but sweep 'killed' has None" in capsys.readouterr().err


def test_a_stopped_sweep_lets_go_at_once_however_long_its_epochs_are(ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "rates.py").write_text(RATES)
    own = ["--space", str(tmp_path / "rates.py"), "--samples", "2", "--scheduler", "none", "--confirm-seeds", "0"]
    # Nothing is told of a trial before its last epoch.
    words = [*own, *tiny.flags(tmp_path, name="long", epochs=1000, evaluate_every=1000), "--address", ray_cluster]
    trial = tmp_path / "runs" / "long" / "trials" / "0000"
    driver = subprocess.Popen(
        [sys.executable, "-m", "metamixer_ray.tune", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert wait_for(lambda: (trial / "metrics.jsonl").exists())
    finally:
        driver.send_signal(signal.SIGTERM)
        told, _ = driver.communicate(timeout=200)
    assert driver.returncode == 143, told
    assert "--name long --resume goes on" in told
    # The trial's own process ended its training; it was not killed.
    assert (trial / ".ended").exists()
    assert not (trial / ".reserved").exists()
    assert [trial.status for trial in _trials(tmp_path / "runs" / "long")] == ["running"]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("metamixer_ray").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == {"long": "KILLED", "long-0000": "KILLED"}
