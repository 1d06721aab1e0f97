import json
import math
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metamixer_ray.masking import masked
from metamixer_ray.tracking.naming import PARAMETER_LENGTH, metric_values, model_name, parameter_values, run_place
from metamixer_ray.tracking.provenance import environment_tags, git_commit, ray_job, repeat_command, source_tags
from tests.tracking.examples import make_rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://ann:pa55@db:5432/x", "postgresql://***@db:5432/x"),
        ("s3://AKIA:ab/cd+e@bucket/path", "s3://***@bucket/path"),
        ("https://token@host/x and http://a:b@c", "https://***@host/x and http://***@c"),
        ("s3://bucket/p?secret_key=abc&region=eu", "s3://bucket/p?secret_key=***&region=eu"),
        ("python -m x --api-token=abc --lr 1", "python -m x --api-token=*** --lr 1"),
        ("sqlite:////home/ann/mlflow.db", "sqlite:////home/ann/mlflow.db"),
        ("http://127.0.0.1:5000/api", "http://127.0.0.1:5000/api"),
    ],
)
def test_secrets_are_masked(text: str, expected: str) -> None:
    assert masked(text) == expected


@given(st.text("abcXYZ09+/=@:-_", min_size=6, max_size=30))
def test_no_password_survives(password: str) -> None:
    assert password not in masked(f"scheme://someone:{password}@host.example/path")


def test_parameters_are_flat_typed_and_cut() -> None:
    values = parameter_values(
        {
            "mixer": "metamixer",
            "compile": False,
            "lr": 0.1,
            "mix_stages": (0, 2),
            "image_size": None,
            "long": "x" * 9999,
        }
    )
    assert values["mixer"] == "metamixer"
    assert (values["compile"], values["lr"], values["mix_stages"], values["image_size"]) == (
        "false",
        "0.1",
        "[0, 2]",
        "null",
    )
    assert len(values["long"]) == PARAMETER_LENGTH
    assert values["long"].endswith("...")


def test_metric_names_are_flat_and_epoch_is_last() -> None:
    row = make_rows(2, 1)[0]
    row["peers"][1]["kd"] = math.nan
    row["peers"][1]["statistics"] = None
    metrics = metric_values(row)
    assert metrics["peer0/top1"] == row["peers"][0]["top1"]
    assert metrics["peer1/attention_agreement/2"] == 0.8
    assert metrics["ensemble/nll"] == 1.1
    assert metrics["exchange/seconds_per_step"] == 0.0021
    assert metrics["peers/top1_mean"] == pytest.approx((row["peers"][0]["top1"] + row["peers"][1]["top1"]) / 2)
    assert not {"peer1/kd", "peer1/statistics", "time", "split", "peer0/name"} & metrics.keys()
    assert list(metrics)[-1] == "epoch"
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


def test_an_epoch_without_evaluation_has_no_scores() -> None:
    metrics = metric_values(make_rows(2, 3, every=3)[0])
    assert "peer0/loss" in metrics
    assert not any("top1" in name and "train" not in name for name in metrics)
    assert "agreement" not in metrics


def test_environment_has_versions_but_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "hunter2-hunter2")
    tags = environment_tags()
    assert {"python", "torch", "ray", "mlflow", "host", "hardware"} <= tags.keys()
    assert "hunter2-hunter2" not in repr(tags)


def test_a_repository_that_does_not_track_the_code_is_not_taken(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "__init__.py").touch()
    assert git_commit(tmp_path / "site-packages") is None


def test_the_command_to_repeat_is_quoted_and_masked() -> None:
    command = repeat_command("metamixer_ray.train", instead=["--name", "two words", "--storage", "s3://k:s@b"])
    assert command == "python -m metamixer_ray.train --name 'two words' --storage 's3://***@b'"


def test_the_command_of_another_program_is_not_taken_for_ours() -> None:
    """Here pytest runs."""
    command = repeat_command("metamixer_ray.train", instead=["--config", "/runs/a b/config.yaml"])
    assert command == "python -m metamixer_ray.train --config '/runs/a b/config.yaml'"


def test_names_of_models_are_those_that_mlflow_takes() -> None:
    assert model_name("peer0-resnet8") == "peer0-resnet8"
    assert model_name("peer0-my.parts:network") == "peer0-my_parts_network"


def test_where_the_run_is() -> None:
    place = "http://***@h:5000/#/experiments/1/runs/abc?workflowType=machine_learning"
    assert run_place("http://a:b@h:5000/", "e", "r", ("1", "abc")) == place
    assert run_place("http://h:5000", "e", "r", (None, None)) == "experiment e, run r"
    assert run_place("sqlite:////x/mlflow.db", "e", "r", ("1", "abc")) == "experiment e, run r"


@pytest.mark.parametrize("told", [None, "", "{", "[]", '{"metadata": null}', '{"metadata": {}}'])
def test_outside_a_job_a_run_is_local(told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if told is not None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", told)
    assert ray_job() is None
    tags = source_tags("python -m metamixer_ray.train")
    assert (tags["mlflow.source.type"], "ray_job" in tags) == ("LOCAL", False)


def test_the_job_of_a_run_is_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.dumps({"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1", "job_name": "x"}})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", told)
    tags = source_tags("python -m metamixer_ray.train --epochs 3")
    assert (tags["mlflow.source.type"], tags["ray_job"]) == ("JOB", "raysubmit_1")
