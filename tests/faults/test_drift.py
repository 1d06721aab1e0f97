"""A peer that leaves the loop early would be waited for in the exchange while it waits in the evaluation."""

import os
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from metamixer_ray import worker
from metamixer_ray.checkpoint import read_peer
from metamixer_ray.config import TrainConfig
from metamixer_ray.data import Batch
from metamixer_ray.distill import PeersDrifted
from tests.spine.pool import Pool, RankFailed
from tests.spine.training import learn_together

EXAMPLES = 4 * int(os.environ.get("FAULTS_EXAMPLES", "1"))
HERE = "tests.spine.networks"
EPOCHS, STEPS_PER_EPOCH = 3, 5


def leave_early(config: TrainConfig, folder: Path, rank: int, epoch: int, steps: int) -> None:
    """The job of one rank: train, but ``rank`` gets only so many batches of ``epoch`` (from 0)."""
    every = worker.train_batches

    def fewer(*args: Any, **others: Any) -> Iterator[Batch]:
        early = dist.get_rank() == rank and others["epoch"] == epoch
        return islice(every(*args, **others), steps if early else None)

    with patch.object(worker, "train_batches", fewer):
        try:
            learn_together(config, folder)
        except PeersDrifted as error:
            (folder / "told").write_text(str(error))
            # As Ray Train does with a worker that raised: the others needn't wait until their collective's time is up.
            os._exit(1)


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_a_peer_that_leaves_the_loop_early_is_named_by_itself(
    pool: Pool, small: Callable[..., TrainConfig], tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    replicas = dice.choice([1, 2])
    rank, epoch, steps = dice.randrange(2 * replicas), dice.randrange(EPOCHS), dice.randrange(STEPS_PER_EPOCH)
    peers = [f"{HERE}:tiny", f"{HERE}:wide"]
    config = small(peers=peers, replicas=replicas, epochs=EPOCHS, train_limit=16 * STEPS_PER_EPOCH)
    with pytest.raises(RankFailed, match=f"rank {rank}: the process died") as failed:
        pool.run(2 * replicas, leave_early, config, tmp_path, rank, epoch, steps)
    # The others came to an end by that, and not by their patience.
    assert "Timed out" not in str(failed.value)
    # Replicas of one peer sit side by side.
    peer, replica = divmod(rank, replicas)
    who, when = (
        f"peer {peer} ({peers[peer]}), replica {replica}",
        f"step {steps} of {STEPS_PER_EPOCH} of epoch {epoch + 1}",
    )
    assert (tmp_path / "told").read_text() == f"{who}, ran out of batches after {when}"
    whole = [f"checkpoint-epoch{done:04d}" for done in range(1, epoch + 1)]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == whole
    for name in whole:
        assert [read_peer(tmp_path / name, peer)["progress"]["step"] for peer in range(2)] == [0, 0]
