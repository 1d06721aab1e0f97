"""A sweep, and the trainings that end it, with secrets planted wherever they are given: what they write holds none, and
they listen on loopback."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pyarrow import fs

from tests.data.drawing import encoded, picture, write_parquet
from tests.e2e.object_store import SECRET, folder_of, object_store
from tests.ports import listening
from tests.tracking.server import tracking_server

PLANTED = {
    "MLFLOW_TRACKING_USERNAME": "planted-tracking-user",
    "MLFLOW_TRACKING_PASSWORD": "planted-tracking-password",
    "AWS_ACCESS_KEY_ID": "planted-access-key",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-key",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "RAY_AUTH_TOKEN": "planted0ray0token0" * 4,
    "HF_TOKEN": "planted-hub-token",
    "PIP_INDEX_URL": "https://someone:planted-index-password@index.invalid/simple",
}
LOGIN = ("someone@home.invalid", "planted-uri-password")
IN_URIS = ("planted-uri-password", "planted-data-key", SECRET)
SECRETS = (*PLANTED.values(), "planted-index-password", *IN_URIS)


@dataclass
class Planted:
    """What the sweep said, where it wrote, and what the processes of its last training listened on meanwhile."""

    said: str = ""
    status: int = -1
    folders: list[Path] = field(default_factory=list)
    listening: list[tuple[str, str, int]] = field(default_factory=list)
    """Name of the process, address and port."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    """A whole sweep, with data and folders in an object store, and a server for MLflow."""
    root = tmp_path_factory.mktemp("planted")
    # Sockets of Ray's lie in it, and their names must be short.
    temporary = Path(tempfile.mkdtemp(prefix="mm-"))
    for name in ("home", "metamixer", "cache", "server", "stored"):
        (root / name).mkdir()
    found = Planted(folders=[root, temporary])
    with object_store() as port, tracking_server(root / "server", LOGIN) as server:
        storage = folder_of(port)
        bucket, _ = fs.FileSystem.from_uri(storage)
        images = [encoded(picture(number)) for number in range(64)]
        for part in ("train", "test"):
            write_parquet(temporary / f"{part}.parquet", images, [number % 3 for number in range(64)])
        bucket.create_dir("bucket/set")
        fs.copy_files(str(temporary), "bucket/set", destination_filesystem=bucket)
        words = ["--address", "local", "--name", "planted", "--peers", "resnet8", "resnet8", "--epochs", "3"]
        words += ["--batch-size", "32", "--storage", storage, "--cpus-per-worker", "0.5"]
        words += ["--samples", "2", "--confirm-seeds", "0", "--refit"]
        words += ["--data", storage.replace("/runs", "/set/*.parquet").replace(SECRET, "planted-data-key")]
        words += ["--tracking-uri", server.uri.replace("//", f"//{':'.join(LOGIN)}@")]
        environment = {
            **os.environ,
            **PLANTED,
            "RAY_AUTH_MODE": "token",
            "HOME": str(root / "home"),
            "METAMIXER_HOME": str(root / "metamixer"),
            "METAMIXER_CACHE": str(root / "cache"),
            "TMPDIR": str(temporary),
            "RAY_TMPDIR": str(temporary),
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "metamixer_ray.tune", *words]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found.said += line
                if line.split()[:1] == ["2/3"]:
                    found.listening += listening(process.pid)
            found.status = process.wait()
        if found.status == 0:
            fs.copy_files("bucket/runs", str(root / "stored"), source_filesystem=bucket)
        yield found
    shutil.rmtree(temporary)


def test_all_came_to_its_end(planted: Planted) -> None:
    assert planted.status == 0, planted.said
    sweep = planted.folders[0] / "stored" / "planted"
    assert (sweep / "summary.json").exists()
    assert len(list(sweep.glob("trials/*/metrics.jsonl"))) == 2
    assert (sweep / "refit" / "planted-defaults" / "summary.json").exists()


def test_no_secret_is_written_or_told(planted: Planted) -> None:
    assert [secret for secret in SECRETS if secret in planted.said] == []
    held: dict[str, list[str]] = {}
    searched = 0
    for path in (path for folder in planted.folders for path in folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            content, searched = path.read_bytes(), searched + 1
            if secrets := [secret for secret in SECRETS if secret.encode() in content]:
                held[str(path)] = secrets
    assert held == {}
    assert searched > 50
    assert "s3://***@bucket/runs/planted" in planted.said


def test_other_machines_reach_nothing_but_torchs_rendezvous(planted: Planted) -> None:
    loopback = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    open_to_all = [(name, address) for name, address, _ in planted.listening if address not in loopback]
    assert len(planted.listening) > 10
    # A port of the first worker's: torch gives no choice. After the dot its title has what it is at, if anything.
    assert {name.split(".")[0] for name, _ in open_to_all} <= {"ray::RayTrainWorker"}
    assert len(open_to_all) <= 1
