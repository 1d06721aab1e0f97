"""The command that opens MLflow's pages on this machine's runs."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from metamixer_ray.errors import ConfigError
from metamixer_ray.keeping import ui_command
from metamixer_ray.ui import UiOptions, main, server_command
from tests.ports import free_port, listening

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAMIXER_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_the_runs_of_this_machine_are_shown(home: Path) -> None:
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    run = client.create_run(client.create_experiment("e", (home / "mlartifacts").as_uri()), run_name="peers")
    client.log_text(run.info.run_id, "seen", "note.txt")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "metamixer_ray.ui", "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port} " in process.stdout.readline()
        address = f"http://127.0.0.1:{port}/get-artifact?path=note.txt&run_uuid={run.info.run_id}"
        assert _asked(address, process) == b"seen"
        assert {place for _, place, _ in listening(process.pid)} == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        assert sorted(path.name for path in home.iterdir() if "mlflow.db" not in path.name) == ["mlartifacts"]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _asked(address: str, process: subprocess.Popen[str]) -> bytes:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with direct.open(address, timeout=60) as answer:
                content: bytes = answer.read()
                return content
        except OSError:
            assert process.poll() is None
            time.sleep(0.2)


def test_what_cannot_be_shown_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=rf"no runs in sqlite:///{home}/mlflow.db yet"):
        server_command(UiOptions())
    assert list(home.iterdir()) == []
    (home / "mlflow.db").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["--port", str(other.getsockname()[1])]) == 2
    assert "--port takes another" in capsys.readouterr().err


def test_a_server_needs_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tracking-uri", "http://ann:secret@host:5000"]) == 0
    assert "http://***@host:5000" in capsys.readouterr().out


def test_other_stores_are_named(home: Path) -> None:
    (home / "other.db").touch()
    words = server_command(UiOptions(tracking_uri=f"sqlite:///{home}/other.db", port=free_port()))
    assert words is not None
    assert words[-2:] == ["--artifacts-destination", f"{home}/artifacts"]
    words = server_command(UiOptions(tracking_uri="postgresql://host/mlflow", port=free_port()))
    assert words is not None
    assert "postgresql" not in " ".join(words), "a password in it would be seen by all users of the machine"


def test_other_machines_are_let_in_by_name(home: Path) -> None:
    (home / "mlflow.db").touch()
    port = free_port()
    words = server_command(UiOptions(host="0.0.0.0", port=port))
    assert words is not None
    assert f"{socket.gethostname()}:{port}" in words[words.index("--allowed-hosts") + 1].split(",")
    assert f"http://{socket.gethostname()}:{port}" in words[words.index("--cors-allowed-origins") + 1].split(",")


def test_the_line_that_is_told(home: Path) -> None:
    assert ui_command(f"sqlite:///{home}/mlflow.db") == "python -m metamixer_ray.ui"
    assert ui_command("sqlite:////x y/mlflow.db") == (
        "python -m metamixer_ray.ui --tracking-uri 'sqlite:////x y/mlflow.db'"
    )
    assert ui_command("http://h:5000") is None
