"""A plan as a person reads it."""

from collections.abc import Sequence

from metamixer_ray.planning.estimate import MOST_SHARE, Estimate, NetworkEstimate
from metamixer_ray.tracking.console import duration
from metamixer_ray.tracking.summary import count


def as_table(plan: Estimate, assumptions: Sequence[tuple[str, str]]) -> str:
    """The plan as aligned text, with what it rests on: (topic, words) each."""
    nodes = f" on {plan.nodes:,} nodes" if plan.nodes > 1 else ""
    heading = [
        f"{plan.peers} peer{'s' * (plan.peers > 1)} x {plan.replicas} replica{'s' * (plan.replicas > 1)}: "
        f"{plan.workers:,} worker{'s' * (plan.workers > 1)}{nodes}",
        f"{'data':<9} {plan.data}",
        f"{'training':<9} {plan.epochs} epochs x {plan.steps_per_epoch:,} steps of {plan.batch_size} images, "
        f"{plan.rows} per worker",
    ]
    blocks = [heading, _networks(plan), _step(plan), _whole(plan)]
    blocks.append([f"{topic:<9} {words}" for topic, words in assumptions])
    return "\n\n".join("\n".join(block) for block in blocks)


def size(number: float) -> str:
    """Bytes with three digits: ``51.8 kB``, ``1.85 MB``, ``12.4 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{_three_digits(number / factor)} {unit}"
    return f"{number:.0f} B"


def seconds(number: float) -> str:
    """A short time with three digits: ``0.42 ms``, ``1.31 s``."""
    return f"{_three_digits(number)} s" if number >= 1 else f"{_three_digits(1000 * number)} ms"


def slowdown(plan: Estimate) -> str:
    """How much slower the network may get, in words."""
    share, times = f"{100 * MOST_SHARE:g} % of a step", plan.largest_slowdown
    if times is None:
        return "nothing is exchanged"
    latency = 100 * plan.exchange.latency_seconds_per_step / plan.exchange.seconds_per_step
    because = f"{latency:.0f} % of its time is latency"
    if times < 1:
        faster = _three_digits(1 / times)
        return f"exchange over {share}, and under it on a network {faster} times faster ({because})"
    return f"exchange under {share} until the network is {_three_digits(times)} times slower ({because})"


def _networks(plan: Estimate) -> list[str]:
    header = ["network", "peers", "parameters", "GFLOP", "images/s", "memory", "weights", "gradients", "optimizer"]
    header += ["activations", "other"]
    kinds = [network.name for network in plan.networks]
    rows = [
        [
            network.name if kinds.count(network.name) == 1 else f"{network.name} ({network.optimizer})",
            str(network.peers),
            count(network.parameters),
            _three_digits(network.training_flops / 1e9),
            f"{network.images_per_second:,.0f}",
            size(network.memory.total),
            size(network.memory.weights),
            size(network.memory.gradients),
            size(network.memory.optimizer),
            size(network.memory.activations),
            size(network.memory.in_flight + network.memory.batch),
        ]
        for network in plan.networks
    ]
    return _aligned([header, *rows])


def _step(plan: Estimate) -> list[str]:
    slowest, exchange = _slowest(plan), plan.exchange
    replicated = plan.replicas > 1

    def share(part: float) -> str:
        return f"{100 * part / plan.step_seconds:.1f} %"

    rows = [
        ["per step and worker", "handed over", "sent", "time", "share of step"],
        [f"compute ({slowest.name})", "-", "-", seconds(slowest.compute_seconds), share(slowest.compute_seconds)],
        [
            "exchange between peers",
            size(exchange.bytes_per_step),
            size(exchange.sent_bytes_per_step),
            seconds(exchange.seconds_per_step),
            share(exchange.seconds_per_step),
        ],
    ]
    if replicated:
        sent = 2 * (plan.replicas - 1) / plan.replicas * slowest.gradient_bytes
        rows.append(
            [
                "gradients between replicas",
                size(slowest.gradient_bytes),
                size(sent),
                seconds(slowest.gradient_seconds),
                share(slowest.exposed_gradient_seconds),
            ]
        )
    rows.append(["step", "", "", seconds(plan.step_seconds), "100.0 %"])
    return _aligned(rows)


def _whole(plan: Estimate) -> list[str]:
    hours = plan.training_seconds / 3600
    unit, total = ("worker", plan.worker_hours) if plan.gpu_hours is None else ("GPU", plan.gpu_hours)
    return [
        f"{'network':<9} {slowdown(plan)}",
        f"{'time':<9} {duration(plan.epoch_seconds)} an epoch, {duration(plan.training_seconds)} in all",
        f"{'cost':<9} {plan.workers:,} workers x {hours:,.2f} h: {total:,.1f} {unit}-hours",
    ]


def _slowest(plan: Estimate) -> NetworkEstimate:
    return max(plan.networks, key=lambda network: network.compute_seconds + network.exposed_gradient_seconds)


def _three_digits(number: float) -> str:
    if number >= 99.95:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
