"""What the end-to-end tests share: a run that nothing happened to."""

from pathlib import Path

import pytest

from metamixer_ray import train
from tests.e2e import tiny

EPOCHS = 8


@pytest.fixture(scope="session")
def uninterrupted(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ``EPOCHS`` epochs that nothing happened to."""
    storage = tmp_path_factory.mktemp("uninterrupted")
    train(tiny.config(storage, name="calm", epochs=EPOCHS))
    return storage / "runs" / "calm"
