"""A Ray head as a person starts one, with token authentication, for jobs that are submitted to it."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.e2e.waiting import wait_for
from tests.ports import answers, free_port


@dataclass(frozen=True)
class Head:
    """Where jobs are submitted, and with what."""

    dashboard: str
    environment: dict[str, str]
    process: psutil.Process

    def job(self, *words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """``ray job`` and what follows, as a person types it."""
        return subprocess.run(
            [str(Path(sys.executable).with_name("ray")), "job", *words],
            cwd=cwd,
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.dashboard, **variables},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )


@contextmanager
def head_with_token() -> Iterator[Head]:
    """A head with two CPUs on ports of its own, which goes when the context is left, with all that it started."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    # Ray's sockets lie in it, and their paths may not be long.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
        ports = {name: free_port() for name in names}
        words = [f"--{name}={port}" for name, port in ports.items()]
        process = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"),
                *("--disable-usage-stats", f"--temp-dir={scratch}", *words),
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            agent = ports["dashboard-agent-listen-port"]
            assert wait_for(lambda: process.poll() is not None or answers(agent), 120)
            yield Head(f"http://127.0.0.1:{ports['dashboard-port']}", environment, psutil.Process(process.pid))
        finally:
            started = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            for other in psutil.wait_procs(started, timeout=20)[1]:
                other.kill()
