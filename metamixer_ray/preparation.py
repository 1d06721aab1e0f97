"""What a training is made of before its first step: the peers' networks and the order of the batches."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from metamixer_ray.config import TrainConfig
from metamixer_ray.data import BatchOrder, Splits, wants_quadruples
from metamixer_ray.distill import (
    Distiller,
    Layout,
    build_distiller,
    kd_ramp,
    takes_copies,
    takes_embedding,
    tells_weights,
)
from metamixer_ray.errors import ConfigError
from metamixer_ray.mixing import build_mixer, resolve_stages
from metamixer_ray.networks import StagedNetwork, build_network, common_stages, embedding_width
from metamixer_ray.randomness import numpy_generator, torch_seed

# How the statistics read a stage's output, by what the network says its axes are.
READ_AS: dict[str, Layout] = {
    "BCHW": "channels-first",
    "BHWC": "channels-last",
    "BNC": "tokens",
    "BC": "auto",
}


def build_peers(config: TrainConfig, *, classes: int, image_size: int) -> list[StagedNetwork]:
    """All peers' networks with their initial weights, each a pure function of (seed, peer).

    Every rank builds all of them, so that all agree on the stages they have in common; only one is kept.

    Raises:
        ConfigError: an unknown network, one that can't take these images, or ``--mix-stages`` that the networks
            don't have; feature statistics of a stage that has none.
    """
    networks = []
    for peer, name in enumerate(config.peers):
        torch.manual_seed(torch_seed(config.seed, "initial weights", peer))
        networks.append(build_network(name, classes=classes, image_size=image_size, config=config.networks))
    counts = [len(network.stage_names) for network in networks]
    resolve_stages(config.mixing, min(counts))
    if config.distillation.statistics != "none" and len(networks) > 1:
        for name, network, stages in zip(config.peers, networks, common_stages(counts), strict=True):
            _check_statistics(name, network, stages)
    return networks


def peer_distiller(config: TrainConfig, network: StagedNetwork, peer: int, *, image_size: int) -> Distiller:
    """The distiller of a peer with this network; what it learns starts as a pure function of (seed, peer)."""
    if not takes_embedding(config.distillation):
        return build_distiller(config.distillation, peers=len(config.peers))
    torch.manual_seed(torch_seed(config.seed, "distiller", peer))
    width = embedding_width(network, image_size=image_size)
    return build_distiller(config.distillation, width=width, leads=peer + 1 == len(config.peers))


def _check_statistics(name: str, network: StagedNetwork, stages: Sequence[int]) -> None:
    for stage in stages:
        if network.layouts[stage - 1] == "BC":
            raise ConfigError(
                f"--statistics: stage {network.stage_names[stage - 1]!r} of {name} gives vectors, which have no places "
                "to compare; name other stages with --stage-names, or use --statistics none"
            )


def part_of(config: TrainConfig, splits: Splits, peer: int) -> Splits:
    """What ``peer`` learns from: all, or with ``--disjoint-data`` its own part of each class, a pure function of
    ``--split-seed``.

    Raises:
        ConfigError: a class that has fewer images than there are peers.
    """
    if not config.distillation.disjoint_data:
        return splits
    labels, peers = splits.train.labels.numpy(), len(config.peers)
    rng = numpy_generator(config.dataset.split_seed, "disjoint data")
    chosen = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = len(rows) // peers
        if count == 0:
            raise ConfigError(
                f"--disjoint-data: class {splits.classes[label]} has {len(rows)} training images for {peers} peers; "
                "give a larger --train-limit or a smaller --validation-fraction, or train fewer peers"
            )
        chosen.append(rows[peer * count : (peer + 1) * count])
    own = np.sort(np.concatenate(chosen))
    return replace(
        splits,
        train=splits.train.select(torch.from_numpy(own)),
        description=f"{splits.description}; each peer learns from {len(own)} of its own",
    )


def batch_order(config: TrainConfig, splits: Splits) -> BatchOrder:
    """The batches of the training set: quadruples when the mixer is organised, unless ``--sampler`` says otherwise.

    Raises:
        ConfigError: a batch size that doesn't divide into quadruples and replicas, a set of one class, or too few
            steps for peers that tell each other their weights.
    """
    order = BatchOrder(
        splits.train.labels,
        batch_size=config.batch_size,
        replicas=config.placement.replicas,
        quadruples=wants_quadruples(config.dataset, organised=build_mixer(config.mixing).organised),
        seed=config.seed,
        layout=splits.train.layout,
    )
    asks = takes_copies(config.distillation) and config.distillation.kd_weight > 0
    if asks and not refreshes(config, order.steps_per_epoch):
        raise ConfigError(
            f"--stale-steps {config.distillation.stale_steps}: in the {config.epochs * order.steps_per_epoch} steps of "
            "this training peers would never hear of each other; give fewer, or end the burn-in earlier"
        )
    return order


def refreshes(config: TrainConfig, steps_per_epoch: int) -> list[int]:
    """The steps of the whole training (from 0) at which codistillation's peers tell each other their weights."""
    options = config.distillation

    def weight(step: int) -> float:
        return options.kd_weight * kd_ramp(options, step / steps_per_epoch, config.epochs)

    steps = range(0, config.epochs * steps_per_epoch, options.stale_steps)
    return [step for step in steps if tells_weights(options, step, weight(step))]
