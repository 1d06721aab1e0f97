"""A comparison on a real cluster: its table, what MLflow has of it, and going on with a further method."""

import json
from pathlib import Path
from statistics import fmean

import pytest
from mlflow import MlflowClient

from metamixer_ray.compare import compare, main
from metamixer_ray.comparison.config import CompareConfig
from tests.e2e import tiny

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_methods_are_compared_and_what_is_done_is_not_run_again(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = tiny.config(tmp_path, name="compared", epochs=2, keep_checkpoints=3)
    first = compare(CompareConfig(methods=("dml",), seeds=1, training=training))
    folder = tmp_path / "runs" / "compared"
    assert [method["method"] for method in first["methods"]] == ["independent", "dml"]
    rows = [tiny.rows(folder / "trials" / f"000{number}") for number in range(2)]
    for method, ((*_, last)) in zip(first["methods"], rows, strict=True):
        assert last["split"] == "test"  # all of the training set is trained on
        assert method["mean"]["mean"] == pytest.approx(fmean(peer["top1"] for peer in last["peers"]))
        assert method["ensemble"]["mean"] == last["ensemble"]["top1"]
    gain = first["methods"][1]["mean"]["mean"] - first["methods"][0]["mean"]["mean"]
    assert first["methods"][1]["gain"] == {"mean": pytest.approx(gain), "half_width": None, "seeds": 1}

    own = ["--methods", "dml+cutmix", "--seeds", "1", "--resume", "--address", ray_cluster]
    words = [*own, *tiny.flags(tmp_path, name="compared", epochs=2)]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "  1/3" not in told  # what was over is neither trained nor told again
    assert "  3/3" in told
    assert [tiny.rows(folder / "trials" / f"000{number}") for number in range(2)] == rows
    table = (folder / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][2:] == [
        *("independent", "dml+cutmix", "dml")
    ]
    assert all(line in told for line in table.splitlines())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["methods"][2] | {"step_ratio": None} == first["methods"][1] | {"step_ratio": None}

    client = MlflowClient(tiny.store(tmp_path))
    runs = client.search_runs([client.get_experiment_by_name("metamixer_ray").experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "compared"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len([run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]) == 3
    assert parent.data.metrics["dml-cutmix/mean"] == pytest.approx(summary["methods"][1]["mean"]["mean"])
    assert parent.data.tags["mlflow.note.content"].startswith("| method")
    kept = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert kept == {"comparison.yaml", "summary.json", "table.md", "table.csv", "trainings.csv", "figures"}

    assert main([*words, "--lr", "0.2"]) == 2
    assert "--lr is [0.2] but comparison 'compared' has [0.1]" in capsys.readouterr().err
