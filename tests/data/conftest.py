from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metamixer_ray.data import DataConfig, Splits, load_splits


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAMIXER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Splits]:
    """``load_splits`` of a configuration given by its fields."""

    def load(data: Path | str, processes: int = 1, **options: Any) -> Splits:
        return load_splits(DataConfig(data=str(data), **options), processes=processes)

    return load
