"""From what was measured to what a training will take: pure functions of costs, links and sizes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from metamixer_ray.config import TrainConfig
from metamixer_ray.distill import needs_validation, takes_copies
from metamixer_ray.optimisation import for_peer
from metamixer_ray.planning.collectives import (
    Cluster,
    Link,
    all_gather_seconds,
    all_gather_sent,
    all_reduce_seconds,
    all_reduce_sent,
    largest_slowdown,
    peer_rings,
    replica_rings,
    ring_link,
)
from metamixer_ray.planning.images import Epoch
from metamixer_ray.planning.messages import Messages
from metamixer_ray.planning.network_probe import NetworkCosts
from metamixer_ray.preparation import refreshes

MOST_SHARE = 0.05
"""The share of a step that the exchange should stay under."""
# In units of the largest activation, since one block of a network is worked on at a time. Seen on CPUs: 4 to 7.
IN_FLIGHT = 5
# DistributedDataParallel reduces gradients in buckets of this size while the backward pass goes on.
_BUCKET_BYTES = 25 * 2**20
# What share_flags reduces: four int64.
_FLAGS_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Peers that cost the same: one network, one optimizer."""

    name: str
    optimizer: str
    first: int
    """The first such peer."""
    peers: int
    """How many there are."""


def kinds(config: TrainConfig) -> list[Kind]:
    """The kinds of peers of this training, in the order in which they first appear."""
    optimizers = config.optimisation.optimizer
    each = [(name, str(for_peer(optimizers, peer))) for peer, name in enumerate(config.peers)]
    return [
        Kind(name=kind[0], optimizer=kind[1], first=each.index(kind), peers=each.count(kind))
        for kind in dict.fromkeys(each)
    ]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one worker at the largest batch."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Gradients, and with replicas the buckets they are reduced in."""
    optimizer: int
    """State of the optimizer."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    in_flight: int
    """What the backward pass holds at a time, such as gradients of activations."""
    batch: int
    """Images (as they come, normalised, mixed) and the exchange's buffers."""

    @property
    def total(self) -> int:
        """All of it."""
        kept = self.weights + self.gradients + self.optimizer + self.activations
        return kept + self.in_flight + self.batch


@dataclass(frozen=True, kw_only=True)
class NetworkEstimate:
    """One of the networks, as one of its workers sees it."""

    name: str
    optimizer: str
    peers: int
    """How many peers are this network with this optimizer."""
    parameters: int
    compute_seconds: float
    """Forward, loss, backward and optimizer of a step, and the forward passes of copies of other peers' networks."""
    evaluation_seconds: float
    """Forward pass of as many images."""
    training_flops: float
    """Floating-point operations of training one image: forward and backward pass."""
    images_per_second: float
    """Of one worker that does nothing else."""
    gradient_seconds: float
    """Time of what its replicas tell each other per step; 0 without replicas."""
    exposed_gradient_seconds: float
    """The part of it that the backward pass doesn't hide."""
    gradient_bytes: int
    """What its workers hand over per step for their replicas."""
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class ExchangeEstimate:
    """The exchange, as one worker sees it; per step, the mean over an epoch."""

    bytes_per_step: float
    """Bytes handed to the collective, as a training's metrics count them."""
    largest_bytes: int
    """Of the largest message: a whole batch with its feature statistics."""
    sent_bytes_per_step: float
    """Bytes that the worker puts on the wire."""
    seconds_per_step: float
    latency_seconds_per_step: float
    """The part of it that doesn't depend on the bytes."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training takes."""

    peers: int
    replicas: int
    workers: int
    nodes: int
    data: str
    batch_size: int
    rows: int
    """Images of the largest step that one worker sees."""
    steps_per_epoch: int
    epochs: int
    networks: tuple[NetworkEstimate, ...]
    exchange: ExchangeEstimate
    step_seconds: float
    """Of the slowest network, its exchange and what of its gradients isn't hidden: all peers wait for it."""
    exchange_share: float
    """Of a step."""
    largest_slowdown: float | None
    """How many times slower the network may get until the exchange takes 5 % of a step; None without one."""
    epoch_seconds: float
    """Without evaluation."""
    training_seconds: float
    """Of all epochs, with their evaluations (and with ``--baseline`` the training alone after it)."""
    worker_hours: float
    gpu_hours: float | None
    """None where the time isn't that of a GPU."""


def estimate(
    config: TrainConfig,
    epoch: Epoch,
    said: Messages,
    costs: Sequence[NetworkCosts],
    cluster: Cluster,
    *,
    throughput: Sequence[float],
    gpus_per_worker: float = 0.0,
) -> Estimate:
    """What the training of ``config`` takes.

    Args:
        costs: of each of ``kinds(config)``.
        throughput: images per second of one worker, for each of them.
        gpus_per_worker: GPUs that a worker of this throughput has to itself.
    """
    peers, replicas = len(config.peers), config.placement.replicas
    between_replicas = ring_link(replica_rings(peers, replicas), cluster)
    alone = networks = tuple(
        network_estimate(
            kind,
            cost,
            epoch,
            said,
            peers=peers,
            replicas=replicas,
            link=between_replicas,
            images_per_second=speed,
        )
        for kind, cost, speed in zip(kinds(config), costs, throughput, strict=True)
    )
    told_per_step = 0.0
    if takes_copies(config.distillation):
        all_steps, told = config.epochs * len(epoch.rows), refreshes(config, len(epoch.rows))
        told_per_step = len(told) / all_steps
        networks = with_copies(networks, costs, asked=1 - told[0] / all_steps if told else 0.0)
    exchange = exchange_estimate(
        said,
        peers,
        ring_link(peer_rings(peers, replicas), cluster),
        spread_bytes=told_per_step * max(cost.told_bytes for cost in costs),
        spreads_per_step=told_per_step,
    )
    slowest = max(networks, key=_step_alone)
    slowdown = largest_slowdown(slowest.compute_seconds, exchange.seconds_per_step, MOST_SHARE)
    step_seconds = _step_alone(slowest) + exchange.seconds_per_step
    steps, rows = len(epoch.rows), max(epoch.rows)

    def training(step_seconds: float, evaluate_every: int) -> float:
        evaluations = math.ceil(config.epochs / evaluate_every)
        evaluated = (evaluations * epoch.evaluated + epoch.tested) / (replicas * rows)
        evaluation_seconds = evaluated * max(network.evaluation_seconds for network in networks)
        return config.epochs * steps * step_seconds + evaluation_seconds

    training_seconds = training(step_seconds, 1 if needs_validation(config.distillation) else config.evaluate_every)
    if config.baseline:
        training_seconds += training(max(map(_step_alone, alone)), config.evaluate_every)
    worker_hours = config.workers * training_seconds / 3600
    return Estimate(
        peers=peers,
        replicas=replicas,
        workers=config.workers,
        nodes=math.ceil(config.workers / cluster.workers_per_node),
        data=epoch.data,
        batch_size=config.batch_size,
        rows=rows,
        steps_per_epoch=steps,
        epochs=config.epochs,
        networks=networks,
        exchange=exchange,
        step_seconds=step_seconds,
        exchange_share=exchange.seconds_per_step / step_seconds,
        largest_slowdown=slowdown if math.isfinite(slowdown) else None,
        epoch_seconds=steps * step_seconds,
        training_seconds=training_seconds,
        worker_hours=worker_hours,
        gpu_hours=gpus_per_worker * worker_hours if gpus_per_worker else None,
    )


def _step_alone(network: NetworkEstimate) -> float:
    return network.compute_seconds + network.exposed_gradient_seconds


def with_copies(
    networks: Sequence[NetworkEstimate], costs: Sequence[NetworkCosts], *, asked: float
) -> tuple[NetworkEstimate, ...]:
    """The same where every peer has a copy of each other one's network and asks it at this share of the steps."""
    looking = sum(network.peers * network.evaluation_seconds for network in networks)
    sizes = [cost.parameter_bytes + cost.buffer_bytes for cost in costs]
    held = sum(network.peers * size for network, size in zip(networks, sizes, strict=True))
    return tuple(
        replace(
            network,
            compute_seconds=network.compute_seconds + asked * (looking - network.evaluation_seconds),
            # What the others have of this peer is kept too, in place of a copy of it.
            memory=replace(network.memory, weights=network.memory.weights + held - size + cost.told_bytes),
        )
        for network, size, cost in zip(networks, sizes, costs, strict=True)
    )


def exchange_estimate(
    said: Messages, peers: int, link: Link, *, spread_bytes: float = 0.0, spreads_per_step: float = 0.0
) -> ExchangeEstimate:
    """What the exchange of ``peers`` costs on ``link``.

    Args:
        spread_bytes: per step, what a worker tells each other one beside its messages.
        spreads_per_step: how often per step it does.
    """
    # What is said with reduce 'lowest' is in a collective beside that of control and statistics.
    exchanges = said.exchanges_per_step * (2 if said.reduce == "lowest" else 1)
    if peers < 2:
        sent = seconds = latency = 0.0
    elif said.reduce != "each":
        sent = all_reduce_sent(peers, said.mean_bytes)
        latency = exchanges * all_reduce_seconds(peers, 0, link)
        seconds = latency + sent / link.bandwidth
    else:
        sent = all_gather_sent(peers, said.mean_bytes)
        latency = exchanges * all_gather_seconds(peers, 0, link)
        seconds = latency + sent / link.bandwidth
    # As Exchange counts: what a worker hands over is sent once, but to each of the others where each is heard.
    copies = peers - 1 if said.reduce == "each" else 1
    if peers > 1 and spread_bytes:
        sent += all_gather_sent(peers, spread_bytes)
        latency += spreads_per_step * all_gather_seconds(peers, 0, link)
        seconds = latency + sent / link.bandwidth
    return ExchangeEstimate(
        bytes_per_step=copies * said.mean_bytes + (peers - 1) * spread_bytes,
        largest_bytes=copies * said.largest_bytes,
        sent_bytes_per_step=sent,
        seconds_per_step=seconds,
        latency_seconds_per_step=latency,
    )


def network_estimate(
    kind: Kind,
    costs: NetworkCosts,
    epoch: Epoch,
    said: Messages,
    *,
    peers: int,
    replicas: int,
    link: Link,
    images_per_second: float,
) -> NetworkEstimate:
    """What one network takes of each of its workers.

    Args:
        peers: all of them, of whatever kind.
        link: between its replicas.
        images_per_second: of one worker; other than what was measured, it stands for another device, on which
            backward pass and evaluation change alike.
    """
    rows = max(epoch.rows)
    compute = rows / images_per_second
    scale = compute / costs.step_seconds
    gradients, buffers = gradient_seconds(costs.gradient_bytes, costs.buffer_bytes, replicas, link)
    return NetworkEstimate(
        name=kind.name,
        optimizer=kind.optimizer,
        peers=kind.peers,
        parameters=costs.parameters,
        compute_seconds=compute,
        evaluation_seconds=scale * costs.evaluation_seconds,
        training_flops=costs.training_flops_per_row,
        images_per_second=images_per_second,
        gradient_seconds=gradients + buffers,
        exposed_gradient_seconds=buffers
        + exposed_seconds(gradients, scale * costs.backward_seconds, costs.gradient_bytes),
        gradient_bytes=costs.gradient_bytes + costs.buffer_bytes if replicas > 1 else 0,
        memory=worker_memory(costs, said, rows=rows, image_size=epoch.size, peers=peers, replicas=replicas),
    )


def gradient_seconds(gradient_bytes: int, buffer_bytes: int, replicas: int, link: Link) -> tuple[float, float]:
    """Time of a step's messages between the replicas of a peer: gradients; and flags and buffers (BatchNorm's running
    statistics, which DistributedDataParallel sends along a tree before each forward pass)."""
    if replicas < 2:
        return 0.0, 0.0
    gradients = all_reduce_seconds(replicas, gradient_bytes, link)
    flags = all_reduce_seconds(replicas, _FLAGS_BYTES, link)
    levels = math.ceil(math.log2(replicas)) if buffer_bytes else 0
    return gradients, flags + levels * (link.latency + buffer_bytes / link.bandwidth)


def exposed_seconds(gradients: float, backward: float, gradient_bytes: int) -> float:
    """What of the gradients' time a step waits for.

    The backward pass hides all buckets but the last, which is complete only when the pass ends; and it hides no more
    than its own length.
    """
    last = min(1.0, _BUCKET_BYTES / gradient_bytes) if gradient_bytes else 0.0
    return gradients - (1 - last) * min(gradients, backward)


def worker_memory(
    costs: NetworkCosts, said: Messages, *, rows: int, image_size: int, peers: int, replicas: int
) -> Memory:
    """Bytes of a worker's tensors at their peak, the start of the backward pass."""
    pixels = 3 * rows * image_size**2
    copies = peers + 1 if said.reduce == "each" else 2
    return Memory(
        # Buffers are kept twice: a step that is skipped puts them back.
        weights=costs.parameter_bytes + 2 * costs.buffer_bytes,
        gradients=costs.gradient_bytes * (2 if replicas > 1 else 1),
        optimizer=costs.optimizer_bytes,
        activations=round(costs.saved_bytes + rows * costs.saved_bytes_per_row),
        in_flight=round(IN_FLIGHT * rows * costs.largest_bytes_per_row),
        batch=pixels * (1 + 2 * 4) + copies * said.largest_bytes,
    )
