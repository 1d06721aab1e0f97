"""What the spine's tests share: processes that stay, and digits decoded once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metamixer_ray.config import TrainConfig, from_settings
from metamixer_ray.data import load_splits
from tests.spine.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with Pool() as pool:
        yield pool


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainConfig]:
    """Makes a configuration of a training of seconds; settings by their names override it."""
    cache: Path = tmp_path_factory.mktemp("cache")
    base: dict[str, Any] = {
        "peers": ["tests.spine.networks:tiny", "tests.spine.networks:wide"],
        "epochs": 2,
        "batch_size": 16,
        "train_limit": 64,
        "image_size": 8,
        "precision": "float32",
        "checkpoint_seconds": 0,
        "lr": 0.05,
        "cache_dir": str(cache),
    }
    load_splits(from_settings(base).dataset)

    def make(**settings: Any) -> TrainConfig:
        config = from_settings({**base, **settings})
        config.check()
        return config

    return make
