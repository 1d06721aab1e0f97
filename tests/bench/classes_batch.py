"""Bytes of a step against classes C and batch B, as designed, and its collectives, counted."""

from collections import Counter
from collections.abc import Sequence

from metamixer_ray.distill.control import CONTROL_FLOATS
from tests.bench.drawing import TINY, drawn
from tests.bench.processes import Group
from tests.bench.report import Row
from tests.bench.training import Ours, configured
from tests.bench.watching import CallCounter

PEERS = 2
STEPS = 16
PAIRS = ((32, 10), (128, 10), (128, 100), (128, 1000), (512, 100))
"""(B, C)."""


class Counted:
    """A rank that tells what a block sent, and how."""

    def __init__(self, batch: int, classes: int, steps: int) -> None:
        # Its calls are counted from here on, in this process only.
        self.counter = CallCounter()
        self.ours = Ours(
            configured(
                peers=[TINY] * PEERS,
                data=drawn(train=steps * batch, test=32, size=8, classes=classes),
                batch_size=batch,
                precision="float32",
                statistics="none",
            )
        )
        # The first block also makes sure, once, that all peers mean the same shapes.
        self.ours.block()

    def block(self) -> tuple[dict[str, int], float, int]:
        """Calls of collectives, bytes per step, and steps, of one block."""
        self.counter.take()
        steps = self.ours.block().steps
        calls = Counter(self.counter.take())
        calls["barrier"] -= 1  # the block's own, before it begins
        return {name: count for name, count in calls.items() if count}, self.ours.cost().bytes_per_step, steps


def count(batch: int, classes: int, steps: int = STEPS) -> list[tuple[dict[str, int], float, int]]:
    """By rank: calls of collectives by name, bytes per step, and steps, of a block of real training."""
    with Group(PEERS, Counted, batch, classes, steps) as group:
        return group.call("block")


def designed(batch: int, classes: int) -> int:
    """Bytes: B x C probabilities, B negative entropies and control, in float32."""
    return 4 * (batch * classes + batch + CONTROL_FLOATS)


def measure(rounds: int, pairs: Sequence[tuple[int, int]] = PAIRS) -> list[Row]:
    """The section. These are counts, which no round changes, so one is taken whatever ``rounds``."""
    rows = []
    for batch, classes in pairs:
        calls, sent, steps = count(batch, classes)[0]
        collectives = sum(calls.values()) / steps
        rows += [
            Row(
                section="classes-batch",
                what=f"B={batch}, C={classes}: bytes sent per worker and step",
                ours=sent,
                unit="B",
                versus="4 (B C + B + control)",
                other=designed(batch, classes),
                ratio=sent / designed(batch, classes),
                wanted="1",
            ),
            Row(
                section="classes-batch",
                what=f"B={batch}, C={classes}: collectives per step ({', '.join(sorted(calls))})",
                ours=collectives,
                unit="",
                wanted="1",
            ),
        ]
    return rows
