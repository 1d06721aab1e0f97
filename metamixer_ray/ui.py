"""Browse the runs of this machine: ``python -m metamixer_ray.ui``."""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from metamixer_ray.cli import run_command
from metamixer_ray.errors import ConfigError
from metamixer_ray.keeping import tracking_store
from metamixer_ray.masking import masked_uri
from metamixer_ray.tracking.mlflow_run import sqlite_file
from metamixer_ray.tracking.naming import is_server

# MLflow's server can run jobs too, for which it would start a process per core.
_QUICK = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@dataclass(frozen=True, kw_only=True)
class UiOptions:
    """Open MLflow's pages on the runs of this machine: where trainings write to when nothing else is said."""

    tracking_uri: str | None = None
    """MLflow store. Default: $MLFLOW_TRACKING_URI, else SQLite in $METAMIXER_HOME."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines in, by this machine's name; MLflow asks for no password."""
    port: int = 5000
    """Port to listen on."""


def server_command(options: UiOptions) -> list[str] | None:
    """The words of the command that shows the store; None where a server shows it already.

    Where the store is, it is told by $MLFLOW_BACKEND_STORE_URI: words of commands are seen by all users of a machine.

    Raises:
        ConfigError: there are no runs yet, or the port is taken.
    """
    uri, artifacts = tracking_store(options.tracking_uri)
    if is_server(uri):
        return None
    path = sqlite_file(uri)
    if path is not None and not os.path.exists(path):
        raise ConfigError(
            f"there are no runs in {masked_uri(uri)} yet: 'python -m metamixer_ray.train' makes one; "
            "other stores are named by --tracking-uri or $MLFLOW_TRACKING_URI"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise ConfigError(
                f"--host {options.host} --port {options.port}: {error.strerror}; --port takes another"
            ) from None
    words = [sys.executable, "-m", "mlflow", "server", "--host", options.host, "--port", str(options.port)]
    words += ["--workers", "1"]
    if artifacts is None and path is not None:
        artifacts = str(path.absolute().parent / "artifacts")
    if options.host not in ("127.0.0.1", "localhost"):
        # MLflow would refuse what browsers ask of it under any other name than localhost.
        names = {socket.gethostname(), socket.getfqdn(), options.host}
        places = sorted(f"{name}:{options.port}" for name in names)
        words += ["--allowed-hosts", ",".join(["localhost:*", "127.0.0.1:*", *places])]
        words += ["--cors-allowed-origins", ",".join(f"http://{place}" for place in places)]
    # MLflow would make a folder in the working directory otherwise.
    return words if artifacts is None else [*words, "--artifacts-destination", artifacts]


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m metamixer_ray.ui``; ends with its server, or returns its exit status."""

    def body(words: Sequence[str]) -> None:
        options = tyro.cli(UiOptions, prog="python -m metamixer_ray.ui", args=words)
        store = tracking_store(options.tracking_uri)[0]
        uri = masked_uri(store)
        command = server_command(options)
        if command is None:
            print(f"a server shows these runs already: {uri}")
            return
        host = socket.gethostname() if options.host == "0.0.0.0" else options.host
        # Else an experiment opens on pages for language models; as part of the address it would not be remembered.
        pages = f"http://{host}:{options.port}"
        print(f"the runs in {uri}: {pages}   (at the top left choose Model training; Ctrl-C ends it)", flush=True)
        # Not a child of this process: signals reach the server itself.
        os.execve(command[0], command, _QUICK | dict(os.environ) | {"MLFLOW_BACKEND_STORE_URI": store})

    return run_command(body, argv)


if __name__ == "__main__":
    sys.exit(main())
