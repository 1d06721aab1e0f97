"""What a training will take before it is started: bytes, seconds, memory, worker-hours.

``collectives`` and ``estimate`` are arithmetic; ``messages`` counts what peers tell each other by making the messages;
``images`` knows the batches of an epoch; ``network_probe`` and ``link_probe`` measure on this machine.
"""

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
from metamixer_ray.planning.estimate import Estimate, Kind, Memory, estimate, kinds
from metamixer_ray.planning.images import NAMED, Epoch, ImageCounts, epoch_of
from metamixer_ray.planning.link_probe import fit_link, measure_link
from metamixer_ray.planning.messages import Messages, message_floats, messages
from metamixer_ray.planning.network_probe import NetworkCosts, probe_network

__all__ = [
    "NAMED",
    "Cluster",
    "Epoch",
    "Estimate",
    "ImageCounts",
    "Kind",
    "Link",
    "Memory",
    "Messages",
    "NetworkCosts",
    "all_gather_seconds",
    "all_gather_sent",
    "all_reduce_seconds",
    "all_reduce_sent",
    "epoch_of",
    "estimate",
    "fit_link",
    "kinds",
    "largest_slowdown",
    "measure_link",
    "message_floats",
    "messages",
    "peer_rings",
    "probe_network",
    "replica_rings",
    "ring_link",
]
