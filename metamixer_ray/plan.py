"""What a training would take on other machines: ``python -m metamixer_ray.plan``, with the words of a training.

Measures a step of each network and a message between two processes here; the rest is arithmetic.
"""

import inspect
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
import tyro

from metamixer_ray.cli import STARTING_POINTS, run_command, take_starting_point
from metamixer_ray.config import TrainConfig
from metamixer_ray.errors import ConfigError
from metamixer_ray.optimisation import build_optimizer
from metamixer_ray.planning import (
    Cluster,
    Epoch,
    Estimate,
    Link,
    NetworkCosts,
    epoch_of,
    estimate,
    kinds,
    measure_link,
    messages,
    probe_network,
)
from metamixer_ray.planning.table import as_table
from metamixer_ray.precision import resolve_precision
from metamixer_ray.preparation import build_peers

_BYTES_PER_GBIT = 1e9 / 8
_MICROSECOND = 1e-6


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Bytes, time, memory and cost of a training, before it is started: the words of a training, and about the machines
    it would run on."""

    network: tuple[str, ...] = ()
    """With a number for --peers: the network of all of them, or several that share them evenly. --peers 64 --network
    resnet32 stands for 64 times --peers resnet32."""
    bandwidth: float | None = None
    """Network between nodes, in Gbit/s of one node; its workers share it. Default: measured between two processes
    here."""
    latency: float | None = None
    """Time of the shortest message from one worker to another, in microseconds. Default: measured here, where processes
    talk over gloo."""
    workers_per_node: int = 1
    """Workers that one node holds. Their messages to other nodes share --bandwidth; those inside the node have
    --node-bandwidth each."""
    node_bandwidth: float | None = None
    """Between two workers of one node, in Gbit/s. Default: as --bandwidth, or measured here."""
    throughput: tuple[float, ...] = ()
    """Images/s that one worker trains on the machines in question, where known: one for all networks, or one for each
    in the order of --peers. Default: measured here."""
    tflops: float | None = None
    """Instead of --throughput: what one worker's device sustains in training, in 10^12 floating-point operations per
    second; far less than its peak, and the less the smaller the network."""
    images: int | None = None
    """Training images, when the data isn't here; with --classes and --image-size. Not needed for named sets."""
    classes: int | None = None
    """Classes, when the data isn't here."""
    json: bool = False
    """Print JSON (bytes, seconds) instead of a table."""
    training: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Refuse numbers that can't be.

        Raises:
            ConfigError: names the option and a value that works.
        """
        for name, value in (("bandwidth", self.bandwidth), ("node-bandwidth", self.node_bandwidth)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name} must be a positive number of Gbit/s, not {value}")
        if self.latency is not None and not 0 <= self.latency < math.inf:
            raise ConfigError(f"--latency must be 0 or a positive number of microseconds, not {self.latency}")
        if self.workers_per_node < 1:
            raise ConfigError(f"--workers-per-node must be at least 1, it is {self.workers_per_node}")
        if any(not 0 < value < math.inf for value in self.throughput):
            raise ConfigError(f"--throughput takes positive numbers of images/s, not {self.throughput}")
        several = len(kinds(self.training))
        if len(self.throughput) not in (0, 1, several):
            raise ConfigError(
                f"--throughput has {len(self.throughput)} values for {several} different networks: "
                f"give one for all or {several}"
            )
        if self.tflops is not None:
            if not 0 < self.tflops < math.inf:
                raise ConfigError(f"--tflops must be a positive number of TFLOP/s, not {self.tflops}")
            if self.throughput:
                raise ConfigError("--tflops and --throughput both say how fast a worker is: give one of them")
        if 1 < self.workers_per_node < self.training.workers and self.bandwidth is None:
            raise ConfigError(
                f"--workers-per-node {self.workers_per_node} spreads {self.training.workers} workers over several "
                "nodes: say with --bandwidth how many Gbit/s the network of a node has"
            )


def plan(options: PlanOptions) -> tuple[Estimate, list[tuple[str, str]]]:
    """What the training takes, and what that rests on, as (topic, words).

    Measures on this machine what the options don't say.

    Raises:
        UserError: options, data or networks that can't work, as in training.
    """
    options.check()
    config = options.training
    epoch = epoch_of(config, images=options.images, classes=options.classes)
    device = torch.device("cuda" if torch.cuda.is_available() and config.placement.gpus_per_worker != 0 else "cpu")
    costs, stages = measure_networks(config, epoch, device)
    needed = config.workers > 1 and None in (options.bandwidth, options.latency)
    crowd = crowding(config, device)
    cluster = cluster_of(options, measure_link().slower(crowd) if needed else None)
    measured = [cost.timed_rows / cost.step_seconds / crowd for cost in costs]
    given = given_throughput(options, costs)
    on_gpu = bool(given) or device.type == "cuda"
    gpus = 1.0 if config.placement.gpus_per_worker is None else config.placement.gpus_per_worker
    found = estimate(
        config,
        epoch,
        messages(config, rows=epoch.rows, classes=epoch.classes, stages=stages),
        costs,
        cluster,
        throughput=given or measured,
        gpus_per_worker=gpus if on_gpu else 0.0,
    )
    return found, assumptions(options, cluster, costs, device)


def measure_networks(config: TrainConfig, epoch: Epoch, device: torch.device) -> tuple[list[NetworkCosts], int]:
    """The costs of each of ``kinds(config)``, measured with the threads of one worker, and how many stages the peers
    compare.

    Raises:
        ConfigError: a network that can't be built or can't take these images.
    """
    different = kinds(config)
    of_each = replace(config, peers=tuple(kind.name for kind in different))
    networks = build_peers(of_each, classes=epoch.classes, image_size=epoch.size)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_of(config))
    try:
        costs = [
            probe_network(
                network.to(device),
                build_optimizer(config.optimisation, kind.first, network),
                rows=max(epoch.rows),
                classes=epoch.classes,
                image_size=epoch.size,
                device=device,
                precision=resolve_precision(config.precision, device),
                compiled=config.compile,
            )
            for kind, network in zip(different, networks, strict=True)
        ]
    finally:
        torch.set_num_threads(threads)
    return costs, min(len(network.stage_names) for network in networks)


def given_throughput(options: PlanOptions, costs: Sequence[NetworkCosts]) -> list[float]:
    """Images/s of one worker of each network as the options say, empty where they don't."""
    if options.tflops is not None:
        return [options.tflops * 1e12 / cost.training_flops_per_row for cost in costs]
    return list(options.throughput) * (len(costs) if len(options.throughput) == 1 else 1)


def threads_of(config: TrainConfig) -> int:
    """The threads of a worker on a CPU, as in training; 1 where that would depend on the cluster."""
    return config.placement.threads or max(1, int(config.placement.cpus_per_worker or 1))


def crowding(config: TrainConfig, device: torch.device) -> float:
    """How many workers share one ``device``, at least 1: what is measured here has it to itself.

    Workers that share a core also wait for each other at every hop of a collective.
    """
    placement = config.placement
    share = placement.gpus_per_worker if device.type == "cuda" else placement.cpus_per_worker
    return max(1.0, 1 / share) if share else 1.0


def cluster_of(options: PlanOptions, measured: Link | None) -> Cluster:
    """The machines that the options describe; what they don't say is as ``measured``."""

    def link(gbit: float | None) -> Link:
        latency = measured.latency if options.latency is None and measured else (options.latency or 0) * _MICROSECOND
        if gbit is None:
            return Link(bandwidth=measured.bandwidth if measured else math.inf, latency=latency)
        return Link(bandwidth=gbit * _BYTES_PER_GBIT, latency=latency)

    return Cluster(
        workers_per_node=options.workers_per_node,
        inside=link(options.node_bandwidth or options.bandwidth),
        between=link(options.bandwidth),
    )


def assumptions(
    options: PlanOptions, cluster: Cluster, costs: Sequence[NetworkCosts], device: torch.device
) -> list[tuple[str, str]]:
    """What was measured here and what was given, in words."""
    config = options.training
    precision = resolve_precision(config.precision, device)
    where = "a GPU" if device.type == "cuda" else f"{threads_of(config)} CPU thread{'s' * (threads_of(config) > 1)}"
    if (crowd := crowding(config, device)) > 1:
        where += f" that {crowd:g} workers share"
    timed = " and ".join(sorted({str(cost.timed_rows) for cost in costs}, key=int))
    speed = f"images/s of {timed} images a step on {where} here"
    if options.tflops is not None:
        speed = f"images/s of a worker that sustains {options.tflops:g} TFLOP/s (given)"
    elif options.throughput:
        speed = "images/s given"
    link, words = cluster.between, []
    for value, given, unit in (
        (link.bandwidth / _BYTES_PER_GBIT, options.bandwidth, "Gbit/s"),
        (link.latency / _MICROSECOND, options.latency, "us latency"),
    ):
        words.append(f"{value:.3g} {unit} ({'measured here over gloo' if given is None else 'given'})")
    lines = [("speed", f"{speed}; activations counted in {precision}")]
    if config.workers > 1:
        node = options.workers_per_node
        lines.append(("links", f"{', '.join(words)}; {node} worker{'s' * (node > 1)} a node"))
    # Packing takes 0.1 ms on an idle core, and 0.5 ms between two processes on busy ones.
    lines.append(
        ("left out", "packing messages (0.1 to 0.5 ms); the framework's own memory (0.5 to 1 GB); checkpoints")
    )
    return lines


def parse_plan(argv: Sequence[str]) -> PlanOptions:
    """Checked options from the command line.

    Raises:
        UserError: a file that can't be read, or an impossible combination.
        SystemExit: unknown flags or values of the wrong type.
    """
    default, words = take_starting_point(argv)
    about = inspect.cleandoc(PlanOptions.__doc__ or "")
    options = tyro.cli(
        PlanOptions,
        prog="python -m metamixer_ray.plan",
        description=f"{about}\n\n{STARTING_POINTS}",
        default=PlanOptions(training=default),
        args=words,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    peers = many_peers(options.training.peers, options.network)
    options = replace(options, training=replace(options.training, peers=peers))
    options.training.check()
    options.check()
    return options


def many_peers(peers: Sequence[str], network: Sequence[str]) -> tuple[str, ...]:
    """The peers that ``--peers`` and ``--network`` mean together: names as they are, or a number of networks.

    Raises:
        ConfigError: a number without networks, networks without a number, or a number that they can't share evenly.
    """
    numbers = [word for word in peers if word.lstrip("+-").isdecimal()]
    if not numbers:
        if network:
            raise ConfigError(
                f"--network {' '.join(network)}: belongs to a number of peers, such as --peers 64; "
                "where --peers names each network, leave --network out"
            )
        return tuple(peers)
    number = int(numbers[0])
    if len(peers) > 1 or number < 1:
        raise ConfigError(f"--peers {' '.join(peers)}: give one positive number, or the name of each peer's network")
    if not network:
        raise ConfigError(f"--peers {number}: say which network they are, such as --peers {number} --network resnet32")
    if number % len(network):
        raise ConfigError(
            f"--peers {number} --network {' '.join(network)}: {number} peers can't be shared evenly by {len(network)} "
            f"networks; the nearest number that can is {max(1, round(number / len(network))) * len(network)}"
        )
    return tuple(name for name in network for _ in range(number // len(network)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m metamixer_ray.plan``; returns its exit status."""

    def body(words: Sequence[str]) -> None:
        options = parse_plan(words)
        found, rests_on = plan(options)
        if options.json:
            print(json.dumps(asdict(found) | {"assumptions": dict(rests_on)}, indent=2))
        else:
            print(as_table(found, rests_on))

    return run_command(body, argv)


if __name__ == "__main__":
    sys.exit(main())
