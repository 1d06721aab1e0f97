"""What more peers cost each of them: bytes that a worker sends, and CPU time of a step, on the same cores.

More processes than cores also slow each other down by what they evict from caches, so the same number of processes
that train alone, without any exchange, is measured too.
"""

from collections import defaultdict
from typing import Any, cast

import torch.distributed as dist

from tests.bench.drawing import TINY, drawn
from tests.bench.processes import Group
from tests.bench.report import Row, compared, single
from tests.bench.training import Block, Ours, configured

SIZES = (2, 4, 8, 16)
SETTINGS: dict[str, Any] = {"batch_size": 32, "precision": "float32"}
STEPS = 32
WAYS = ("mean", "each", "alone")
"""The exchange as it is, the all-gather way, and none."""


class Cohorts:
    """A rank of the largest cohort, which is also one of every smaller cohort that has room for it."""

    def __init__(self, sizes: tuple[int, ...], settings: dict[str, Any]) -> None:
        self.cohorts: dict[tuple[int, str], Ours] = {}
        together = {**settings, "distiller": "dml"}
        alone = configured(peers=[TINY], **settings, distiller="none")
        for size in sizes:
            # Every rank has to take part in making a group, also of those that it is not in.
            group = cast(dist.ProcessGroup, dist.new_group(list(range(size))))
            if dist.get_rank() < size:
                for way in ("mean", "each"):
                    self.cohorts[size, way] = Ours(configured(peers=[TINY] * size, **together), group)
                self.cohorts[size, "each"].say_each()
                self.cohorts[size, "alone"] = Ours(alone, group)

    def block(self, size: int, way: str) -> tuple[Block, float] | None:
        """A block of a cohort, and the bytes this rank sent per step; None for a rank that is not in it."""
        cohort = self.cohorts.get((size, way))
        return None if cohort is None else (cohort.block(), cohort.cost().bytes_per_step)


def measure(rounds: int, sizes: tuple[int, ...] = SIZES, steps: int = STEPS) -> list[Row]:
    """The section, for cohorts of ``sizes`` peers; the first is what the others are compared with."""
    settings = {**SETTINGS, "data": drawn(train=steps * SETTINGS["batch_size"], size=8, test=32)}
    cpu: dict[tuple[int, str], list[float]] = defaultdict(list)
    sent: dict[tuple[int, str], list[float]] = defaultdict(list)
    with Group(max(sizes), Cohorts, sizes, settings) as group:
        for counted in range(-1, rounds):
            for size in sizes:
                for way in WAYS:
                    told = [part for part in group.call("block", size, way) if part is not None]
                    if counted >= 0:
                        spent = sum(block.cpu_seconds for block, _ in told) / sum(block.steps for block, _ in told)
                        cpu[size, way].append(1e3 * spent)
                        sent[size, way].append(sum(each for _, each in told) / len(told))
    return [*rows_of_bytes(sent, sizes), *rows_of_cpu(cpu, sizes)]


def rows_of_bytes(sent: dict[tuple[int, str], list[float]], sizes: tuple[int, ...]) -> list[Row]:
    """What a worker sends per step, beside what it would by an all-gather."""
    return [
        compared(
            "peers",
            f"{size} tiny peers: bytes sent per worker and step",
            sent[size, "mean"],
            "each peer's own, by all-gather",
            sent[size, "each"],
            "B",
            wanted="" if size == sizes[0] else f"the bytes of {sizes[0]}",
        )
        for size in sizes
    ]


def rows_of_cpu(cpu: dict[tuple[int, str], list[float]], sizes: tuple[int, ...]) -> list[Row]:
    """CPU time per peer and step of each cohort, against the smallest."""
    first = sizes[0]
    rows = [single("peers", f"{first} tiny peers: CPU time per peer and step", cpu[first, "mean"], "ms")]
    for way, name in (("mean", "peers"), ("each", "peers, all-gather"), ("alone", "networks, no exchange")):
        rows += [
            compared(
                "peers",
                f"{size} tiny {name}: CPU time per peer and step",
                cpu[size, way],
                f"{first} tiny {name}",
                cpu[first, way],
                "ms",
                wanted="<= 1.1" if way == "mean" else "",
            )
            for size in sizes[1:]
        ]
    return rows
