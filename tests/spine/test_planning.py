"""The arithmetic of plans: what rings cost, who shares a link, and what follows for a training."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metamixer_ray.config import TrainConfig, from_settings
from metamixer_ray.errors import ConfigError
from metamixer_ray.networks import NetworkConfig, build_network
from metamixer_ray.optimisation import OptimisationConfig, build_optimizer
from metamixer_ray.planning import (
    Cluster,
    Epoch,
    Estimate,
    Link,
    NetworkCosts,
    all_gather_seconds,
    all_reduce_seconds,
    all_reduce_sent,
    epoch_of,
    estimate,
    fit_link,
    kinds,
    largest_slowdown,
    messages,
    peer_rings,
    probe_network,
    replica_rings,
    ring_link,
)
from metamixer_ray.planning.estimate import exposed_seconds
from metamixer_ray.planning.network_probe import saved_for_backward, training_flops
from metamixer_ray.planning.table import as_table

INSIDE, BETWEEN = Link(bandwidth=1e11, latency=1e-6), Link(bandwidth=1e9, latency=1e-4)
COSTS = NetworkCosts(
    parameters=1_000_000,
    parameter_bytes=4_000_000,
    gradient_bytes=4_000_000,
    buffer_bytes=1_000,
    told_bytes=4_000_900,
    optimizer_bytes=4_000_000,
    saved_bytes=0,
    saved_bytes_per_row=1e6,
    largest_bytes_per_row=1e5,
    training_flops_per_row=1e8,
    timed_rows=10,
    step_seconds=0.1,
    backward_seconds=0.06,
    evaluation_seconds=0.02,
)
EPOCH = Epoch(data="some", classes=10, size=8, rows=(32, 32, 28), evaluated=320, tested=0)

quickly = settings(deadline=None, max_examples=50)
members = st.integers(2, 10_000)
sizes = st.integers(1, 10**9)
positive = st.floats(1e-6, 1e6)


def planned(cluster: Cluster | None = None, speed: float = 100.0, **changes: Any) -> Estimate:
    config = from_settings({"peers": ["resnet8", "resnet8"], **changes})
    said = messages(config, rows=EPOCH.rows, classes=EPOCH.classes, stages=3)
    cluster = cluster or Cluster(workers_per_node=1, inside=INSIDE, between=BETWEEN)
    costs = [COSTS] * len(kinds(config))
    return estimate(config, EPOCH, said, costs, cluster, throughput=[speed] * len(costs))


@quickly
@given(members, sizes)
def test_a_ring_sends_less_than_twice_the_size_and_nearly_that_with_many(count: int, size: int) -> None:
    sent = all_reduce_sent(count, size)
    assert size <= sent < 2 * size
    assert sent < all_reduce_sent(count + 1, size)
    assert 2 * size - sent == pytest.approx(2 * size / count, rel=1e-6)


@quickly
@given(members, sizes, st.floats(1, 1000))
def test_times_grow_as_the_link_slows(count: int, size: int, factor: float) -> None:
    for seconds in (all_reduce_seconds, all_gather_seconds):
        assert seconds(count, size, BETWEEN.slower(factor)) == pytest.approx(factor * seconds(count, size, BETWEEN))
    assert all_reduce_seconds(1, size, BETWEEN) == all_gather_seconds(1, size, BETWEEN) == 0


@quickly
@given(st.integers(2, 200), st.sampled_from(["attention", "similarity", "none"]), st.integers(1, 5))
def test_what_a_worker_says_does_not_grow_with_the_peers(peers: int, statistics: str, every: int) -> None:
    def said(count: int) -> float:
        config = from_settings({"peers": ["resnet8"] * count, "statistics": statistics, "exchange_every": every})
        return messages(config, rows=EPOCH.rows, classes=10, stages=3).mean_bytes

    assert said(peers) == said(2) > 0


def test_what_a_worker_says_is_as_designed() -> None:
    config = from_settings({"statistics": "attention", "statistics_weight": 1.0, "statistics_grid": 4})
    plain = from_settings({"statistics": "none"})
    for rows, classes in ((128, 10), (128, 100), (32, 1000)):
        with_maps, without = (messages(c, rows=[rows], classes=classes, stages=3).mean_bytes for c in (config, plain))
        assert with_maps - without == 4 * rows * 3 * 4 * 4
        control = without - 4 * (rows * classes + rows)
        assert 0 < control < 100
    halved = messages(from_settings({"statistics": "none", "exchange_dtype": "bf16"}), rows=[32], classes=9, stages=1)
    whole = messages(plain, rows=[32], classes=9, stages=1)
    assert 2 * halved.mean_bytes == whole.mean_bytes


@quickly
@given(positive, positive, st.floats(0.001, 0.9))
def test_at_the_largest_slowdown_the_exchange_has_its_share(compute: float, exchange: float, share: float) -> None:
    slowed = exchange * largest_slowdown(compute, exchange, share)
    assert slowed == pytest.approx(share * (compute + slowed))


def test_without_an_exchange_any_network_will_do() -> None:
    assert largest_slowdown(1.0, 0.0, 0.05) == float("inf")
    alone = planned(peers=["resnet8"], distiller="none")
    assert (alone.largest_slowdown, alone.exchange.bytes_per_step, alone.exchange_share) == (None, 0, 0)
    assert "nothing is exchanged" in as_table(alone, [])


def test_a_plan_on_a_network_so_much_slower_has_five_percent_exchange() -> None:
    plan = planned()
    assert plan.largest_slowdown is not None
    slow = Cluster(workers_per_node=1, inside=INSIDE, between=BETWEEN.slower(plan.largest_slowdown))
    assert planned(slow).exchange_share == pytest.approx(0.05)
    assert planned(slow).largest_slowdown == pytest.approx(1)


@quickly
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 80))
def test_rings_inside_a_node_use_its_inside_and_others_share_its_network(
    peers: int, replicas: int, per_node: int
) -> None:
    cluster = Cluster(workers_per_node=per_node, inside=INSIDE, between=BETWEEN)
    for rings, length in ((peer_rings(peers, replicas), peers), (replica_rings(peers, replicas), replicas)):
        assert sorted(rank for ring in rings for rank in ring) == list(range(peers * replicas))
        assert {len(ring) for ring in rings} == {length}
        link = ring_link(rings, cluster)
        if peers * replicas <= per_node or length == 1:
            assert link == INSIDE
        elif link != INSIDE:
            shared_by = round(BETWEEN.bandwidth / link.bandwidth)
            assert 1 <= shared_by <= per_node
            assert link.latency == BETWEEN.latency
        if per_node == 1 and length > 1:
            assert link == BETWEEN


def test_replicas_on_one_node_leave_the_network_to_the_exchange() -> None:
    cluster = Cluster(workers_per_node=4, inside=INSIDE, between=BETWEEN)
    assert ring_link(replica_rings(4, 2), cluster) == INSIDE
    # Two replica indices, so two rings leave each node.
    assert ring_link(peer_rings(4, 2), cluster).bandwidth == BETWEEN.bandwidth / 2


@quickly
@given(members, st.floats(1e-7, 1e-2), st.floats(1e6, 1e12))
def test_a_link_is_found_again_from_the_times_of_its_rings(count: int, latency: float, bandwidth: float) -> None:
    # A part that no message shows can't be found.
    assume(1e-4 < latency * bandwidth * count / 1e6 < 1e4)
    link = Link(bandwidth=bandwidth, latency=latency)
    times = {size: all_reduce_seconds(count, size, link) for size in (64, 10**4, 10**6, 10**7)}
    found = fit_link(times, members=count)
    assert found.latency == pytest.approx(latency, rel=1e-3)
    assert found.bandwidth == pytest.approx(bandwidth, rel=1e-3)


@quickly
@given(st.lists(st.floats(1e-6, 1), min_size=3, max_size=3))
def test_noisy_times_still_give_a_link(times: list[float]) -> None:
    found = fit_link(dict(zip((64, 10**5, 10**7), times, strict=True)), members=2)
    assert 0 < found.latency < float("inf")
    assert 0 < found.bandwidth < float("inf")


@quickly
@given(st.floats(0, 10), st.floats(0, 10), st.integers(0, 10**10))
def test_a_backward_pass_hides_no_more_than_it_can(gradients: float, backward: float, size: int) -> None:
    exposed = exposed_seconds(gradients, backward, size)
    assert max(0.0, gradients - backward) <= exposed <= gradients + 1e-9
    if 0 < size <= 25 * 2**20:
        assert exposed == gradients


def test_a_training_is_its_steps_and_evaluations() -> None:
    plan = planned(epochs=10, evaluate_every=4)
    compute = 32 / 100.0
    assert plan.step_seconds == pytest.approx(compute + plan.exchange.seconds_per_step)
    assert plan.epoch_seconds == pytest.approx(3 * plan.step_seconds)
    # Evaluated after epochs 4, 8 and 10; a forward pass takes a fifth of a step.
    evaluations = 3 * (320 / 32) * compute / 5
    assert plan.training_seconds == pytest.approx(10 * plan.epoch_seconds + evaluations)
    assert plan.worker_hours == pytest.approx(2 * plan.training_seconds / 3600)
    both = planned(epochs=10, evaluate_every=4, baseline=True)
    alone = 10 * 3 * compute + evaluations
    assert both.training_seconds == pytest.approx(plan.training_seconds + alone)
    # The baseline is without whatever a method needs beside.
    for method in ({"distiller": "codistillation", "stale_steps": 5}, {"distiller": "kdcl-general"}):
        one, two = (planned(epochs=10, evaluate_every=4, baseline=baseline, **method) for baseline in (False, True))
        assert two.training_seconds == pytest.approx(one.training_seconds + alone)
        assert one.training_seconds > plan.training_seconds


def test_the_slowest_network_sets_the_pace() -> None:
    config = from_settings({"peers": ["resnet8", "resnet14", "resnet8"]})
    said = messages(config, rows=EPOCH.rows, classes=10, stages=3)
    cluster = Cluster(workers_per_node=1, inside=INSIDE, between=BETWEEN)
    plan = estimate(config, EPOCH, said, [COSTS, COSTS], cluster, throughput=[200.0, 50.0])
    assert [(n.name, n.peers) for n in plan.networks] == [("resnet8", 2), ("resnet14", 1)]
    assert plan.step_seconds - plan.exchange.seconds_per_step == pytest.approx(32 / 50)


def test_replicas_cost_gradients_and_leave_the_exchange_alone() -> None:
    one, four = planned(), planned(replicas=4, batch_size=128)
    assert [n.gradient_bytes for n in one.networks] == [0]
    assert [n.gradient_seconds for n in one.networks] == [0]
    (network,) = four.networks
    least = all_reduce_seconds(4, COSTS.gradient_bytes, BETWEEN)
    assert least < network.gradient_seconds == pytest.approx(network.exposed_gradient_seconds)
    assert four.exchange == one.exchange
    assert four.workers == 8
    assert network.memory.total - one.networks[0].memory.total == COSTS.gradient_bytes


def test_peers_with_other_optimizers_are_another_kind() -> None:
    config = from_settings({"peers": ["resnet8"] * 3, "optimizer": ["sgd", "adamw", "sgd"]})
    assert [(k.optimizer, k.first, k.peers) for k in kinds(config)] == [("sgd", 0, 2), ("adamw", 1, 1)]


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 1), ("adamw", 2)])
def test_a_probe_counts_what_there_is(optimizer: str, states: int) -> None:
    network = build_network("resnet8", classes=7, image_size=8, config=NetworkConfig())
    weights = sum(p.numel() for p in network.parameters())
    options = OptimisationConfig(optimizer=(optimizer,))  # type: ignore[arg-type]
    costs = probe_network(
        network,
        build_optimizer(options, 0, network),
        rows=4,
        classes=7,
        image_size=8,
        device=torch.device("cpu"),
        precision="float32",
    )
    assert (costs.parameters, costs.parameter_bytes, costs.gradient_bytes) == (weights, 4 * weights, 4 * weights)
    # adamw also keeps its step's number per tensor.
    assert states * 4 * weights <= costs.optimizer_bytes <= states * 4 * weights + 1000
    assert costs.timed_rows == 4
    assert 0 < costs.backward_seconds < costs.step_seconds
    # What two small batches keep foretells a larger one.
    network.train()
    images = torch.rand(12, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    kept, largest = saved_for_backward(network, images, "float32")
    assert costs.saved_bytes + 12 * costs.saved_bytes_per_row == pytest.approx(kept, rel=0.01)
    # Maps of 16 channels at full resolution.
    assert largest == 12 * costs.largest_bytes_per_row == 12 * 16 * 8 * 8 * 4
    assert costs.training_flops_per_row == 3 * 2 * macs_per_image(network, 8)


def macs_per_image(network: torch.nn.Module, size: int) -> int:
    """Multiplications of a forward pass, counted by what convolutions and linear layers are defined as."""
    counts: list[int] = []

    def count(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        # An output value of a layer takes one multiplication for each weight that it is made with.
        counts.append(output[0].numel() * module.weight[0].numel())  # type: ignore[operator,index]

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    network(torch.zeros(2, 3, size, size, device=next(network.parameters()).device))
    return sum(counts)


@pytest.mark.parametrize("name", ["resnet14", "densenet40-12-okd", "mobilenetv2"])
def test_operations_are_those_of_the_layers(name: str) -> None:
    network = build_network(name, classes=10, image_size=16, config=NetworkConfig()).to("meta")
    operations = training_flops(network, torch.zeros(3, 3, 16, 16, device="meta"))
    # Two for a multiplication with its addition; forward, and backward for inputs and weights.
    assert operations == 3 * 2 * 3 * macs_per_image(network, 16)


@pytest.mark.gpu
def test_a_probe_measures_a_gpu() -> None:
    device = torch.device("cuda")
    network = build_network("resnet8", classes=7, image_size=32, config=NetworkConfig()).to(device)
    optimizer = build_optimizer(OptimisationConfig(), 0, network)
    costs = probe_network(
        network, optimizer, rows=64, classes=7, image_size=32, device=device, precision="float32", compiled=True
    )
    assert costs.timed_rows == 64
    assert 0 < costs.backward_seconds < costs.step_seconds


def test_an_epoch_of_data_that_is_not_here() -> None:
    config = from_settings({"batch_size": 256, "replicas": 4, "image_size": 224})
    epoch = epoch_of(config, images=10_000, classes=100)
    assert (len(epoch.rows), epoch.classes, epoch.size) == (40, 100, 224)
    assert max(epoch.rows) == 64
    assert sum(epoch.rows) * 4 == 10_000
    named = from_settings({"data": "cifar100", "validation_fraction": 0.1, "train_limit": 2_000})
    epoch = epoch_of(named, images=None, classes=None)
    assert (sum(epoch.rows), epoch.evaluated, epoch.tested, epoch.size) == (2_000, 5_000, 10_000, 32)


@pytest.mark.parametrize(
    ("changes", "images", "classes", "told"),
    [
        ({}, 100, None, "--classes"),
        ({}, 100, 10, "--image-size"),
        ({"image_size": 32}, 100, 1, "--classes 1"),
        ({"image_size": 32}, 5, 4, "--images 5"),
        ({"data": "cifar10", "train_limit": 60_000}, None, None, "--train-limit 60000"),
        ({"data": "cifar10", "validation_fraction": 0.9999}, None, None, "--validation-fraction"),
        ({"data": "cifar10", "batch_size": 30}, None, None, "--batch-size 30"),
    ],
)
def test_an_epoch_that_cannot_be_is_refused(
    changes: dict[str, Any], images: int | None, classes: int | None, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        epoch_of(from_settings(changes), images=images, classes=classes)


def test_memory_follows_the_batch() -> None:
    epochs = [replace(EPOCH, rows=(rows,)) for rows in (16, 32)]
    config = TrainConfig()
    cluster = Cluster(workers_per_node=1, inside=INSIDE, between=BETWEEN)
    small, large = (
        estimate(
            config,
            epoch,
            messages(config, rows=epoch.rows, classes=10, stages=3),
            [COSTS, COSTS],
            cluster,
            throughput=[100.0, 100.0],
        )
        .networks[0]
        .memory
        for epoch in epochs
    )
    assert large.in_flight == 2 * small.in_flight > 0
    assert large.activations == 2 * small.activations == 32 * COSTS.saved_bytes_per_row
    assert (large.weights, large.optimizer) == (small.weights, small.optimizer)
    assert large.total > small.total


def test_copies_of_other_networks_are_paid_for() -> None:
    plain = planned(peers=["resnet8", "resnet8", "resnet14"], distiller="none", epochs=7)
    stale = planned(peers=["resnet8", "resnet8", "resnet14"], distiller="codistillation", epochs=7, stale_steps=10)
    # 7 epochs of 3 steps: weights are told at steps 10 and 20, to two other peers.
    assert stale.exchange.bytes_per_step - plain.exchange.bytes_per_step == pytest.approx(2 * 2 * 4_000_900 / 21)
    for one, other in zip(plain.networks, stale.networks, strict=True):
        # Asked from the first time on.
        looking = 11 / 21 * 2 * one.evaluation_seconds
        assert other.compute_seconds == pytest.approx(one.compute_seconds + looking)
        assert other.memory.weights == one.memory.weights + 2 * 4_001_000 + 4_000_900
