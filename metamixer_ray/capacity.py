"""Whether a cluster's nodes can ever hold a training's workers, and what each worker may take. No Ray in here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from metamixer_ray.config import TrainConfig
from metamixer_ray.errors import ConfigError

# Four CPUs keep a GPU fed, and more threads than that seldom help networks of this size.
MOST_CPUS = 4.0
_SLACK = 1e-6


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one node has in all, free or not."""

    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)


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


def room(nodes: Sequence[Node], cpus: float, gpus: float) -> int:
    """How many workers of ``cpus`` and ``gpus`` each the nodes hold; a worker lies on one node.

    A share of a GPU is one of one GPU: two GPUs hold two workers with 0.66 each, not three.
    """
    held = 0
    for node in nodes:
        limits = [int(node.cpus / cpus + _SLACK)] if cpus > 0 else []
        if 0 < gpus < 1:
            limits.append(int(node.gpus + _SLACK) * int(1 / gpus + _SLACK))
        elif gpus > 0:
            limits.append(int(node.gpus / gpus + _SLACK))
        held += min(limits, default=10**6)
    return held


def worker_share(config: TrainConfig, nodes: Sequence[Node], *, grows: bool) -> WorkerResources:
    """What each worker takes: what the options say, else an even share of the nodes.

    Args:
        nodes: all there can ever be.
        grows: whether that is more than there is now (only words depend on it).

    Raises:
        ConfigError: the nodes can never hold all workers; says what is asked for, what there is, and what would fit.
    """
    placement, workers = config.placement, config.workers
    gpus = placement.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.gpus for node in nodes) else 0.0
    if gpus > 1 and gpus != int(gpus):
        raise ConfigError(f"--gpus-per-worker {gpus:g}: give a whole number of GPUs, or a share of one below 1")
    cpus = placement.cpus_per_worker
    if cpus is None:
        cpus = _largest_share(nodes, workers, gpus)
    what = f"{len(config.peers)} peers x {placement.replicas} replicas"
    there = "at its autoscaling maximum" if grows else "in all"
    if len(nodes) > 1:
        there += f" on {len(nodes)} nodes"
    if room(nodes, 0.0, gpus) < workers:
        total = sum(node.gpus for node in nodes)
        raise ConfigError(
            f"{what} with {gpus:g} GPU each need {gpus * workers:g} GPUs; the cluster has {total:g} GPUs {there}: "
            f"give fewer --peers or --replicas, let them share with --gpus-per-worker "
            f"{_largest_gpu_share(nodes, workers):g}, or use the CPU with --gpus-per-worker 0"
        )
    if room(nodes, cpus, gpus) < workers:
        total = sum(node.cpus for node in nodes)
        raise ConfigError(
            f"{what} with {cpus:g} CPU each need {cpus * workers:g} CPUs; the cluster has {total:g} CPUs {there}: "
            f"give fewer --peers or --replicas, or --cpus-per-worker {_largest_share(nodes, workers, gpus):g}"
        )
    return WorkerResources(cpus=cpus, gpus=gpus, threads=placement.threads or max(1, int(cpus)))


def check_labels(
    wanted: Sequence[Mapping[str, str]], replicas: int, nodes: Sequence[Node], resources: WorkerResources
) -> None:
    """Refuse label selectors that the nodes can never satisfy.

    Args:
        wanted: per peer, the labels its nodes must have.

    Raises:
        ConfigError: names the peer, its labels, and the labels there are.
    """
    for peer, labels in enumerate(wanted):
        alike = sum(1 for other in wanted if other == labels) * replicas
        fitting = _having(nodes, labels)
        if room(fitting, resources.cpus, resources.gpus) < alike:
            have = sorted({f"{k}={v}" for node in nodes for k, v in node.labels.items() if k != "ray.io/node-id"})
            raise ConfigError(
                f"--peer-labels {_text(labels)}: the nodes with these labels ({len(fitting)}) can't hold peer {peer} "
                f"and those like it, {alike} workers with {resources}; "
                f"there are nodes with: {', '.join(have) or 'no labels'}"
            )


def lacking_room(
    wanted: Sequence[Mapping[str, str]], workers: int, free: Sequence[Node], resources: WorkerResources
) -> str | None:
    """What workers find no room for on the nodes, in words; None when all do.

    Args:
        wanted: per peer, the labels its nodes must have; empty when no peer asks for any.
        free: the nodes with what nobody has reserved.
    """
    each = f"{resources.gpus:g} GPU and {resources.cpus:g} CPU" if resources.gpus else f"{resources.cpus:g} CPU"
    lacking = []
    for labels in {tuple(sorted(labels.items())): labels for labels in wanted if labels}.values():
        need = sum(other == labels for other in wanted) * workers // len(wanted)
        if (missing := need - room(_having(free, labels), resources.cpus, resources.gpus)) > 0:
            lacking.append(f"room for {missing} of {need} workers with {each} each on nodes with {_text(labels)}")
    if not lacking and (missing := workers - room(free, resources.cpus, resources.gpus)) > 0:
        lacking.append(f"room for {missing} of {workers} workers with {each} each")
    return "; ".join(lacking) or None


def _having(nodes: Sequence[Node], labels: Mapping[str, str]) -> list[Node]:
    """The nodes that have all these labels."""
    return [node for node in nodes if labels.items() <= node.labels.items()]


def _text(labels: Mapping[str, str]) -> str:
    """Labels as ``--peer-labels`` takes them."""
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _largest_gpu_share(nodes: Sequence[Node], workers: int) -> float:
    """The largest share of a GPU, in hundredths, of which all workers get one; 0 where there is no GPU."""
    shares = [int(100 / n) / 100 for n in range(1, 101)]
    return next((share for share in shares if room(nodes, 0.0, share) >= workers), 0.0)


def _largest_share(nodes: Sequence[Node], workers: int, gpus: float) -> float:
    """The most CPUs each worker can take: whole ones where that is possible, else hundredths."""
    whole = [float(n) for n in range(int(MOST_CPUS), 0, -1)]
    hundredths = [n / 100 for n in range(99, 0, -1)]
    return next((cpus for cpus in [*whole, *hundredths] if room(nodes, cpus, gpus) >= workers), 0.01)
