"""Trainings end to end on a real Ray cluster: what is promised of a run's folder, its tracking and its summary."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from metamixer_ray import keeping, train
from metamixer_ray.config import read_yaml
from metamixer_ray.data import load_splits
from metamixer_ray.errors import ConfigError, DataError
from metamixer_ray.evaluate import evaluate_run, main
from metamixer_ray.folder import RunFolder
from metamixer_ray.preparation import batch_order
from tests.data.drawing import drawn_set, encoded, picture, write_parquet
from tests.e2e import own_parts, tiny

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def finished(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run of two different peers with a baseline, models and a validation split: folder and summary."""
    storage = tmp_path_factory.mktemp("finished")
    config = tiny.config(
        storage,
        name="whole",
        peers=["resnet8", "resnet14"],
        validation_fraction=0.2,
        statistics_every=2,
        baseline=True,
        log_models=True,
    )
    return storage / "runs" / "whole", train(config)


def _tracked(folder: Path) -> tuple[MlflowClient, list[Run]]:
    client = MlflowClient(f"sqlite:///{folder.parents[1]}/mlflow.db")
    experiment = client.get_experiment_by_name("metamixer_ray")
    assert experiment is not None
    return client, list(client.search_runs([experiment.experiment_id]))


def test_summary_keeps_its_contract(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    assert summary == json.loads((folder / "summary.json").read_text())
    assert [peer["network"] for peer in summary["peers"]] == ["resnet8", "resnet14"]
    for scores in [*summary["peers"], summary["ensemble"]]:
        assert 0 <= scores["top1"] <= scores["top5"] <= 1
        assert scores["nll"] > 0
        assert 0 <= scores["ece"] <= 1
    for peer, single in zip(summary["peers"], summary["baseline"]["peers"], strict=True):
        assert peer["parameters"] > 10_000
        assert math.isclose(peer["gain"], peer["top1"] - single["top1"])
    assert 0 <= summary["agreement"] <= 1
    assert summary["images_per_second"] > 0
    assert summary["exchange"]["bytes_per_step"] > 32 * 10 * 4
    assert 0 <= summary["exchange"]["wait_fraction"] <= 1
    assert (summary["mixer"], summary["distiller"]) == ("metamixer", "dml")
    config = read_yaml(folder / "config.yaml")
    steps = batch_order(config, load_splits(config.dataset)).steps_per_epoch
    assert (summary["seed"], summary["epochs"], summary["steps"]) == (0, 3, 3 * steps)
    assert summary["wall_seconds"] > summary["training_seconds"] > 0


def test_rows_are_one_per_epoch_and_hold_all_peers(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    rows = tiny.rows(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["split"] == "validation"
        assert [peer["name"] for peer in row["peers"]] == ["peer0-resnet8", "peer1-resnet14"]
        for peer in row["peers"]:
            assert math.isfinite(peer["loss"])
            assert 0 <= peer["top1"] <= 1
            assert len(peer["attention_agreement"]) == 3
    # The test set is looked at once, after the last epoch.
    assert [("test" in row) for row in rows] == [False, False, True]


def test_the_folder_repeats_the_run(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    config = read_yaml(folder / "config.yaml")
    assert config.peers == ("resnet8", "resnet14")
    assert config.baseline
    assert not config.run.resume
    for name in ("learning_curves", "mixing", "attention", "agreement"):
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len([path for path in folder.iterdir() if path.name.startswith("checkpoint-")]) == 2


def test_mlflow_has_the_run_and_its_baseline(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    client, runs = _tracked(folder)
    by_name = {run.info.run_name: run for run in runs}
    assert set(by_name) == {"whole", "whole-alone"}
    run, single = by_name["whole"], by_name["whole-alone"]
    assert run.info.status == single.info.status == "FINISHED"
    assert single.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert run.data.params["mixer"] == "metamixer"
    assert single.data.params["mixer"] == "none"
    assert (single.data.tags["mixer"], single.data.tags["distiller"]) == ("none", "none")
    assert single.data.tags["mlflow.note.content"].startswith("The networks of whole alone")
    assert run.data.params["peer1"] == "resnet14"
    for metric in ("peer0/top1", "peer1/loss", "ensemble/nll", "exchange/bytes_per_step"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, metric)] == [1, 2, 3]
    assert math.isclose(run.data.metrics["test/peer1/top1"], summary["peers"][1]["top1"])
    assert math.isclose(run.data.metrics["gain/peer1"], summary["peers"][1]["gain"])
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"figures", "config.yaml", "summary.json"} <= artifacts
    assert "resnet14" in run.data.tags["mlflow.note.content"]


def test_the_logged_model_predicts_on_raw_images(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    _, runs = _tracked(folder)
    run = next(run for run in runs if run.info.run_name == "whole")
    mlflow.set_tracking_uri(f"sqlite:///{folder.parents[1]}/mlflow.db")
    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/peer0-resnet8")
    test = load_splits(read_yaml(folder / "config.yaml").dataset).test
    images = np.ascontiguousarray(test.images.permute(0, 2, 3, 1).numpy())
    probabilities = np.asarray(model.predict(images))
    assert probabilities.shape == (len(test), 10)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-4)
    top1 = (probabilities.argmax(axis=1) == test.labels.numpy()).mean()
    assert math.isclose(top1, summary["peers"][0]["top1"])


def test_evaluate_gives_what_training_reported(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    scores = evaluate_run(RunFolder(str(folder)))
    for again, before in zip(scores["peers"], summary["peers"], strict=True):
        assert again["top1"] == before["top1"]
        assert again["top5"] == before["top5"]
        assert math.isclose(again["nll"], before["nll"], rel_tol=1e-5)
        assert math.isclose(again["ece"], before["ece"], rel_tol=1e-4, abs_tol=1e-6)
    assert scores["ensemble"]["top1"] == summary["ensemble"]["top1"]
    assert math.isclose(scores["agreement"], summary["agreement"])


def test_evaluate_as_a_command(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, summary = finished
    done = tiny.command(str(folder), "--json", module="metamixer_ray.evaluate")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peers"][0]["top1"] == summary["peers"][0]["top1"]
    # The order of words must not matter, nor may other data be taken for the run's own.
    other = ["--data", "tests.e2e.own_parts:stripes", "--device", "cpu", str(folder)]
    assert main(other) == 2
    assert "its classes are 0, 1, 2; the run was trained on 0, 1, 2, 3" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err


def test_a_name_is_taken_once_and_a_finished_run_stays(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    config = read_yaml(folder / "config.yaml")
    settings = {"peers": ["resnet8", "resnet14"], "name": "whole"}
    with pytest.raises(ConfigError, match="--name 'whole' is taken"):
        train(tiny.config(folder.parents[1], **settings))
    with pytest.raises(ConfigError, match=r"--resume: statistics_every is 16 but run .whole. has 2"):
        train(tiny.config(folder.parents[1], **settings, resume=True))
    again = tiny.config(
        folder.parents[1], **settings, resume=True, validation_fraction=0.2, statistics_every=2, baseline=True
    )
    assert again.dataset.validation_fraction == config.dataset.validation_fraction
    assert train(again) == summary


def test_more_workers_than_the_cluster_can_hold(ray_cluster: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"need 3 CPUs; the cluster has 2 CPUs in all on 2 nodes: .*--cpus-per-worker"
    ):
        train(tiny.config(tmp_path, peers=["resnet8"] * 3, cpus_per_worker=1.0))
    with pytest.raises(ConfigError, match="GPUs; the cluster has 0 GPUs in all"):
        train(tiny.config(tmp_path, gpus_per_worker=1.0))
    assert not (tmp_path / "runs").exists()


def test_what_a_worker_cannot_read_is_told_at_once(ray_cluster: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images of one class"):
        train(tiny.config(tmp_path, data="tests.e2e.own_parts:one_class", train_limit=64, image_size=16))


def test_images_that_are_replaced_before_the_workers_look_for_theirs_are_refused(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = drawn_set(tmp_path / "set", train=60)
    module = sys.modules["metamixer_ray.train"]

    def connect(*words: Any, **options: Any) -> None:
        # As while workers wait for a machine.
        images = [encoded(picture(500 + i)) for i in range(60)]
        write_parquet(data / "train.parquet", images, [i % 3 for i in range(60)])

    monkeypatch.setattr(module, "connect", connect)
    config = tiny.config(tmp_path, name="replaced", data=str(data), train_limit=None, batch_size=16)
    with pytest.raises(DataError, match="the workers hold other images than the training was started on: put back"):
        train(config)
    assert not list((tmp_path / "runs/replaced").glob("checkpoint-*"))
    with pytest.raises(DataError, match="the images have changed since run 'replaced' was started"):
        train(replace(config, run=replace(config.run, resume=True)))


def test_own_network_and_own_data_in_the_folder_a_command_is_run_in(ray_cluster: str, tmp_path: Path) -> None:
    # Not on PYTHONPATH, and on no worker's path but by the driver's doing.
    (tmp_path / "my_parts.py").write_text(Path(own_parts.__file__).read_text())
    words = tiny.flags(
        tmp_path,
        peers=["my_parts:network", "resnet8"],
        data="my_parts:stripes",
        image_size=16,
        name="own",
        train_limit=48,
        epochs=2,
        loader_processes=1,
        log_models=True,
    )
    done = tiny.command(*words, "--address", ray_cluster, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["epoch"] for row in tiny.rows(tmp_path / "runs" / "own")] == [1, 2]
    summary = json.loads((tmp_path / "runs" / "own" / "summary.json").read_text())
    assert summary["peers"][0]["network"] == "my_parts:network"
    client = MlflowClient(tiny.store(tmp_path))
    (experiment,) = [e for e in client.search_experiments() if e.name == "metamixer_ray"]
    models = client.search_logged_models([experiment.experiment_id])
    assert {model.name for model in models} == {"peer0-my_parts_network", "peer1-resnet8"}
    assert (tmp_path / "runs" / "own" / ".tracked").exists()


def test_more_workers_than_cores_each_where_its_labels_say(ray_cluster: str, tmp_path: Path) -> None:
    # The network tells on which node it was trained. Without labels all would be on one, which has room for them.
    peers, labels = ["tests.e2e.own_parts:tells_where"] * 2, ["kind=b", "kind=a"]
    settings = {"peers": peers, "peer_labels": labels, "replicas": 2, "cpus_per_worker": 0.25}
    summary = train(tiny.config(tmp_path, name="four", image_size=16, epochs=1, **settings))
    nodes = [tiny.final_state(tmp_path / "runs" / "four", peer)["network"]["node"].item() for peer in range(2)]
    assert nodes == [ord("b"), ord("a")]
    assert summary["exchange"]["bytes_per_step"] > 0
    assert summary["agreement"] is not None


def test_labels_that_no_node_has_are_refused(ray_cluster: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--peer-labels kind=c: .*kind=a, kind=b"):
        train(tiny.config(tmp_path, peer_labels=["kind=c", "-"]))


def test_what_mlflow_missed_is_sent_when_it_is_back(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = f"sqlite:///{tmp_path}/a-file/mlflow.db"
    (tmp_path / "a-file").write_text("in the way")
    config = tiny.config(tmp_path, name="late", epochs=2, tracking_uri=away)
    with monkeypatch.context() as patch:
        patch.setattr(keeping, "FAILED_SECONDS", 1.0)  # how long a store that is away is waited for
        summary = train(config)
    assert summary["epochs"] == 2
    (tmp_path / "a-file").unlink()
    assert train(replace(config, run=replace(config.run, resume=True))) == summary
    client = MlflowClient(away)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "peer1/top1")] == [1, 2]
