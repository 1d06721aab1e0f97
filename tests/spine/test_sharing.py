"""What several machines can't share is refused before anything is trained."""

from pathlib import Path

import pytest

from metamixer_ray.config import TrainConfig, from_settings
from metamixer_ray.errors import ConfigError
from metamixer_ray.sharing import is_file, refuse_private, several

SERVER = "http://head:5000"


def _config(**settings: str) -> TrainConfig:
    return from_settings(settings)


def test_machines_are_counted_with_those_that_may_come() -> None:
    assert several(["one"], grows=False) is None
    assert several(["a", "b"], grows=False) == "this cluster has 2 machines (a, b)"
    assert several(["a", "b", "c"], grows=True) == "this cluster has 3 machines (a, b, ...)"
    assert several(["one"], grows=True) == "this cluster's autoscaler may start other machines"


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:////home/ann/mlflow.db", True),
        ("sqlite+pysqlite:///mlflow.db", True),
        ("file:///home/ann/mlruns", True),
        ("/home/ann/mlruns", True),
        ("postgresql://ann:secret@host/mlflow", False),
        ("http://head:5000", False),
        ("https://head", False),
        ("databricks", False),
        ("databricks://profile", False),
    ],
)
def test_a_store_is_a_file_or_a_service(uri: str, file: bool) -> None:
    assert is_file(uri) == file


def test_a_store_in_a_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--tracking-uri sqlite:.*mlflow\.db is a file .* 2 machines.*mlflow server"):
        refuse_private(_config(storage="/nfs/runs"), "this cluster has 2 machines")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    refuse_private(_config(storage="/nfs/runs"), "this cluster has 2 machines")
    with pytest.raises(ConfigError, match=r"--tracking-uri /mlruns is a file"):
        refuse_private(_config(storage="/nfs/runs", tracking_uri="/mlruns"), "this cluster has 2 machines")


def test_run_folders_that_nobody_named_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METAMIXER_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"would be in {tmp_path}/runs, .* --storage or \$METAMIXER_STORAGE"):
        refuse_private(_config(tracking_uri=SERVER), "this cluster has 2 machines")
    refuse_private(_config(tracking_uri=SERVER, storage="/nfs/runs"), "this cluster has 2 machines")
    monkeypatch.setenv("METAMIXER_STORAGE", "/nfs/runs")
    refuse_private(_config(tracking_uri=SERVER), "this cluster has 2 machines")
    assert list(tmp_path.iterdir()) == []
