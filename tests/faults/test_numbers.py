"""Values that aren't finite, at random places and moments: all leave the step out together, and nobody else is hurt."""

import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from metamixer_ray.config import TrainConfig
from metamixer_ray.flags import MAX_SKIPPED_IN_A_ROW
from metamixer_ray.folder import checkpoint_name
from tests.faults.spoiling import BACKWARD, FINE_GRADIENTS, FORWARD, Spoilt, named
from tests.spine.pool import Pool
from tests.spine.test_worker import identical, weights
from tests.spine.training import Outcome, learn_together

EXAMPLES = 5 * int(os.environ.get("FAULTS_EXAMPLES", "1"))
STEPS_PER_EPOCH, EPOCHS = 5, 3
STEPS = STEPS_PER_EPOCH * EPOCHS
DISTILLERS: list[dict[str, Any]] = [
    {"distiller": "dml"},
    {"distiller": "mcl"},
    {"distiller": "ensemble-gated"},
    {"distiller": "codistillation", "stale_steps": 1},
]

Small = Callable[..., TrainConfig]


def drawn(dice: random.Random, ranks: int, kinds: Sequence[tuple[str, str]]) -> dict[int, Spoilt]:
    """Faults by the step that they come at, on whatever rank; at least one."""
    steps = dice.sample(range(STEPS), dice.randint(1, 6))
    return {step: Spoilt(*dice.choice(kinds), step, dice.randrange(ranks)) for step in steps}


def expected(faults: dict[int, Spoilt], peer_of: list[int]) -> tuple[list[bool], list[set[int]]]:
    """Of every step, whether all leave it out, and which peers learn nothing from it.

    That gradients aren't finite is known when everybody has learnt: the peer leaves that step out alone, and all the
    next one, and more of them while its gradients aren't finite. Replicas have the mean of theirs.
    """
    skipped: list[bool] = []
    idle: list[set[int]] = []
    broken: set[int] = set()
    for step in range(STEPS):
        fault = faults.get(step)
        hurt = set() if fault is None else {peer_of[fault.rank]}
        skipped.append(bool(broken) or (fault is not None and fault.place != "gradients"))
        if skipped[-1]:
            idle.append(set(peer_of))
            fine = fault is not None and (fault.place, fault.value) in FINE_GRADIENTS
            broken = set() if fine else broken & hurt
        else:
            idle.append(hurt)
            broken = hurt
    return skipped, idle


def train(
    pool: Pool, small: Small, folder: Path, faults: Iterable[Spoilt], replicas: int, **settings: Any
) -> list[Outcome]:
    """Train two peers that suffer ``faults``, with a checkpoint after every step."""
    base = {
        "peers": [named(faults)] * 2,
        "replicas": replicas,
        "epochs": EPOCHS,
        "train_limit": 16 * STEPS_PER_EPOCH,
        "kd_warmup_epochs": 0,
        "statistics_weight": 0.1,
        "checkpoint_seconds": 1e-9,
    }
    outcomes: list[Outcome] = pool.run(2 * replicas, learn_together, small(**{**base, **settings}), folder)
    return outcomes


def after(step: int) -> str:
    """The name of the checkpoint after ``step`` (from 0) of the training."""
    epoch, done = divmod(step + 1, STEPS_PER_EPOCH)
    return checkpoint_name(epoch, done)


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_what_is_not_finite_is_learnt_by_nobody(pool: Pool, small: Small, tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    replicas = dice.choice([1, 2])
    faults = drawn(dice, 2 * replicas, FORWARD + BACKWARD)
    outcomes = train(pool, small, tmp_path, faults.values(), replicas)
    assert {outcome.ended for outcome in outcomes} == {"finished"}
    skipped, idle = expected(faults, [outcome.peer for outcome in outcomes])
    counts = [sum(skipped[: STEPS_PER_EPOCH * epoch]) for epoch in range(1, EPOCHS + 1)]
    assert [[row["skipped_steps"] for row in outcome.epochs] for outcome in outcomes] == [counts] * len(outcomes)
    for peer in range(2):
        states = [weights(tmp_path, after(step), peer) for step in range(STEPS)]
        assert all(torch.isfinite(value).all() for state in states for value in state["network"].values())
        learnt = [
            not all(
                identical(one["network"][name], two["network"][name]) for name in one["network"] if "weight" in name
            )
            for one, two in pairwise(states)
        ]
        assert learnt == [peer not in left_out for left_out in idle[1:]]
        for step in range(1, STEPS):
            if skipped[step]:
                before, now = states[step - 1], states[step]
                assert identical(before["network"], now["network"])
                assert identical(before["optimizer"]["state"], now["optimizer"]["state"])


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_it_makes_no_difference_who_was_spoilt_and_how(pool: Pool, small: Small, tmp_path: Path, seed: int) -> None:
    dice = random.Random(1000 + seed)
    replicas = dice.choice([1, 2])
    ranks, method = 2 * replicas, {**dice.choice(DISTILLERS), "optimizer": dice.choice(["sgd", "adamw"])}
    faults = drawn(dice, ranks, FORWARD)
    other = [
        Spoilt(*dice.choice(FORWARD), step, (f.rank + dice.randrange(1, ranks)) % ranks) for step, f in faults.items()
    ]
    for side, suffered in (("one", faults.values()), ("two", other)):
        for outcome in train(pool, small, tmp_path / side, suffered, replicas, **method):
            assert outcome.ended == "finished"
            assert outcome.epochs[-1]["skipped_steps"] == len(faults)
    for peer in range(2):
        one, two = (weights(tmp_path / side, after(STEPS - 1), peer) for side in ("one", "two"))
        for part in ("network", "optimizer"):
            assert identical(one[part], two[part])


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_values_that_stay_so_end_the_training_with_the_name_of_who_has_them(
    pool: Pool, small: Small, tmp_path: Path, seed: int
) -> None:
    dice = random.Random(2000 + seed)
    replicas, start, kind = dice.choice([1, 2]), dice.randrange(1, STEPS), dice.choice(FORWARD)
    ranks = dice.sample(range(2 * replicas), dice.choice([1, 2]))
    faults = [Spoilt(*kind, start + step, rank) for step in range(MAX_SKIPPED_IN_A_ROW) for rank in ranks]
    outcomes = train(pool, small, tmp_path, faults, replicas, epochs=10)
    peers = {outcomes[rank].peer for rank in ranks}
    culprit = re.escape(f"peer {peers.pop()} ({named(faults)})") if len(peers) == 1 else "several peers"
    for outcome in outcomes:
        assert re.match(f"diverged: 20 steps in a row had non-finite values in {culprit}; lower --lr", outcome.ended)
    for peer in range(2):
        good = weights(tmp_path, after(start - 1), peer)
        for step in range(start, start + MAX_SKIPPED_IN_A_ROW - 1):
            assert identical(weights(tmp_path, after(step), peer)["network"], good["network"])
