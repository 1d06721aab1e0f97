"""The bytes that a plan foretells are those that real exchanges and real trainings count."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from metamixer_ray.config import TrainConfig, from_settings
from metamixer_ray.data import load_splits
from metamixer_ray.distill import (
    EXCHANGE_DTYPES,
    Control,
    Exchange,
    Own,
    build_distiller,
    feature_statistics,
    flat_state,
    statistics_message,
)
from metamixer_ray.planning import Link, Messages, epoch_of, messages
from metamixer_ray.planning.estimate import exchange_estimate
from metamixer_ray.preparation import batch_order, build_peers, refreshes
from tests.spine.pool import Pool
from tests.spine.training import learn_together

SHAPES = [(1, 2), (7, 11), (16, 100), (8, 1000)]
KINDS = [
    {"statistics": "none"},
    {"statistics": "attention", "statistics_weight": 1.0, "statistics_grid": 3},
    {"statistics": "similarity", "statistics_weight": 1.0},
    {"distiller": "none", "statistics": "attention", "statistics_weight": 1.0},
    {"statistics": "attention", "statistics_weight": 1.0, "exchange_dtype": "bf16"},
    {"distiller": "kdcl-naive", "statistics": "attention", "statistics_weight": 1.0},
    {"distiller": "kdcl-minlogit", "statistics": "attention", "statistics_weight": 1.0},
    {"distiller": "okddip", "statistics": "attention", "statistics_weight": 1.0, "projection_dim": 5},
    {"distiller": "mcl", "statistics": "none"},
    {"distiller": "ensemble-gated", "statistics": "none"},
]
STAGES = 3
LINK = Link(bandwidth=1e9, latency=1e-5)


def config_of(peers: int, kind: dict[str, Any]) -> TrainConfig:
    return from_settings({"peers": ["resnet8"] * peers, **kind})


def count_bytes(peers: int) -> list[float]:
    """The job of one rank: every kind of message of every shape, and what the exchange counted of it."""
    counted = []
    for kind in KINDS:
        config = config_of(peers, kind).distillation
        for rows, classes in SHAPES:
            exchange = Exchange(dist.group.WORLD, "cpu", EXCHANGE_DTYPES[config.exchange_dtype])
            # Features as wide and large as they come: what is said of them doesn't depend on it.
            width = 4 + 3 * dist.get_rank()
            distiller = build_distiller(config, width=width, leads=dist.get_rank() + 1 == peers)
            features = [torch.rand(rows, width, 8, 8) for _ in range(STAGES)]
            statistics = feature_statistics(features, config.statistics, grid=config.statistics_grid)
            targets = torch.full((rows, classes), 1 / classes)
            own = Own(logits=torch.rand(rows, classes), targets=targets, embedding=torch.rand(rows, width))
            said = distiller.say(own)
            beside = statistics_message(statistics)
            exchange.start(said, control=Control(step=0), reduce=distiller.reduce, beside=beside).wait()
            counted.append(exchange.cost().bytes_per_step)
    return counted


def count_bytes_of_each(rows: int) -> float:
    """The job of one rank: one message that every peer gets from each other."""
    exchange = Exchange(dist.group.WORLD, "cpu")
    exchange.start({"logits": torch.rand(rows, 10)}, control=Control(step=0), reduce="each").wait()
    return exchange.cost().bytes_per_step


@pytest.mark.parametrize("peers", [2, 3])
def test_the_bytes_of_a_step_are_those_the_exchange_counts(peers: int, pool: Pool) -> None:
    foretold = []
    for kind in KINDS:
        for rows, classes in SHAPES:
            said = messages(config_of(peers, kind), rows=[rows], classes=classes, stages=STAGES)
            assert said.mean_bytes == said.largest_bytes
            foretold.append(exchange_estimate(said, peers, LINK).bytes_per_step)
    for counted in pool.run(peers, count_bytes, peers):
        assert counted == foretold


@pytest.mark.parametrize("peers", [2, 3])
def test_what_each_peer_hears_of_each_is_counted_per_listener(peers: int, pool: Pool) -> None:
    alone = messages(config_of(2, {"distiller": "none", "statistics": "none"}), rows=[1], classes=2, stages=1)
    size = 4 * 5 * 10 + alone.largest_bytes
    said = Messages(reduce="each", exchanges_per_step=1.0, mean_bytes=size, largest_bytes=size)
    foretold = exchange_estimate(said, peers, LINK)
    assert pool.run(peers, count_bytes_of_each, 5) == [foretold.bytes_per_step] * peers
    assert foretold.sent_bytes_per_step == foretold.bytes_per_step


@pytest.mark.parametrize(
    "settings",
    [
        {"statistics_every": 3},
        {"replicas": 2, "statistics_weight": 0.5},
        {"exchange_every": 2, "statistics_every": 2, "exchange_dtype": "bf16"},
    ],
)
def test_the_bytes_of_a_training_are_those_it_reports(
    settings: dict[str, Any], small: Callable[..., TrainConfig], pool: Pool, tmp_path: Path
) -> None:
    # 52 images in batches of at most 24 are not all equally large.
    config = small(train_limit=52, batch_size=24, epochs=1, **settings)
    epoch = epoch_of(config, images=None, classes=None)
    said = messages(config, rows=epoch.rows, classes=epoch.classes, stages=2)
    reports = [outcome.reports[-1] for outcome in pool.run(config.workers, learn_together, config, tmp_path)]
    assert [report["exchange"]["bytes_per_step"] for report in reports] == pytest.approx(
        [said.mean_bytes] * config.workers
    )
    assert said.mean_bytes <= said.largest_bytes


def test_an_epoch_of_data_that_is_here_is_that_of_the_training(small: Callable[..., TrainConfig]) -> None:
    for settings in ({"train_limit": None}, {"validation_fraction": 0.1, "replicas": 2}):
        config = small(**settings)
        epoch, splits = epoch_of(config, images=None, classes=None), load_splits(config.dataset)
        batches = batch_order(config, splits).epoch(0)
        assert epoch.rows == tuple(len(batch) // config.placement.replicas for batch in batches)
        assert (epoch.classes, epoch.size) == (len(splits.classes), splits.train.image_size)
        watched = splits.validation or splits.test
        assert (epoch.evaluated, epoch.tested) == (len(watched), len(splits.test) if splits.validation else 0)


def test_the_weights_that_codistillation_tells_are_foretold(
    small: Callable[..., TrainConfig], pool: Pool, tmp_path: Path
) -> None:
    config = small(
        peers=["tests.spine.networks:tiny"] * 3,
        distiller="codistillation",
        stale_steps=3,
        statistics="none",
        kd_burn_in_epochs=0.6,
        epochs=3,
    )
    epoch = epoch_of(config, images=None, classes=None)
    said = messages(config, rows=epoch.rows, classes=epoch.classes, stages=2)
    (network, *_) = build_peers(config, classes=epoch.classes, image_size=epoch.size)
    told = flat_state(network).nbytes
    steps = len(epoch.rows)
    # Every third step, but not in the burn-in and not at its very end, where the ramp begins at zero.
    due = [step for step in range(3, 3 * steps, 3) if step > 0.6 * steps]
    assert 0 < len(due) < len(range(3, 3 * steps, 3))
    assert refreshes(config, steps) == due
    for outcome in pool.run(3, learn_together, config, tmp_path):
        for number, report in enumerate(r for r in outcome.reports if r["event"] == "epoch"):
            first = number * steps
            told_now = sum(step in due for step in range(first, first + steps))
            expected = exchange_estimate(said, 3, LINK, spread_bytes=told_now * told / steps, spreads_per_step=1.0)
            assert report["exchange"]["bytes_per_step"] == pytest.approx(expected.bytes_per_step)
