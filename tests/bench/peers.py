"""What more peers cost each of them: bytes that a worker sends, and CPU time of a step, on the same cores.

More processes than cores also slow each other down by what they evict from caches, so the same number of processes
that train alone, without any exchange, is measured too.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist

from tests.bench.drawing import TINY, drawn
from tests.bench.processes import Group
from tests.bench.report import Row, compared, single
from tests.bench.training import Block, Ours, configured


@dataclass(frozen=True)
class Cohort:
    """What peers of all cohorts are, and how many there are in each."""

    name: str
    network: str
    image_size: int
    sizes: tuple[int, ...]
    """The first is what the others are compared with."""
    ways: tuple[str, ...]
    steps: int

    @property
    def settings(self) -> dict[str, Any]:
        """Of their trainings."""
        images = drawn(train=self.steps * BATCH, size=self.image_size, test=32)
        return {"batch_size": BATCH, "precision": "float32", "data": images}


BATCH = 32
TINY_PEERS = Cohort("tiny", TINY, 8, (2, 4, 8, 16), ("mean", "each", "alone"), steps=32)
# As large as peers are in the README's study: what is spent on sending is a small part here.
SMALL_PEERS = Cohort("resnet14", "resnet14", 32, (2, 16), ("mean", "alone"), steps=8)
WAYS = {"mean": "peers", "each": "peers, all-gather", "alone": "networks, no exchange"}
"""The exchange as it is, the all-gather way, and none."""


class Cohorts:
    """A rank of the largest cohort, which is also one of every smaller cohort that has room for it."""

    def __init__(self, kind: Cohort) -> None:
        self.cohorts: dict[tuple[int, str], Ours] = {}
        together = {**kind.settings, "distiller": "dml"}
        alone = configured(peers=[kind.network], **kind.settings, distiller="none")
        for size in kind.sizes:
            # Every rank has to take part in making a group, also of those that it is not in.
            group = cast(dist.ProcessGroup, dist.new_group(list(range(size))))
            if dist.get_rank() < size:
                for way in ("mean", "each"):
                    self.cohorts[size, way] = Ours(configured(peers=[kind.network] * size, **together), group)
                self.cohorts[size, "each"].say_each()
                self.cohorts[size, "alone"] = Ours(alone, group)

    def block(self, size: int, way: str) -> tuple[Block, float] | None:
        """A block of a cohort, and the bytes this rank sent per step; None for a rank that is not in it."""
        cohort = self.cohorts.get((size, way))
        return None if cohort is None else (cohort.block(), cohort.cost().bytes_per_step)


def measure(rounds: int, kinds: tuple[Cohort, ...] = (TINY_PEERS, SMALL_PEERS)) -> list[Row]:
    """The section."""
    rows = []
    for kind in kinds:
        cpu, sent = measured(kind, rounds)
        if "each" in kind.ways:
            rows += rows_of_bytes(kind, sent)
        rows += rows_of_cpu(kind, cpu)
    return rows


Measured = dict[tuple[int, str], list[float]]


def measured(kind: Cohort, rounds: int) -> tuple[Measured, Measured]:
    """CPU milliseconds per peer and step, and bytes that a worker sends per step: by size and way, round by round."""
    cpu: Measured = defaultdict(list)
    sent: Measured = defaultdict(list)
    with Group(max(kind.sizes), Cohorts, kind) as group:
        for counted in range(-1, rounds):
            for size in kind.sizes:
                for way in kind.ways:
                    told = [part for part in group.call("block", size, way) if part is not None]
                    if counted >= 0:
                        spent = sum(block.cpu_seconds for block, _ in told) / sum(block.steps for block, _ in told)
                        cpu[size, way].append(1e3 * spent)
                        sent[size, way].append(sum(each for _, each in told) / len(told))
    return cpu, sent


def rows_of_bytes(kind: Cohort, sent: Measured) -> list[Row]:
    """What a worker sends per step, beside what it would by an all-gather."""
    first = kind.sizes[0]
    return [
        compared(
            "peers",
            f"{size} {kind.name} peers: bytes sent per worker and step",
            sent[size, "mean"],
            "each peer's own, by all-gather",
            sent[size, "each"],
            "B",
            wanted="" if size == first else f"the bytes of {first}",
        )
        for size in kind.sizes
    ]


def rows_of_cpu(kind: Cohort, cpu: Measured) -> list[Row]:
    """CPU time per peer and step of each cohort, against the smallest."""
    first = kind.sizes[0]
    rows = [single("peers", f"{first} {kind.name} peers: CPU time per peer and step", cpu[first, "mean"], "ms")]
    for way in kind.ways:
        rows += [
            compared(
                "peers",
                f"{size} {kind.name} {WAYS[way]}: CPU time per peer and step",
                cpu[size, way],
                f"{first} {kind.name} {WAYS[way]}",
                cpu[first, way],
                "ms",
                wanted="<= 1.1" if way == "mean" else "",
            )
            for size in kind.sizes[1:]
        ]
    return rows
