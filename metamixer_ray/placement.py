"""The Ray cluster: join or start one, and find out what a worker gets of it."""

import logging
import os
import socket
from collections.abc import Sequence
from contextlib import nullcontext

import ray
import ray.train
from ray._private.state import available_resources_per_node

from metamixer_ray.capacity import Node, WorkerResources, check_labels, lacking_room, worker_share
from metamixer_ray.config import PlacementConfig, TrainConfig
from metamixer_ray.errors import ConfigError
from metamixer_ray.growth import Growth, at_most, startable
from metamixer_ray.loopback import loopback_only

# The controller looks at its workers this often (seconds): epochs of small sets are shorter than Ray's default of 2 s.
POLL_SECONDS = "0.25"
# A worker that doesn't answer for so long is taken for hung. It answers beside its training, however long a step takes.
HUNG_SECONDS = "60"
# Workers that wait for a hung one can't leave their process group in good order, so nobody waits for it long.
LEAVE_GROUP_SECONDS = "5"
# Whether Ray looks out for notices. A person's own choice is 0, ours another word for it.
WATCHER, OURS = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "no"
# Nodes that a launcher or Kubernetes started have it.
_NODE_GROUP = "ray.io/node-group"


def connect(placement: PlacementConfig, *, verbose: bool = False) -> None:
    """Join the cluster that ``--address``, $RAY_ADDRESS or the surrounding job names; else start a local one.

    Raises:
        ConfigError: no cluster answers at the address, or Ray may not write here.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", HUNG_SECONDS)
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", LEAVE_GROUP_SECONDS)
    # Ray prints a note about its accelerator variable on every CPU-only worker otherwise.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # What Ray says of its nodes it would say in colours, in the log of a job too.
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # A person's own network or data may open files by names relative to where they started it.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    if ray.is_initialized():
        return
    address = placement.address or os.environ.get("RAY_ADDRESS") or _running_here()
    if address and address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: a training can't be driven from outside its cluster; start it there with "
            "'ray job submit --address http://HEAD:8265 -- python -m metamixer_ray.train ...'"
        )
    if address == "local":
        address = None
    if not address:
        # Nobody takes this machine away with a notice, so there need be no process that looks out for one.
        os.environ.setdefault(WATCHER, OURS)
    elif os.environ.get(WATCHER) == OURS:
        del os.environ[WATCHER]
    try:
        with nullcontext() if address else loopback_only():
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
            )
    except PermissionError as error:
        if address:
            raise
        raise ConfigError(
            f"Ray can't be started ({error}); where it is its folder for sessions, which may be another user's, set "
            "$RAY_TMPDIR to a folder of yours with a short path"
        ) from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address is None:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--address {address}: no Ray cluster to join there ({reason}); start one with 'ray start --head', "
            "or leave --address and $RAY_ADDRESS out for a local one"
        ) from None


def _running_here() -> str | None:
    """The address of a cluster that runs on this machine, as ``ray start`` noted it; None when nobody answers there.

    ``ray.init`` would take the note at its word, and wait for a cluster that was killed.
    """
    address: str | None = ray._private.utils.read_ray_address()
    if not address:
        return None
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return address
    except OSError:
        return None


def selectors(peer_labels: Sequence[str]) -> list[dict[str, str]]:
    """``("a=b,c=d", "-")`` as one mapping per peer.

    Raises:
        ConfigError: something that is not ``key=value``.
    """
    parsed = []
    for text in peer_labels:
        labels = {}
        for part in [] if text == "-" else text.split(","):
            key, equals, value = part.partition("=")
            if not (key and equals and value):
                raise ConfigError(f"--peer-labels {text!r}: write key=value, several joined by commas, or '-'")
            labels[key] = value
        parsed.append(labels)
    return parsed


def cluster_nodes(growth: Growth) -> list[Node]:
    """The nodes of the connected cluster, with those that its autoscaler may start."""
    nodes = [
        Node(
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            labels=node.get("Labels") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return at_most(nodes, growth)


def worker_resources(config: TrainConfig) -> WorkerResources:
    """What each worker of this training reserves on the connected cluster.

    Raises:
        ConfigError: the cluster can never hold all workers; says what is asked for and what there is.
    """
    growth = startable(config.placement.grows_to)
    nodes = cluster_nodes(growth)
    try:
        resources = worker_share(config, nodes, grows=bool(growth.types))
        check_labels(selectors(config.placement.peer_labels), config.placement.replicas, nodes, resources)
    except ConfigError as error:
        if growth.types or not any(_NODE_GROUP in node.labels for node in nodes):
            raise
        raise ConfigError(f"{error}; if its autoscaler may start more nodes, say so with --grows-to") from None
    return resources


def missing_now(config: TrainConfig, resources: WorkerResources) -> str | None:
    """What must become free (or be started by the autoscaler) before the workers fit; None when they fit now."""
    labels = {node["NodeID"]: node.get("Labels") or {} for node in ray.nodes() if node["Alive"]}
    free = [
        Node(cpus=left.get("CPU", 0.0), gpus=left.get("GPU", 0.0), labels=labels[node])
        for node, left in available_resources_per_node().items()
        if node in labels
    ]
    return lacking_room(selectors(config.placement.peer_labels), config.workers, free, resources)


def scaling(config: TrainConfig, resources: WorkerResources) -> ray.train.ScalingConfig:
    """Ray Train's description of the workers; the replicas of a peer follow one another."""
    wanted = selectors(config.placement.peer_labels)
    per_worker = [labels for labels in wanted for _ in range(config.placement.replicas)]
    reserve = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    return ray.train.ScalingConfig(
        num_workers=config.workers,
        use_gpu=resources.gpus > 0,
        resources_per_worker=reserve,
        placement_strategy="SPREAD" if config.placement.spread else "PACK",
        label_selector=per_worker if any(per_worker) else None,
    )
