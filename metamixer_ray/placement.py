"""The Ray cluster: join or start one, and find out what a worker gets of it."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import ray
import ray.train

from metamixer_ray.config import PlacementConfig, TrainConfig
from metamixer_ray.errors import ConfigError

# The controller looks at its workers this often (seconds): epochs of small sets are shorter than Ray's default of 2 s.
POLL_SECONDS = "0.25"


@dataclass(frozen=True)
class WorkerResources:
    """What each worker reserves, and how it computes."""

    cpus: float
    gpus: float
    threads: int

    @property
    def backend(self) -> str:
        """NCCL refuses several ranks on one GPU, so shared GPUs exchange over gloo."""
        return "nccl" if self.gpus >= 1 else "gloo"

    def __str__(self) -> str:
        if self.gpus:
            return f"{self.gpus:g} GPU each, exchange over {self.backend}"
        return f"{self.cpus:g} CPU each ({self.threads} thread{'s' * (self.threads > 1)}), exchange over gloo"


def connect(placement: PlacementConfig, *, verbose: bool = False) -> None:
    """Join the cluster that ``--address``, $RAY_ADDRESS or the surrounding job names; else start a local one.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    # Ray prints a note about its accelerator variable on every CPU-only worker otherwise.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return
    address = placement.address or os.environ.get("RAY_ADDRESS")
    try:
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address is None:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--address {address}: no Ray cluster to join there ({reason}); start one with 'ray start --head', "
            "or leave --address and $RAY_ADDRESS out for a local one"
        ) from None


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


def _ceiling() -> tuple[dict[str, float], bool]:
    """All the resources the cluster can ever have, and whether it can grow to them."""
    now = {k: float(v) for k, v in ray.cluster_resources().items()}
    grown = ray._private.state.state.get_max_resources_from_cluster_config()
    if not grown:
        return now, False
    return {k: max(now.get(k, 0.0), float(grown.get(k, 0.0))) for k in {*now, *grown}}, True


def worker_resources(config: TrainConfig) -> WorkerResources:
    """What each worker of this training reserves on the connected cluster.

    Raises:
        ConfigError: the cluster can never hold all workers; says what is asked for and what there is.
    """
    total, grows = _ceiling()
    cpus, gpus, workers = total.get("CPU", 0.0), total.get("GPU", 0.0), config.workers
    per_gpu = config.placement.gpus_per_worker
    if per_gpu is None:
        per_gpu = 1.0 if gpus else 0.0
    per_cpu = config.placement.cpus_per_worker
    if per_cpu is None:
        # Whole CPUs where they suffice; four keep a GPU fed; hundredths where many peers share few cores.
        share = cpus / workers
        per_cpu = min(4.0, float(int(share))) if share >= 1 else max(int(share * 100) / 100, 0.01)
    limit = "at its autoscaling maximum" if grows else "in all"
    what = f"{len(config.peers)} peers x {config.placement.replicas} replicas"
    if per_gpu * workers > gpus + 1e-6:
        raise ConfigError(
            f"{what} with {per_gpu:g} GPU each need {per_gpu * workers:g} GPUs; the cluster has {gpus:g} {limit}: "
            f"give fewer --peers or --replicas, let them share with --gpus-per-worker "
            f"{max(int(gpus / workers * 100), 0) / 100:g}, or use the CPU with --gpus-per-worker 0"
        )
    if per_cpu * workers > cpus + 1e-6:
        raise ConfigError(
            f"{what} with {per_cpu:g} CPU each need {per_cpu * workers:g} CPUs; the cluster has {cpus:g} {limit}: "
            f"give fewer --peers or --replicas, or --cpus-per-worker {max(int(cpus / workers * 100), 1) / 100:g}"
        )
    threads = config.placement.threads or max(1, int(per_cpu))
    return WorkerResources(cpus=per_cpu, gpus=per_gpu, threads=threads)


def missing_now(config: TrainConfig, resources: WorkerResources) -> str | None:
    """What must become free (or be started by the autoscaler) before the workers fit; None when they fit now."""
    free = ray.available_resources()
    lacking = [
        f"{need - free.get(name, 0.0):g} of {need:g} {name}s"
        for name, need in (("GPU", resources.gpus * config.workers), ("CPU", resources.cpus * config.workers))
        if need > free.get(name, 0.0) + 1e-6
    ]
    return " and ".join(lacking) or None


def scaling(config: TrainConfig, resources: WorkerResources) -> ray.train.ScalingConfig:
    """Ray Train's description of the workers; the replicas of a peer follow one another."""
    wanted = selectors(config.placement.peer_labels)
    per_worker = [labels for labels in wanted for _ in range(config.placement.replicas)]
    reserve = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    return ray.train.ScalingConfig(
        num_workers=config.workers,
        use_gpu=resources.gpus > 0,
        resources_per_worker=reserve,
        placement_strategy="PACK",
        label_selector=per_worker if any(per_worker) else None,
    )
