"""A peer that leaves the loop early would be waited for in the exchange while it waits in the evaluation."""

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from metamixer_ray import worker
from metamixer_ray.config import TrainConfig
from metamixer_ray.data import Batch
from metamixer_ray.distill import PeersDrifted
from tests.spine.pool import Pool, RankFailed
from tests.spine.training import learn_together

HERE = "tests.spine.networks"


def learn_with_fewer_batches(config: TrainConfig, folder: Path) -> None:
    """The job of one rank: the second one has one batch less than the others."""
    every = worker.train_batches

    def fewer(*args: Any, **others: Any) -> Iterator[Batch]:
        return islice(every(*args, **others), 3 if dist.get_rank() == 1 else None)

    with patch.object(worker, "train_batches", fewer):
        try:
            learn_together(config, folder)
        except PeersDrifted as error:
            (folder / "told").write_text(str(error))
            # As Ray Train does with a worker that raised: the others needn't wait until their collective's time is up.
            os._exit(1)


def test_a_peer_that_leaves_the_loop_early_is_named_by_itself(
    pool: Pool, small: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = small(peers=[f"{HERE}:tiny", f"{HERE}:wide"])
    with pytest.raises(RankFailed, match="rank 1: the process died"):
        pool.run(2, learn_with_fewer_batches, config, tmp_path)
    told = f"peer 1 ({HERE}:wide), replica 0, ran out of batches after step 3 of 5 of epoch 1"
    assert (tmp_path / "told").read_text() == told
    assert not (tmp_path / "checkpoint-epoch0001").exists()
