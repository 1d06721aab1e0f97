"""Exchanging seldom, or in fewer bits: what is sent, what is learnt, what happens when a step is broken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from metamixer_ray.checkpoint import read_peer
from metamixer_ray.config import TrainConfig
from metamixer_ray.distill.control import CONTROL_FLOATS
from metamixer_ray.errors import ConfigError
from tests.spine.pool import Pool
from tests.spine.training import Outcome, learn_together

Make = Callable[..., TrainConfig]
HERE = "tests.spine.networks"
STEPS = 5


def counted(config: TrainConfig, folder: Path) -> tuple[Outcome, int]:
    """Train, and count the exchange's collectives by the sizes that only it sends."""
    sent = 0
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += bool(kwargs.get("async_op"))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        return learn_together(config, folder), sent
    finally:
        dist.all_reduce = original


def network_of(folder: Path, config: TrainConfig, peer: int) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = read_peer(folder / f"checkpoint-epoch{config.epochs:04d}", peer)["network"]
    return weights


@pytest.mark.parametrize(("every", "exchanges"), [(1, 2 * STEPS), (2, 6), (3, 4), (9, 2)])
def test_between_exchanges_nothing_is_sent(pool: Pool, small: Make, tmp_path: Path, every: int, exchanges: int) -> None:
    config = small(exchange_every=every, statistics="none")
    outcomes = pool.run(2, counted, config, tmp_path)
    assert [sent for _, sent in outcomes] == [exchanges] * 2
    reports = [row for row in outcomes[0][0].reports if row["event"] == "epoch"]
    # Batches hold 12 or 16 rows; a row costs ten probabilities and an entropy.
    spoken = exchanges / 2
    assert all(row["exchange"]["bytes_per_step"] * STEPS / spoken >= 4 * (12 * 11 + CONTROL_FLOATS) for row in reports)
    assert all(row["exchange"]["bytes_per_step"] * STEPS / spoken <= 4 * (16 * 11 + CONTROL_FLOATS) for row in reports)


def test_on_silent_steps_peers_learn_from_labels_alone(pool: Pool, small: Make, tmp_path: Path) -> None:
    # The one exchange has weight zero yet: it is the ramp's first step.
    settings = {"epochs": 1, "statistics": "none", "kd_warmup_epochs": 1.0}
    seldom, alone = small(exchange_every=9, **settings), small(distiller="none", epochs=1, statistics="none")
    pool.run(2, learn_together, seldom, tmp_path / "seldom")
    pool.run(2, learn_together, alone, tmp_path / "alone")
    often = small(exchange_every=1, **settings)
    pool.run(2, learn_together, often, tmp_path / "often")
    for peer in range(2):
        one, two = network_of(tmp_path / "seldom", seldom, peer), network_of(tmp_path / "alone", alone, peer)
        other = network_of(tmp_path / "often", often, peer)
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_seldom_exchange_is_resumed_where_it_was(pool: Pool, small: Make, tmp_path: Path) -> None:
    config = small(exchange_every=2, statistics_weight=0.5, checkpoint_seconds=1e-9, kd_warmup_epochs=0)
    through = pool.run(2, learn_together, config, tmp_path / "whole")
    # Only steps that exchange can agree on a checkpoint.
    middle = "checkpoint-epoch0001-step000003"
    assert (tmp_path / "whole" / middle).exists()
    assert not (tmp_path / "whole" / "checkpoint-epoch0001-step000002").exists()
    pool.run(2, learn_together, config, tmp_path / "parts", None, middle)
    after = pool.run(2, learn_together, config, tmp_path / "parts", middle)
    for peer in range(2):
        one, two = (network_of(tmp_path / folder, config, peer) for folder in ("whole", "parts"))
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert [o.epochs for o in after] == [o.epochs for o in through]


def test_a_step_broken_in_silence_is_skipped_by_its_peer_alone(pool: Pool, small: Make, tmp_path: Path) -> None:
    # The third training step is broken, which with an exchange every five steps is a silent one.
    config = small(peers=[f"{HERE}:tiny", f"{HERE}:broken_once"], exchange_every=5)
    outcomes = pool.run(2, learn_together, config, tmp_path)
    assert [o.ended for o in outcomes] == ["finished"] * 2
    assert [o.epochs[-1]["skipped_steps"] for o in outcomes] == [0, 1]
    assert all(torch.isfinite(v).all() for p in range(2) for v in network_of(tmp_path, config, p).values())


def test_a_peer_broken_in_silence_is_named(pool: Pool, small: Make, tmp_path: Path) -> None:
    config = small(peers=[f"{HERE}:broken_for_ever"], distiller="none", exchange_every=50, epochs=40)
    (outcome,) = pool.run(1, learn_together, config, tmp_path)
    assert "peer 0 (" in outcome.ended


def test_fewer_bits_change_little(pool: Pool, small: Make, tmp_path: Path) -> None:
    settings = {"kd_warmup_epochs": 0, "epochs": 1}
    losses = {}
    pool.run(2, learn_together, small(distiller="none", epochs=1), tmp_path / "alone")
    for dtype in ("float32", "bf16"):
        outcomes = pool.run(2, learn_together, small(exchange_dtype=dtype, **settings), tmp_path / dtype)
        (row,) = [r for r in outcomes[0].reports if r["event"] == "epoch"]
        losses[dtype] = row["train"]["kd"], row["exchange"]["bytes_per_step"]
    assert losses["bf16"][1] * 2 == losses["float32"][1]
    assert losses["bf16"][0] != losses["float32"][0]
    # T squared times the rounding of a negative entropy of -log 10, which is the coarsest part (and has no gradient).
    assert losses["bf16"][0] == pytest.approx(losses["float32"][0], abs=9 * 2**-7)
    # What the rounding changes in the weights is little beside what the exchange changes.
    exact, rounded, alone = (network_of(tmp_path / run, small(**settings), 0) for run in (*losses, "alone"))
    moved = max((exact[name] - alone[name]).abs().max() for name in exact)
    assert 0 < max((exact[name] - rounded[name]).abs().max() for name in exact) < 0.1 * moved


def test_what_cannot_work_is_refused(small: Make) -> None:
    with pytest.raises(ConfigError, match="--exchange-every must be at least 1 step, not 0"):
        small(exchange_every=0)
    with pytest.raises(ConfigError, match="--exchange-dtype bf16 can count up to 256 peers, there are 257"):
        small(exchange_dtype="bf16", peers=["resnet8"] * 257)
