"""A real MLflow server, for tests to start and to kill."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port


class Server:
    """``mlflow server`` on a port of this machine, in its own process group.

    Args:
        login: the user and the password that it asks for, if any.
    """

    def __init__(self, folder: Path, login: tuple[str, str] | None = None) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder, self._login = folder, login
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        variables = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        if self._login is not None:
            command += ["--app-name", "basic-auth"]
            user, password = self._login
            variables |= {"MLFLOW_AUTH_ADMIN_USERNAME": user, "MLFLOW_AUTH_ADMIN_PASSWORD": password}
            variables |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": "a key of the tests"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=variables, stdout=log, stderr=log, start_new_session=True
            )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + 240
        while True:
            try:
                with direct.open(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise RuntimeError((self._folder / "server.log").read_text()) from None
                time.sleep(0.2)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def tracking_server(folder: Path, login: tuple[str, str] | None = None) -> Iterator[Server]:
    """A server that runs within this context, with its store in ``folder``."""
    server = Server(folder, login)
    try:
        server.start()
        yield server
    finally:
        server.kill()
