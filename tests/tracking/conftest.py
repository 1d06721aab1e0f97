"""One SQLite store for the whole session: creating its tables takes seconds."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Tracking URI and artifact location of a SQLite store in a folder that does not exist yet."""
    root: Path = tmp_path_factory.mktemp("home") / "not" / "there yet"
    return f"sqlite:///{root}/mlflow.db", str(root / "artifacts")
