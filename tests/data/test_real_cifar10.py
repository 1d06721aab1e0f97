"""CIFAR-10 itself, where a copy lies beside the repository."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from metamixer_ray.data import BatchOrder, DataConfig, load_splits, train_batches

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10"

pytestmark = pytest.mark.skipif(not (FOLDER / "train.parquet").exists(), reason="no copy of CIFAR-10 beside this")


def test_cifar10_from_file_to_batches() -> None:
    config = DataConfig(data=str(FOLDER), validation_fraction=0.1, train_limit=2000)
    splits = load_splits(config, processes=2)
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2000, 5000, 10_000)
    assert splits.classes[0] == "airplane"
    assert splits.classes[9] == "truck"
    assert np.bincount(splits.train.labels).tolist() == [200] * 10
    assert splits.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=5e-4)
    assert splits.std == pytest.approx((0.247, 0.2435, 0.2616), abs=3e-3)

    again = subprocess.run(
        [
            sys.executable,
            "-c",
            "from metamixer_ray.data import *; "
            f"print(load_splits(DataConfig(data={str(FOLDER)!r}, validation_fraction=0.1, "
            "train_limit=2000)).fingerprint)",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert again.stdout.strip() == splits.fingerprint, "another process maps the same images"

    order = BatchOrder(splits.train.labels, batch_size=128, replicas=1, quadruples=True, seed=0)
    batches = list(train_batches(splits.train, order, config, seed=0, epoch=0, replica=0))
    assert len(batches) == 16
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(2000))
