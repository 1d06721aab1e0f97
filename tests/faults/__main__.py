"""``python -m tests.faults``: faults at random moments, for as long as one likes; what was lost, what memory did."""

import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import tyro

from tests.e2e import tiny
from tests.faults.injecting import FAULTS, Stage, stage_on, training, two_nodes


@dataclass(frozen=True, kw_only=True)
class Soak:
    """Disturb trainings of two tiny peers, one after the other, and compare each with one that nothing happened to."""

    minutes: float = 20.0
    """How long; the training that is under way is ended."""
    epochs: int = 200
    """Of each training."""
    every: float = 30.0
    """Mean seconds from when workers are there to the next fault."""
    seed: int = 0
    """Decides which faults come, and when."""
    kinds: tuple[str, ...] = tuple(FAULTS)
    """Which faults come; a part of a name is enough."""


class Memory:
    """Resident memory, open files and disk of all that runs under this process, by what a process is."""

    def __init__(self, storage: Path) -> None:
        self._storage, self.began = storage, time.monotonic()
        self.samples: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
        self.disk: list[float] = []

    def look(self) -> None:
        """Take a sample of every process that is older than a minute."""
        largest: dict[str, tuple[float, int]] = {}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if time.time() - process.create_time() < 60:
                    continue
                words = process.cmdline() or [process.name()]
                role = Path(words[0]).name if "python" not in words[0] else " ".join(words[1:3])[-40:]
                now = (process.memory_info().rss / 2**20, process.num_fds())
                largest[role] = max(largest.get(role, (0.0, 0)), now)
        at = time.monotonic() - self.began
        for role, (size, files) in largest.items():
            self.samples[role].append((at, size, files))
        self.disk.append(sum(f.stat().st_size for f in self._storage.rglob("*") if f.is_file()) / 2**20)

    def table(self) -> str:
        """First and last third of each role's samples, side by side."""
        lines = [f"{'process':<42}{'MB first':>10}{'MB last':>10}{'files first':>13}{'files last':>12}"]
        for role, samples in sorted(self.samples.items()):
            if len(samples) < 9:
                continue
            third = len(samples) // 3
            first, last = samples[:third], samples[-third:]
            numbers = [median(s[k] for s in part) for k in (1, 2) for part in (first, last)]
            lines.append(f"{role:<42}{numbers[0]:>10.0f}{numbers[1]:>10.0f}{numbers[2]:>13.0f}{numbers[3]:>12.0f}")
        return "\n".join([*lines, f"disk: at most {max(self.disk):.0f} MB"])


def disturb(stage: Stage, options: Soak, memory: Memory) -> Counter[str]:
    """Run a training to its end with faults in between; how many of each kind were injected."""
    kinds = [name for name in FAULTS if any(kind in name for kind in options.kinds)]
    done: Counter[str] = Counter()
    stage.run()
    while stage.ended() is None:
        if not training(stage):
            break
        until = time.monotonic() + stage.dice.expovariate(1 / options.every)
        while time.monotonic() < until and stage.ended() is None:
            memory.look()
            time.sleep(2)
        if stage.ended() is None:
            kind = stage.dice.choice(kinds)
            print(f"  {time.strftime('%H:%M:%S')} epoch {tiny.recorded(stage.folder):>4}: {kind}", flush=True)
            FAULTS[kind](stage)
            done[kind] += 1
    assert stage.reap() == 0, stage.told[-1]
    return done


def main() -> int:
    options = tyro.cli(Soak, prog="python -m tests.faults")
    storage = Path(tempfile.mkdtemp(prefix="metamixer_ray-faults-"))
    os.environ.setdefault("METAMIXER_HOME", str(storage / "home"))
    os.environ.setdefault("METAMIXER_CACHE", str(storage / "cache"))
    injected: Counter[str] = Counter()
    rounds = 0
    with two_nodes() as cluster:
        calm = stage_on(cluster, storage, "calm", options.seed, epochs=options.epochs)
        calm.run()
        assert calm.reap() == 0, calm.told[-1]
        memory, began = Memory(storage), time.monotonic()
        while time.monotonic() < began + 60 * options.minutes:
            print(f"training {rounds}", flush=True)
            stage = stage_on(cluster, storage, f"round{rounds}", options.seed + rounds, epochs=options.epochs)
            injected += disturb(stage, options, memory)
            tiny.assert_equal_runs(calm.folder, stage.folder, epochs=options.epochs)
            rounds += 1
    for kind, count in injected.most_common():
        print(f"{count:>4}  {kind}")
    print(f"{injected.total()} faults in {rounds} trainings of {options.epochs} epochs: all ended with equal bits")
    print(memory.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
