"""Exported files answer as the original does, for raw images and any number of them; others are not left behind."""

import json
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metamixer_ray.data import Splits
from metamixer_ray.errors import ConfigError
from metamixer_ray.export import ExportOptions, export_peer, load_network, main
from metamixer_ray.folder import RunFolder
from metamixer_ray.networks import StagedNetwork
from tests.spine.networks import Tiny
from tests.spine.run_folder import make_run

Made = tuple[RunFolder, list[StagedNetwork], Splits]
PEERS = ("resnet8", "mobilenetv2", "tests.spine.test_export:two_faced", "tests.spine.test_export:rigid")


class TwoFaced(Tiny):
    """Answers otherwise when it is traced."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (0.9 if torch.compiler.is_exporting() else 1.0)


class Rigid(Tiny):
    """Can't be traced."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1.0 if float(images.sum()) > 0 else 2.0)


def two_faced(classes: int) -> nn.Module:
    return TwoFaced(classes)


def rigid(classes: int) -> nn.Module:
    return Rigid(classes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("runs") / "four", *PEERS)


def expected(made: Made, peer: int, images: Tensor) -> Tensor:
    _, networks, splits = made
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (splits.mean, splits.std))
    with torch.no_grad():
        return networks[peer]((images.float() / 255 - mean) / std).softmax(1)


def images_of(made: Made, count: int) -> Tensor:
    return made[2].test.take(torch.arange(count))


def test_pt2_takes_raw_images(made: Made) -> None:
    folder = made[0]
    exported = export_peer(folder, ExportOptions(run="four", peer="resnet8", format="pt2"))
    path = Path(str(folder)) / "export" / "peer0-resnet8.pt2"
    assert (exported.path, exported.size) == (str(path), path.stat().st_size)
    assert exported.images == 256
    assert exported.agreement == 1.0
    record = {"metadata.json": ""}
    predict = torch.export.load(path, extra_files=record).module()
    for count in (1, 3):
        torch.testing.assert_close(predict(images_of(made, count)), expected(made, 0, images_of(made, count)))
    assert json.loads(json.loads(record["metadata.json"])["classes"]) == list(made[2].classes)
    with ZipFile(path) as records:
        assert not [name for name in records.namelist() if name.endswith(".pkl")]


@pytest.mark.parametrize("peer", [0, 1])
def test_safetensors_build_the_network_again(made: Made, peer: int, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "new" / "weights.safetensors"
    export_peer(made[0], ExportOptions(run="four", peer=str(peer), format="safetensors", output=str(path)))
    state = torch.get_rng_state()
    network, card = load_network(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert (card.network, card.image_size, card.classes) == (PEERS[peer], 8, made[2].classes)
    assert (card.mean, card.std) == (made[2].mean, made[2].std)
    original = made[1][peer]
    for name, tensor in original.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    inputs = torch.randn(3, 3, 8, 8)
    assert torch.equal(network(inputs), original(inputs))


def test_files_that_build_no_network_get_one_error(made: Made, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    export_peer(made[0], ExportOptions(run="four", peer="0", format="safetensors", output=str(path)))
    card = load_network(path)[1]
    torn, strange, other = tmp_path / "torn", tmp_path / "strange", tmp_path / "other"
    torn.write_bytes(path.read_bytes()[:100])
    safetensors.save_file({"weight": torch.zeros(2)}, strange)
    safetensors.save_file({"weight": torch.zeros(2)}, other, metadata=card.metadata("safetensors"))
    for file, problem in (
        (tmp_path / "none", "can't be read as safetensors"),
        (torn, "can't be read as safetensors"),
        (strange, "isn't that of an exported network"),
        (other, "its weights are not those of the resnet8"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_network(file)


def test_onnx_takes_raw_images(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "resnet8.onnx"
    exported = export_peer(made[0], ExportOptions(run="four", peer="peer0-resnet8", output=str(path)))
    assert exported.difference <= 1e-4
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 3, 8, 8])
    for count in (1, 5):
        images = images_of(made, count)
        [answer] = session.run(["probabilities"], {"images": images.numpy()})
        np.testing.assert_allclose(answer, expected(made, 0, images), atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(made[2].classes)
    assert "uint8 [batch, 3, 8, 8]" in metadata["input"]


def test_a_file_that_answers_otherwise_is_not_kept(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "network.pt2"
    path.write_text("an earlier one")
    with pytest.raises(
        ConfigError, match=r"doesn't answer as peer2-.* differ by up to .*e-0\d on 256 images of digits"
    ):
        export_peer(made[0], ExportOptions(run="four", peer="2", format="pt2", output=str(path)))
    assert path.read_text() == "an earlier one"
    with pytest.raises(ConfigError, match=r"peer3-.* can't be exported .*--format safetensors"):
        export_peer(made[0], ExportOptions(run="four", peer="3", format="pt2"))
    assert not list(Path(str(made[0])).rglob("peer[23]*.pt2"))


def test_a_peer_must_be_named_clearly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, _ = make_run(tmp_path / "twins", "tests.spine.networks:tiny", "tests.spine.networks:tiny")
    place = Path(str(folder)) / "export"
    (place / "peer1-tests_spine_networks_tiny.pt2").mkdir(parents=True)
    for words, problem in (
        ([], "--peer: which one"),
        (["--peer", "1"], "export/peer1-tests_spine_networks_tiny.pt2 can't be written"),
        (["--peer", "tests.spine.networks:tiny"], "tiny: that is several"),
        (["--peer", "2"], "--peer 2: there is no such peer"),
        (["--peer", "0", "--output", str(tmp_path)], "is a folder"),
    ):
        assert main([str(folder), "--format", "pt2", *words]) == 2
        assert problem in capsys.readouterr().err
    assert len(list(place.iterdir())) == 1
    (place / "peer1-tests_spine_networks_tiny.pt2").rmdir()
    assert main([str(folder), "--format", "pt2", "--peer", "1"]) == 0
    told = capsys.readouterr().out
    assert "export/peer1-tests_spine_networks_tiny.pt2" in told
    assert "input     images: uint8 [batch, 3, 8, 8]" in told
