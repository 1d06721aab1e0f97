"""A training small enough for tests, and how to look at what it left."""

import json
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from metamixer_ray.checkpoint import read_peer
from metamixer_ray.config import TrainConfig, from_settings

# Of the run that nothing happens to, and of those that are compared with it.
EPOCHS = 8
SETTINGS: dict[str, Any] = {
    "peers": ["resnet8", "resnet8"],
    "train_limit": 96,
    "image_size": 8,
    "batch_size": 32,
    "epochs": 3,
    "log_models": False,
    "precision": "float32",
}

# One peer, which waits where a test asks for patience (see own_parts).
PATIENT: dict[str, Any] = {
    "peers": ["tests.e2e.own_parts:patient"],
    "image_size": 16,
    "distiller": "none",
    "statistics": "none",
    "mixer": "none",
}


def config(storage: Path, **settings: Any) -> TrainConfig:
    """The tiny training with some settings changed; its tracking store lies beside its run."""
    return from_settings({**SETTINGS, "tracking_uri": store(storage), "storage": str(storage / "runs"), **settings})


def flags(storage: Path, **settings: Any) -> list[str]:
    """The same as command-line flags."""
    merged = {**SETTINGS, "tracking_uri": store(storage), "storage": storage / "runs", **settings}
    words: list[str] = []
    for name, value in merged.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    return words


def store(folder: Path) -> str:
    """An MLflow store in ``folder``: a copy of an empty one, since making one anew takes MLflow two seconds."""
    path = folder / "mlflow.db"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(_empty_store(), path)
    return f"sqlite:///{path}"


@cache
def _empty_store() -> Path:
    path = Path(tempfile.mkdtemp(prefix="metamixer_ray-tests-")) / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def command(*words: str, module: str = "metamixer_ray.train", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of the project as a person would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, timeout=280, check=False, **options
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def recorded(folder: Path) -> int:
    """How many rows there are so far, also where there is no run yet."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def final_state(folder: Path, peer: int) -> dict[str, Any]:
    """What a run's newest checkpoint holds of a peer."""
    newest = max(path for path in folder.iterdir() if path.name.startswith("checkpoint-"))
    return read_peer(newest, peer)


def assert_same_weights(first: Path, second: Path, peers: int) -> None:
    """Both runs ended with the same bits: weights, running statistics and optimizer state."""
    for peer in range(peers):
        one, two = final_state(first, peer), final_state(second, peer)
        assert one["network"].keys() == two["network"].keys()
        for name, tensor in one["network"].items():
            assert torch.equal(tensor, two["network"][name]), f"peer {peer}: {name} differs"
        for key, state in one["optimizer"]["state"].items():
            for name, tensor in state.items():
                other = two["optimizer"]["state"][key][name]
                assert torch.equal(tensor, other) if torch.is_tensor(tensor) else tensor == other


def assert_equal_runs(calm: Path, other: Path, epochs: int = EPOCHS) -> None:
    """Two runs of so many epochs of two peers ended with the same bits, and recorded each epoch once, the same."""
    assert_same_weights(calm, other, peers=2)
    ours, theirs = rows(calm), rows(other)
    assert [row["epoch"] for row in theirs] == list(range(1, epochs + 1))
    assert [without_times(row) for row in ours] == [without_times(row) for row in theirs]


def tracked(storage: Path, name: str | None = None) -> tuple[MlflowClient, Run]:
    """The only run that there is in the MLflow store of :func:`config`, or the only one of that name."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("metamixer_ray")
    assert experiment is not None
    wanted = f"attributes.run_name = '{name}'" if name else ""
    (run,) = client.search_runs([experiment.experiment_id], wanted)
    return client, run


def tracked_epochs(storage: Path, name: str | None = None) -> list[int]:
    """The epochs that that run, which is finished, was told of, as often as it was."""
    client, run = tracked(storage, name)
    assert run.info.status == "FINISHED"
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "epoch")]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what a clock says."""
    clocks = {"seconds", "elapsed", "images_per_second", "exchange", "time"}
    return {key: value for key, value in row.items() if key not in clocks}
