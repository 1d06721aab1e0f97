"""A rank that is told to stop has all of them stop, at one step and with a checkpoint that is as good as any."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from metamixer_ray.checkpoint import read_peer
from metamixer_ray.config import TrainConfig
from tests.spine.pool import Pool
from tests.spine.training import learn_together

Make = Callable[..., TrainConfig]


def _steps(folder: Path, rank: int) -> list[tuple[int, int]]:
    lines = (folder / f"rank{rank}.steps").read_text().splitlines()
    return [(int(epoch), int(step)) for epoch, step, _ in map(str.split, lines)]


@pytest.mark.parametrize(("replicas", "last"), [(1, False), (2, False), (1, True)])
def test_told_inside_an_epoch_all_stop_after_the_next_step_and_go_on_as_if_nothing_had_been(
    pool: Pool, small: Make, tmp_path: Path, replicas: int, last: bool
) -> None:
    config = small(replicas=replicas, epochs=2)
    world = config.workers
    through = pool.run(world, learn_together, config, tmp_path / "through")
    steps = max(step for _, step in _steps(tmp_path / "through", 0))
    end = steps if last else 2
    pool.run(world, partial(learn_together, told_at=(1, end - 1)), config, tmp_path / "told")
    expected = [(1, step) for step in range(1, end + 1)]
    assert [_steps(tmp_path / "told", rank) for rank in range(world)] == [expected] * world
    (left,) = [path.name for path in (tmp_path / "told").iterdir() if path.is_dir()]
    assert left == f"checkpoint-epoch0000-step{end:06d}"
    after = pool.run(world, learn_together, config, tmp_path / "told", left)
    assert [o.epochs for o in after] == [o.epochs for o in through]
    told = [report for o in after for report in o.reports if report["event"] == "epoch"]
    assert all(report["images_per_second"] > 0 for report in told)
    for peer in range(len(config.peers)):
        one, two = (read_peer(tmp_path / run / "checkpoint-epoch0002", peer) for run in ("through", "told"))
        assert all(torch.equal(value, two["network"][name]) for name, value in one["network"].items())


def test_between_exchanges_nobody_stops_alone(pool: Pool, small: Make, tmp_path: Path) -> None:
    config = small(epochs=2, exchange_every=2)
    pool.run(2, partial(learn_together, told_at=(1, 1)), config, tmp_path)
    # Told after the first step, the first peer can tell the other only in the third.
    assert [_steps(tmp_path, rank)[-1] for rank in range(2)] == [(1, 3)] * 2
