"""Exported networks answer like the originals, also where this package can't be imported."""

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor, nn

from metamixer_ray.tracking.mlflow_writer import MlflowWriter
from metamixer_ray.tracking.models import ModelExportError, ServedNetwork, export_network

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CLASSES = ("cat", "dog", "ship", "frog", "plane")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class FixedBatch(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).view(2, 8))


class Undecided(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


@pytest.fixture(scope="module")
def network() -> Small:
    torch.manual_seed(0)
    network = Small()
    network(torch.randn(16, 3, 8, 8))  # moves the batch statistics
    return network.train()


@pytest.fixture(scope="module")
def exported(network: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "peer0"
    options = {"classes": CLASSES, "mean": MEAN, "std": STD, "image_size": 8}
    return export_network(network, folder, metadata={"peer": 0}, **options)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def expected(network: nn.Module, batch: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    was_training = network.training
    with torch.no_grad():
        answer = network.eval()(x).softmax(1).numpy()
    network.train(was_training)
    return answer


def test_predictions_equal_for_any_batch_size(network: Small, exported: Path) -> None:
    model = mlflow.pyfunc.load_model(str(exported))
    for count in (1, 2, 7):
        answer = model.predict(images(count))
        assert answer.dtype == np.float32
        np.testing.assert_allclose(answer, expected(network, images(count)), atol=1e-5)
    assert model.metadata.metadata["classes"] == list(CLASSES)
    assert model.metadata.metadata["peer"] == 0
    assert model.model_config["device"] == "cpu"
    with pytest.raises(mlflow.exceptions.MlflowException, match="schema"):
        model.predict(images(2).astype(np.float32))


def test_the_exported_network_is_left_as_it_was(network: Small, exported: Path) -> None:
    assert network.training
    assert not any(hasattr(network, name) for name in ("mean", "std"))
    assert (exported / "data" / "model.pt2").exists()
    assert not list(exported.rglob("*.pkl")) + list(exported.rglob("*.pth"))


def test_the_model_is_an_output_of_the_run_and_loads_without_this_package(
    store: tuple[str, str], network: Small, exported: Path, tmp_path: Path
) -> None:
    uri, artifacts = store
    writer = MlflowWriter(uri, "models", "r", artifact_location=artifacts)
    writer.log_model(exported, "peer0", step=20, tags={"network": "small"})
    assert writer.finish()
    client = MlflowClient(uri)
    run = client.get_run(writer.run_id)
    [output] = run.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert (logged.name, logged.source_run_id, output.step, str(logged.status)) == (
        "peer0",
        writer.run_id,
        20,
        "READY",
    )
    # An attempt that can't know that it was sent sends it again.
    again = MlflowWriter(uri, "models", "r", run_id=writer.run_id)
    again.log_model(exported, "peer0", step=20, tags={"network": "small"})
    assert again.finish()
    assert [model.model_id for model in client.search_logged_models([writer.experiment_id])] == [output.model_id]
    assert len(client.get_run(writer.run_id).outputs.model_outputs) == 1
    program = """
import json, sys
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
answer = model.predict(np.load(sys.argv[3]))
assert model.metadata.model_id == sys.argv[4], model.metadata.model_id
print(json.dumps({"answer": answer.tolist(), "ours": [m for m in sys.modules if m.split(".")[0] == "metamixer_ray"]}))
"""
    np.save(tmp_path / "images.npy", images(3))
    arguments = [uri, f"runs:/{writer.run_id}/peer0", str(tmp_path / "images.npy"), output.model_id]
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["ours"] == []
    np.testing.assert_allclose(said["answer"], expected(network, images(3)), atol=1e-5)


@pytest.mark.parametrize(("kind", "message"), [(FixedBatch, "batch size"), (Undecided, "torch.export")])
def test_a_network_that_cannot_be_exported_is_told(kind: type[Small], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelExportError, match=message):
        export_network(kind(), tmp_path / "m", classes=CLASSES, mean=MEAN, std=STD, image_size=8)
    assert list(tmp_path.iterdir()) == []


def test_served_network_gives_probabilities(network: Small) -> None:
    served = ServedNetwork(network, MEAN, STD).eval()
    answer = served(torch.from_numpy(images(4)))
    torch.testing.assert_close(answer.sum(1), torch.ones(4))
    served.train()
