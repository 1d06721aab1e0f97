"""Peers whose values are not finite: all skip such a step together, and who doesn't recover is named."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metamixer_ray.config import TrainConfig
from tests.spine.pool import Pool
from tests.spine.test_worker import HERE, identical, last, weights
from tests.spine.training import learn_together

Make = Callable[..., TrainConfig]


@pytest.mark.parametrize("distiller", ["dml", "codistillation", "mcl"])
def test_one_broken_step_is_skipped_by_all(pool: Pool, small: Make, tmp_path: Path, distiller: str) -> None:
    copying = distiller == "codistillation"
    config = small(
        peers=[f"{HERE}:tiny", f"{HERE}:broken_once"],
        replicas=2,
        checkpoint_seconds=1e-9,
        distiller=distiller,
        kd_warmup_epochs=0,
        stale_steps=1 if copying else 50,
    )
    outcomes = pool.run(4, learn_together, config, tmp_path)
    assert [o.ended for o in outcomes] == ["finished"] * 4
    assert [[row["skipped_steps"] for row in o.epochs] for o in outcomes] == [[1, 1]] * 4
    for peer in range(2):
        saved = weights(tmp_path, last(config), peer)
        assert all(torch.isfinite(v).all() for v in saved["network"].values())
        # Steps 0 and 1 learn, step 2 is broken: what step 2 left is what step 1 left.
        before, after = (weights(tmp_path, f"checkpoint-epoch0000-step{s:06d}", peer) for s in (2, 3))
        assert ("told" in before) == copying
        # Copies are refreshed before the step turns out to be broken.
        unchanged = before.keys() - {"optimizer", "progress", "told"}
        assert all(identical(before[part], after[part]) for part in unchanged)
        assert after["progress"]["total_steps"] == 3


@pytest.mark.parametrize(
    ("train_limit", "settings"),
    [(64, {}), (400, {}), (400, {"distiller": "codistillation", "stale_steps": 1, "kd_warmup_epochs": 0})],
)
def test_a_peer_broken_for_ever_is_named_within_bounded_steps(
    pool: Pool, small: Make, tmp_path: Path, train_limit: int, settings: dict[str, Any]
) -> None:
    peers = [f"{HERE}:tiny", f"{HERE}:broken_for_ever"]
    config = small(peers=peers, epochs=40, train_limit=train_limit, **settings)
    outcomes = pool.run(2, learn_together, config, tmp_path)
    for outcome in outcomes:
        assert re.match(r"diverged: 20 steps in a row .* peer 1 \(.*broken_for_ever\)", outcome.ended)
        assert len(outcome.images) == 21


def test_a_broken_replica_is_named_by_all_ranks(pool: Pool, small: Make, tmp_path: Path) -> None:
    config = small(peers=[f"{HERE}:tiny", f"{HERE}:broken_on_the_last_rank"], epochs=40, replicas=2)
    outcomes = pool.run(4, learn_together, config, tmp_path)
    assert {len(o.images) for o in outcomes} == {21}
    assert all("peer 1 (" in o.ended for o in outcomes)


def test_a_broken_peer_is_named_rightly_wherever_it_sits(pool: Pool, small: Make, tmp_path: Path) -> None:
    config = small(peers=[f"{HERE}:tiny", f"{HERE}:broken_for_ever"], epochs=40, train_limit=400)
    outcomes = pool.run(2, learn_together, config, tmp_path, None, None, [1, 0])
    assert [o.peer for o in outcomes] == [1, 0]
    assert all("peer 1 (" in o.ended for o in outcomes)
