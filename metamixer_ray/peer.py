"""One peer network and all that it learns with, made from the configuration and its images alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metamixer_ray.config import TrainConfig
from metamixer_ray.data import BatchOrder, Splits
from metamixer_ray.distill import EXCHANGE_DTYPES, Distiller, Exchange, StaleCopies, learnt_by, takes_copies
from metamixer_ray.mesh import PeerMesh
from metamixer_ray.mixing import Mixer, build_mixer
from metamixer_ray.networks import StagedNetwork, common_stages
from metamixer_ray.optimisation import build_optimizer
from metamixer_ray.precision import Arithmetic, resolve_precision
from metamixer_ray.preparation import batch_order, build_peers, peer_distiller
from metamixer_ray.stepping import Stepper, running_statistics


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One peer network and all that it learns with; ``network`` is the trained module, ``forward`` how it is run."""

    config: TrainConfig
    mesh: PeerMesh
    device: torch.device
    precision: Arithmetic
    splits: Splits
    order: BatchOrder
    network: StagedNetwork
    forward: nn.Module
    buffers: Sequence[Tensor]
    """The network's buffers, listed once: to find them takes milliseconds."""
    running: Sequence[Tensor]
    """Those of them that are running means and variances."""
    optimizer: torch.optim.Optimizer
    stepper: Stepper
    """Takes its steps."""
    mixer: Mixer
    distiller: Distiller
    learnt: nn.Module | None
    """What the distiller learns itself; no part of the network that is evaluated and exported."""
    stale: StaleCopies | None
    """Copies of the other peers' networks, for distillers that ask those."""
    exchange: Exchange
    silence: Exchange
    """What steps without an exchange use in its place: nobody is told anything, and nobody heard."""
    stages_to_mix: int
    """Stages that all peers have, and global mixing may pick from."""
    stages_to_compare: Sequence[int]
    """This peer's stages (from 1) whose statistics are compared with the others'."""


def set_up(config: TrainConfig, mesh: PeerMesh, device: torch.device, splits: Splits) -> Peer:
    """Everything a rank needs, made from the configuration and its images alone."""
    networks = build_peers(config, classes=len(splits.classes), image_size=splits.train.image_size)
    stage_counts = [len(network.stage_names) for network in networks]
    network = networks[mesh.peer].to(device)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    distiller = peer_distiller(config, network, mesh.peer, image_size=splits.train.image_size)
    learnt = learnt_by(distiller)
    modules = [network] if learnt is None else [network, learnt.to(device)]
    stale = StaleCopies(networks, mesh.peer, device) if takes_copies(config.distillation) else None
    forward: nn.Module = network.compiled() if config.compile else network
    if mesh.replica_group is not None:
        # DDP regroups its buckets after the first step, also of a resumed run, and with them the order in which
        # three replicas or more are summed. It leaves them as they are where parameters might be unused.
        exact = device.type == "cpu"
        forward = DistributedDataParallel(forward, process_group=mesh.replica_group, find_unused_parameters=exact)
    precision = resolve_precision(config.precision, device)
    optimizer = build_optimizer(config.optimisation, mesh.peer, *modules)
    return Peer(
        config=config,
        mesh=mesh,
        device=device,
        precision=precision,
        splits=splits,
        order=batch_order(config, splits),
        network=network,
        forward=forward,
        buffers=list(network.buffers()),
        running=running_statistics(network),
        optimizer=optimizer,
        stepper=Stepper(optimizer, precision, device),
        mixer=build_mixer(config.mixing),
        distiller=distiller,
        learnt=learnt,
        stale=stale,
        exchange=Exchange(mesh.peer_group, device, EXCHANGE_DTYPES[config.distillation.exchange_dtype]),
        silence=Exchange(None, device),
        stages_to_mix=min(stage_counts),
        stages_to_compare=common_stages(stage_counts)[mesh.peer],
    )
