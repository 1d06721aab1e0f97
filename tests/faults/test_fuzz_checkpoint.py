"""Whatever stands in a checkpoint's two files: the peer that was written, or a CheckpointError that names a file."""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metamixer_ray.checkpoint import CHECK, FORMAT, Progress, read_peer, take_snapshot
from metamixer_ray.errors import CheckpointError
from tests.faults.test_fuzz import examples, json_values, reading, torn

IDENTITY = {"epochs": 3, "peers": ["resnet8"]}


def write(folder: Path) -> Path:
    network = torch.nn.Linear(2, 2)
    folder.mkdir(exist_ok=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    take_snapshot(0, network, optimizer, Progress(epoch=1), IDENTITY).write(folder)
    return folder


def whole_or_refused(folder: Path) -> None:
    content, problem = reading(lambda: read_peer(folder, 0))
    if problem:
        assert "peer0" in problem
    else:
        assert content["progress"]["epoch"] == 1
        assert set(content["network"]) == {"weight", "bias"}


def test_a_manifest_that_is_nested_without_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    (folder / "peer0.json").write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError, match="peer0"):
        read_peer(folder, 0)


def sign(folder: Path, **changed: Any) -> None:
    """Give the manifest the hash of what the file holds by now, as somebody who means harm would, and other changes."""
    manifest = json.loads((folder / "peer0.json").read_text())
    manifest |= {"sha256": hashlib.sha256((folder / "peer0.pt").read_bytes()).hexdigest(), **changed}
    del manifest[CHECK]
    check = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "peer0.json").write_text(json.dumps({**manifest, CHECK: check}))


def test_what_is_signed_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    torch.save({**read_peer(folder, 0), "more": 1}, folder / "peer0.pt")
    sign(folder)
    assert read_peer(folder, 0)["more"] == 1


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("kind", ["torch", "pickle", "nothing", "text", "a list"])
def test_a_signed_file_that_is_no_checkpoint(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "checkpoint")
    path = folder / "peer0.pt"
    if kind == "torch":
        torch.save({"network": Bomb()}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "a list":
        torch.save([1, 2], path)
    else:
        path.write_bytes(b"" if kind == "nothing" else b"x" * 1000)
    sign(folder)
    with pytest.raises(CheckpointError, match=r"peer0\.pt holds (something else than tensors|no peer but a list)"):
        read_peer(folder, 0)
    assert not (tmp_path / "ran").exists()


def test_a_signed_file_that_is_torn(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    content = (folder / "peer0.pt").read_bytes()
    for end in range(0, len(content), max(1, len(content) // 20)):
        (folder / "peer0.pt").write_bytes(content[:end])
        sign(folder)
        with pytest.raises(CheckpointError, match=r"peer0\.pt holds something else"):
            read_peer(folder, 0)


MANIFEST = {"format": FORMAT, "peer": 0, "epoch": 1, "step": 0, "sha256": "0" * 64, "identity": IDENTITY}
hostile = st.dictionaries(st.sampled_from(sorted(MANIFEST)), json_values, max_size=2).map(
    lambda changes: json.dumps(MANIFEST | changes).encode()
)


@examples(200)
@given(
    st.binary(max_size=30) | json_values.map(json.dumps).map(str.encode) | hostile | torn(json.dumps(MANIFEST).encode())
)
def test_any_bytes_as_manifest(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = write(tmp_path_factory.getbasetemp() / "fuzzed-checkpoint")
    (folder / "peer0.json").write_bytes(content)
    whole_or_refused(folder)


@examples(100)
@given(json_values)
def test_any_identity_is_compared(tmp_path_factory: pytest.TempPathFactory, theirs: Any) -> None:
    folder = write(tmp_path_factory.getbasetemp() / "fuzzed-checkpoint")
    sign(folder, identity=theirs)
    with pytest.raises(CheckpointError, match=r"belongs to another configuration|not a manifest"):
        read_peer(folder, 0, IDENTITY)
