"""Checkpoints: they come back to the last bit, or say what is wrong with them."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metamixer_ray.checkpoint import Progress, put_back, read_peer, take_snapshot
from metamixer_ray.config import TrainConfig, identity
from metamixer_ray.errors import CheckpointError, TornCheckpoint

IDENTITY = identity(TrainConfig())


def trained(seed: int, kind: str = "sgd") -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network with buffers and its optimizer after two steps."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    network[0].weight.data = network[0].weight.data.contiguous(memory_format=torch.channels_last)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        if kind == "sgd"
        else torch.optim.AdamW(network.parameters(), lr=0.1)
    )
    for _ in range(2):
        step(network, optimizer)
    return network, optimizer


def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    network(torch.randn(6, 3, 8, 8)).square().mean().backward()
    optimizer.step()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    network, optimizer = trained(1)
    take_snapshot(0, network, optimizer, Progress(epoch=2, step=3), IDENTITY).write(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_network_goes_on_as_if_it_had_never_stopped(tmp_path: Path, kind: str) -> None:
    network, optimizer = trained(1, kind)
    reports = ['{"epoch": 1}', '{"epoch": 2}']
    progress = Progress(epoch=2, step=3, total_steps=13, elapsed=1 / 7, sums={"loss": 0.1}, reports=reports)
    take_snapshot(4, network, optimizer, progress, IDENTITY).write(tmp_path)
    twin, twins_optimizer = trained(2, kind)
    assert put_back(read_peer(tmp_path, 4, IDENTITY), twin, twins_optimizer) == progress
    for one, other in ((network, optimizer), (twin, twins_optimizer)):
        torch.manual_seed(3)
        step(one, other)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in network.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peer4.json", "peer4.pt"]


@settings(deadline=None, max_examples=15)
@given(
    st.builds(
        Progress,
        epoch=st.integers(0, 10**6),
        total_steps=st.integers(0, 10**12),
        elapsed=st.floats(0, 1e9),
        sums=st.dictionaries(st.text(max_size=9), st.floats(allow_nan=False), max_size=4),
    )
)
def test_progress_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, progress: Progress) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    network = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    take_snapshot(0, network, optimizer, progress, {}).write(folder)
    assert put_back(read_peer(folder, 0, {}), network, optimizer) == progress


def test_what_is_written_later_is_what_was_then(tmp_path: Path) -> None:
    network, optimizer = trained(1)
    snapshot = take_snapshot(0, network, optimizer, Progress(epoch=2), IDENTITY)
    then = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    momenta = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    step(network, optimizer)
    assert any(not torch.equal(tensor, then[name]) for name, tensor in network.state_dict().items())
    snapshot.write(tmp_path)
    content = read_peer(tmp_path, 0)
    assert all(torch.equal(tensor, then[name]) for name, tensor in content["network"].items())
    written = [state["momentum_buffer"] for state in content["optimizer"]["state"].values()]
    assert all(torch.equal(one, other) for one, other in zip(written, momenta, strict=True))


def test_it_is_read_without_running_anything(saved: Path) -> None:
    content = torch.load(saved / "peer0.pt", weights_only=True)
    assert set(content) == {"network", "optimizer", "progress"}
    assert json.loads((saved / "peer0.json").read_text())["epoch"] == 2


def test_what_would_run_on_loading_does_not(saved: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (saved / "ran",))

    torch.save({"network": Evil()}, saved / "peer0.pt")
    manifest = json.loads((saved / "peer0.json").read_text())
    manifest["sha256"] = hashlib.sha256((saved / "peer0.pt").read_bytes()).hexdigest()
    del manifest["checksum"]
    (saved / "peer0.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"peer0\.pt holds something else than tensors and numbers: .*"):
        read_peer(saved, 0)
    assert not (saved / "ran").exists()


def test_a_checkpoint_from_before_an_option_goes_on_with_its_default(tmp_path: Path) -> None:
    network, optimizer = trained(1)
    now = identity(TrainConfig())
    before = {name: value for name, value in now.items() if name not in ("stale_steps", "kd_burn_in_epochs")}
    take_snapshot(0, network, optimizer, Progress(epoch=2), before).write(tmp_path)
    assert put_back(read_peer(tmp_path, 0, now), network, optimizer).epoch == 2
    with pytest.raises(CheckpointError, match=r"kd_burn_in_epochs was 0\.0 and is now 3\.0"):
        read_peer(tmp_path, 0, now | {"kd_burn_in_epochs": 3.0})


def cut(folder: Path) -> None:
    content = (folder / "peer0.pt").read_bytes()
    (folder / "peer0.pt").write_bytes(content[:-7])


def flip(folder: Path) -> None:
    content = bytearray((folder / "peer0.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "peer0.pt").write_bytes(bytes(content))


def cut_manifest(folder: Path) -> None:
    content = (folder / "peer0.json").read_text()
    (folder / "peer0.json").write_text(content[: len(content) // 2])


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "peer0.json").read_text())
        manifest.update({"checksum": ..., **changes})
        kept = {k: v for k, v in manifest.items() if v is not ...}
        (folder / "peer0.json").write_text(json.dumps(kept))

    return damage


def another(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Puts something else in a file's place."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, r"peer0\.pt .*torn or changed"),
        (flip, r"peer0\.pt .*torn or changed"),
        (lambda folder: (folder / "peer0.pt").unlink(), r"peer0\.pt is missing"),
        (lambda folder: (folder / "peer0.json").unlink(), r"peer0\.json is missing"),
        (cut_manifest, r"peer0\.json is torn"),
        (lambda folder: (folder / "peer0.json").write_text("[1]"), r"peer0\.json is torn"),
        (lambda folder: (folder / "peer0.json").write_bytes(b"\xff"), r"peer0\.json is torn"),
        (rewrite(sha256=...), r"peer0\.json is torn"),
        (rewrite(checksum="other"), r"peer0\.json is not the manifest that was written .*torn or changed"),
        (rewrite(peer=1), r"peer0\.json is the manifest of peer 1"),
        (rewrite(identity=7), r"peer0\.json is torn"),
        (another("peer0.json", Path.mkdir), r"peer0\.json is no file"),
        (another("peer0.pt", Path.mkdir), r"peer0\.pt is no file"),
        (another("peer0.json", os.mkfifo), r"peer0\.json is no file"),
        (another("peer0.pt", os.mkfifo), r"peer0\.pt is no file"),
        (another("peer0.pt", lambda path: path.symlink_to("/dev/zero")), r"peer0\.pt is no file"),
    ],
)
def test_what_is_wrong_with_it_is_told(saved: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(saved)
    with pytest.raises(TornCheckpoint, match=told):
        read_peer(saved, 0, IDENTITY)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.parent / "nowhere")])
def test_what_is_in_a_files_place_is_overwritten(saved: Path, make: Callable[[Path], Any]) -> None:
    for name in ("peer0.pt", "peer0.json"):
        another(name, make)(saved)
    network, optimizer = trained(1)
    take_snapshot(0, network, optimizer, Progress(epoch=4), IDENTITY).write(saved)
    assert read_peer(saved, 0, IDENTITY)["progress"]["epoch"] == 4
    assert sorted(path.name for path in saved.iterdir()) == ["peer0.json", "peer0.pt"]


def test_what_is_kept_from_us_is_torn_and_what_storage_does_not_give_may_come(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> Callable[[Path], bytes]:
        def read(path: Path) -> bytes:
            raise OSError(number, os.strerror(number))

        return read

    for number in (errno.EACCES, errno.EPERM):
        monkeypatch.setattr(Path, "read_bytes", fail(number))
        with pytest.raises(TornCheckpoint, match=r"peer0\.json can't be read \("):
            read_peer(saved, 0)
    for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
        monkeypatch.setattr(Path, "read_bytes", fail(number))
        with pytest.raises(OSError, match=r": '.*peer0\.json'") as caught:
            read_peer(saved, 0)
        assert caught.value.errno == number


def test_one_of_another_version_is_not_taken_for_torn(saved: Path) -> None:
    rewrite(format=99)(saved)
    with pytest.raises(CheckpointError, match=r"checkpoint format 99, this version reads 2") as caught:
        read_peer(saved, 0, IDENTITY)
    assert not isinstance(caught.value, TornCheckpoint)


def test_another_peers_file_is_missing(saved: Path) -> None:
    with pytest.raises(TornCheckpoint, match=r"peer1\.json is missing"):
        read_peer(saved, 1)


def test_a_checkpoint_that_fits_no_network_of_ours_is_refused(saved: Path) -> None:
    network = nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match=r"doesn't fit this training .*choose another --name"):
        put_back(read_peer(saved, 0), network, torch.optim.SGD(network.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("epoch", "x", r"progress\.epoch: .*integer"),
        ("reports", 3, r"progress\.reports: .*list"),
        ("reports", [3], r"progress\.reports\.0: .*string"),
        ("reports", ["{"], "ValueError|JSONDecodeError"),
        ("reports", ["[1]"], r"progress\.reports: each should be a JSON object"),
        ("sums", {"loss": None}, r"progress\.sums\.loss: .*number"),
        ("elapsed", [1.0], r"progress\.elapsed: .*number"),
        ("attempt", 1, r"progress\.attempt: .*string"),
        ("more", 1, "more"),
    ],
)
def test_what_is_no_progress_is_refused(saved: Path, name: str, value: Any, told: str) -> None:
    content, (network, optimizer) = read_peer(saved, 0), trained(2)
    content["progress"][name] = value
    with pytest.raises(CheckpointError, match=rf"doesn't fit this training \(.*({told}).*choose another --name"):
        put_back(content, network, optimizer)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("temperature", 5.0, "temperature was 3.0 and is now 5.0"),
        ("peers", ["resnet8"], "peers was .*resnet14.* and is now .*resnet8"),
        ("replicas", 2, "replicas was 1 and is now 2"),
        ("a_new_option", 1, "a_new_option was None"),
    ],
)
def test_another_configuration_is_named(saved: Path, name: str, value: Any, told: str) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        read_peer(saved, 0, {**IDENTITY, name: value})
    assert "config.yaml" in str(caught.value)
    assert read_peer(saved, 0)["progress"]["epoch"] == 2


def test_identities_are_compared_as_their_json(saved: Path) -> None:
    assert read_peer(saved, 0, {**IDENTITY, "peers": ("resnet14", "resnet8")})["progress"]["step"] == 3
