"""Codistillation: copies that are as old as they should be, and the loss written out from the paper."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from metamixer_ray.checkpoint import read_peer
from metamixer_ray.config import TrainConfig, from_settings, with_settings
from metamixer_ray.data import load_splits
from metamixer_ray.distill import (
    Control,
    DistillConfig,
    Exchange,
    Own,
    PeersDisagree,
    PeersDrifted,
    StaleCopies,
    build_distiller,
    flat_state,
    kd_ramp,
)
from metamixer_ray.errors import ConfigError
from metamixer_ray.networks import NetworkConfig, StagedNetwork, build_network
from metamixer_ray.planning import epoch_of
from metamixer_ray.preparation import batch_order, part_of, refreshes
from tests.spine.networks import digest
from tests.spine.pool import Pool
from tests.spine.training import learn_together

STEPS, EVERY, CLASSES, ROWS, T = 6, 4, 5, 7, 2.0
DISJOINT: dict[str, Any] = {
    "distiller": "codistillation",
    "disjoint_data": True,
    "statistics": "none",
    "stale_steps": 1,
}
NAMES = ["tests.spine.networks:dropping", "resnet8", "tests.spine.networks:dropping"]


def networks(peers: int) -> list[StagedNetwork]:
    torch.manual_seed(3)
    return [build_network(name, classes=CLASSES, image_size=8, config=NetworkConfig()) for name in NAMES[:peers]]


def images_of(step: int) -> Tensor:
    return torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def targets_of(step: int) -> Tensor:
    return torch.rand(ROWS, CLASSES, generator=torch.Generator().manual_seed(100 + step)).softmax(1)


@torch.no_grad()
def learn(network: nn.Module, peer: int, step: int) -> None:
    """Any change of weights and running statistics."""
    generator = torch.Generator().manual_seed(1000 * peer + step)
    for value in (*network.parameters(), *network.buffers()):
        if value.is_floating_point():
            value.add_(0.02 * torch.rand(value.shape, generator=generator))


def codistil(peers: int, turned: bool) -> list[tuple[float, Tensor, float]]:
    """The job of one rank: per step the loss, its gradient on the logits, and the bytes that were told."""
    rank = dist.get_rank()
    # Which peer each member of the group is need not be the order of the ranks.
    order = list(range(peers))[::-1] if turned else list(range(peers))
    peer = order[rank]
    everyone = networks(peers)
    own = everyone[peer].train()
    exchange = Exchange(dist.group.WORLD, "cpu")
    copies = StaleCopies(everyone, peer, torch.device("cpu"))
    distiller = build_distiller(DistillConfig(distiller="codistillation", temperature=T))
    results = []
    for step in range(STEPS):
        exchange.reset_cost()
        if step % EVERY == 0:
            told = exchange.spread(flat_state(own), [copies.sizes[other] for other in order], step=step)
            copies.refresh(dict(zip(order, told, strict=True)))
        torch.manual_seed(step)
        logits = own(images_of(step))
        mine = Own(logits=logits, targets=targets_of(step), stale=copies.look(images_of(step)))
        heard = exchange.start(distiller.say(mine), control=Control(step=step), reduce=distiller.reduce).wait()
        loss = distiller.loss(mine, heard)
        (gradient,) = torch.autograd.grad(loss, logits)
        cost = exchange.cost()
        results.append((float(loss.detach()), gradient, cost.bytes_per_step * cost.steps))
        learn(own, peer, step)
    return results


@pytest.mark.parametrize(("peers", "turned"), [(2, False), (3, False), (3, True)])
def test_loss_and_gradient_are_the_papers_with_copies_of_the_right_age(peers: int, turned: bool, pool: Pool) -> None:
    outcomes = pool.run(peers, codistil, peers, turned)
    if turned:
        outcomes = outcomes[::-1]
    now = networks(peers)
    stale: list[nn.Module] = []
    for step in range(STEPS):
        if step % EVERY == 0:
            stale = [copy.deepcopy(network).eval() for network in now]
        with torch.no_grad():
            predictions = [F.softmax(network(images_of(step)).double() / T, dim=1) for network in stale]
        for peer in range(peers):
            torch.manual_seed(step)
            logits = now[peer].train()(images_of(step)).detach().double().requires_grad_()
            teacher = sum(p for j, p in enumerate(predictions) if j != peer) / (peers - 1)
            assert isinstance(teacher, Tensor)
            # Cross-entropy with the teacher's mean prediction, less the teacher's entropy, which has no gradient.
            entropy = torch.special.entr(teacher).sum(1)
            loss = T**2 * (-(teacher * F.log_softmax(logits / T, dim=1)).sum(1) - entropy).mean()
            (gradient,) = torch.autograd.grad(loss, logits)
            found, found_gradient, told = outcomes[peer][step]
            assert found == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
            assert found > 0
            assert torch.allclose(found_gradient.double(), gradient, rtol=1e-4, atol=1e-6)
            size = 4 * len(flat_state(now[peer])) * (peers - 1)
            assert (told >= size) == (step % EVERY == 0)
        for peer, network in enumerate(now):
            learn(network, peer, step)


def test_without_copies_to_ask_there_is_nothing_to_learn(pool: Pool) -> None:
    distiller = build_distiller(DistillConfig(distiller="codistillation"))
    logits = torch.randn(ROWS, CLASSES, requires_grad=True)
    heard = Exchange(None, "cpu").start({}, control=Control(step=0)).wait()
    loss = distiller.loss(Own(logits=logits, targets=targets_of(0)), heard)
    assert loss.item() == 0
    assert not loss.requires_grad


def test_a_copy_that_has_gone_wrong_teaches_nobody() -> None:
    distiller = build_distiller(DistillConfig(distiller="codistillation"))
    heard = Exchange(None, "cpu").start({}, control=Control(step=0)).wait()
    logits, stale = torch.randn(ROWS, CLASSES, requires_grad=True), torch.randn(2, ROWS, CLASSES)

    def learnt(stale: Tensor) -> tuple[Tensor, Tensor]:
        loss = distiller.loss(Own(logits=logits, targets=targets_of(0), stale=stale), heard)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    for broken in (torch.inf, torch.nan):
        spoiled = stale.clone()
        spoiled[0, 3, 1] = broken
        for one, other in zip(learnt(spoiled), learnt(stale[1:]), strict=True):
            assert torch.allclose(one, other, atol=1e-6)
        spoiled[1, 0, 0] = broken
        for nothing in learnt(spoiled):
            assert torch.allclose(nothing, torch.zeros(()), atol=1e-6)


def drifted(values: int, steps: list[int]) -> str:
    """The job of one rank: spread so many values at this rank's step; what it is told."""
    rank = dist.get_rank()
    try:
        Exchange(dist.group.WORLD, "cpu").spread(torch.ones(values), [values, values + rank], step=steps[rank])
    except (PeersDrifted, PeersDisagree) as error:
        return str(error)
    return ""


def test_peers_at_different_steps_are_told_before_weights_travel(pool: Pool) -> None:
    told = pool.run(2, drifted, 5, [50, 100])
    assert all("from step 50 to step 100" in message for message in told)
    told = pool.run(2, drifted, 5, [50, 50])
    assert all("want to exchange different things" in message for message in told)


@pytest.mark.parametrize("settings", [{"stale_steps": 5}, {"stale_steps": 2, "kd_burn_in_epochs": 1}])
def test_nobody_imitates_networks_that_nothing_is_known_of(
    pool: Pool, small: Callable[..., TrainConfig], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Before the first refresh, and in the burn-in, peers learn what they would learn alone."""
    alone = small(distiller="none")
    config = small(distiller="codistillation", kd_warmup_epochs=0, **settings)
    # Both begin in the second of two epochs.
    steps = batch_order(config, load_splits(config.dataset)).steps_per_epoch
    assert steps <= refreshes(config, steps)[0] < 2 * steps
    for name, one in (("alone", alone), ("stale", config)):
        pool.run(2, learn_together, one, tmp_path / name)
    for epoch in (1, 2):
        for peer in range(2):
            first, second = (
                read_peer(tmp_path / name / f"checkpoint-epoch{epoch:04d}", peer) for name in ("alone", "stale")
            )
            same = [torch.equal(value, second["network"][name]) for name, value in first["network"].items()]
            assert all(same) == (epoch == 1)
            assert ("told" in second) == (epoch == 2)


@pytest.mark.parametrize("settings", [{"stale_steps": 50}, {"stale_steps": 2, "kd_burn_in_epochs": 1.9}])
def test_peers_that_would_never_hear_of_each_other_are_refused(
    small: Callable[..., TrainConfig], settings: dict[str, Any]
) -> None:
    config = small(distiller="codistillation", kd_warmup_epochs=0, **settings)
    splits = load_splits(config.dataset)
    told = rf"--stale-steps {config.distillation.stale_steps}: in the \d+ steps .* never hear of each other"
    with pytest.raises(ConfigError, match=told):
        batch_order(config, splits)
    batch_order(with_settings(config, {"stale_steps": 1, "kd_burn_in_epochs": 0}), splits)


def test_it_composes_with_decoupled_divergence() -> None:
    logits, stale = torch.randn(ROWS, CLASSES), torch.randn(2, ROWS, CLASSES)
    heard = Exchange(None, "cpu").start({}, control=Control(step=0)).wait()
    own = Own(logits=logits, targets=targets_of(0), stale=stale)
    # alpha = beta = 1 weighs the other classes as if the target had no share: more than plain KL does.
    plain, decoupled = (
        build_distiller(
            DistillConfig(distiller="codistillation", divergence=divergence, dkd_beta=1.0)  # type: ignore[arg-type]
        ).loss(own, heard)
        for divergence in ("kl", "dkd")
    )
    assert decoupled > plain > 0


def test_the_burn_in_comes_before_the_ramp() -> None:
    config = DistillConfig(kd_burn_in_epochs=2.5, kd_warmup_epochs=4)
    assert [kd_ramp(config, now, 20) for now in (0, 2.4, 2.5, 3.5, 6.5, 19)] == [0, 0, 0, 0.25, 1, 1]
    at_once = DistillConfig(kd_burn_in_epochs=2.5, kd_warmup_epochs=0)
    assert [kd_ramp(at_once, now, 20) for now in (0, 2.4, 2.5)] == [0, 0, 1]
    with pytest.raises(ConfigError, match="--kd-burn-in-epochs"):
        DistillConfig(kd_burn_in_epochs=-1)
    with pytest.raises(ConfigError, match="--kd-burn-in-epochs"):
        DistillConfig(kd_burn_in_epochs=math.inf)
    with pytest.raises(ConfigError, match="--stale-steps"):
        DistillConfig(stale_steps=0)


@pytest.mark.parametrize("mixer", ["none", "metamixer"])
def test_disjoint_parts_hold_as_many_of_each_class(small: Callable[..., TrainConfig], mixer: str) -> None:
    peers = ["tests.spine.networks:tiny"] * 3
    config = small(peers=peers, **DISJOINT, mixer=mixer, train_limit=100)
    splits = load_splits(config.dataset)
    parts = [part_of(config, splits, peer) for peer in range(3)]
    counts = torch.bincount(splits.train.labels) // 3
    for part in parts:
        assert torch.equal(torch.bincount(part.train.labels), counts)
        assert part.test is splits.test
    hashes = [{digest(image) for image in part.train.take(torch.arange(len(part.train)))} for part in parts]
    assert all(len(own) == int(counts.sum()) for own in hashes)
    assert len(set.union(*hashes)) == 3 * int(counts.sum())
    orders = [batch_order(config, part) for part in parts]
    for epoch in range(3):
        sizes = [[len(batch) for batch in order.epoch(epoch)] for order in orders]
        assert sizes[0] == sizes[1] == sizes[2]
    assert epoch_of(config, images=None, classes=None).rows == tuple(sizes[0])
    assert f"each peer learns from {int(counts.sum())} of its own" in parts[1].description


def test_peers_of_disjoint_data_see_none_of_each_others_images(
    pool: Pool, small: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = small(**DISJOINT, mixer="none", augment="none", kd_warmup_epochs=0, batch_size=1 << 10)
    one, other = pool.run(2, learn_together, config, tmp_path)
    assert one.ended == other.ended == "finished"
    assert one.epochs[-1]["train"]["kd"] > 0
    # One batch an epoch, and of the same classes: only the images differ.
    assert len(one.images) == len(other.images) == config.epochs
    assert not set(one.images) & set(other.images)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"distiller": "dml", "statistics": "none"}, "--distiller dml compares"),
        ({"distiller": "codistillation"}, "--statistics none"),
    ],
)
def test_what_compares_the_same_images_is_refused_on_disjoint_data(
    small: Callable[..., TrainConfig], settings: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError, match=f"--disjoint-data: .*{told}"):
        small(disjoint_data=True, **settings)


def test_a_class_too_small_for_the_peers_is_named(small: Callable[..., TrainConfig]) -> None:
    config = small(peers=["tests.spine.networks:tiny"] * 9, **DISJOINT)
    with pytest.raises(ConfigError, match=r"--disjoint-data: class \d has \d training images for 9 peers"):
        part_of(config, load_splits(config.dataset), 0)
    # The same where images are only counted.
    counted = from_settings({"peers": ["resnet8"] * 9, "image_size": 8, **DISJOINT})
    with pytest.raises(ConfigError, match=r"--disjoint-data: 80 training images of 10 classes .* of 9 peers"):
        epoch_of(counted, images=80, classes=10)
