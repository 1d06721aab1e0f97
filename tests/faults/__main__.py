"""``python -m tests.faults``: faults at random moments, for as long as one likes; what was lost, what memory did."""

import os
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil
import tyro

from metamixer_ray.folder import RunFolder, checkpoint_names
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


@dataclass
class Life:
    """What was seen of one process: its age in seconds, resident MB and open files, sample by sample."""

    samples: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """For how long it was watched after its warm-up."""
        return self.samples[-1][0] - self.samples[0][0]

    def ends(self, column: int) -> tuple[float, float]:
        """Medians of the first and the last quarter of the samples."""
        quarter = max(1, len(self.samples) // 4)
        values = [sample[column] for sample in self.samples]
        return median(values[:quarter]), median(values[-quarter:])

    @property
    def growth(self) -> float:
        """Of resident memory, as a fraction."""
        first, last = self.ends(1)
        return last / first - 1


class Watch:
    """Memory and open files of every process under this one, and what storage holds, sampled from a thread."""

    WARM_UP, LOOK_SECONDS, LONG = 60.0, 2.0, 120.0

    def __init__(self, storage: Path) -> None:
        self._storage, self._over = storage, threading.Event()
        self._lives: dict[str, dict[tuple[int, float], Life]] = defaultdict(lambda: defaultdict(Life))
        self.disk: list[float] = []
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._over.wait(self.LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                began = process.create_time()
                age = time.time() - began
                if age < self.WARM_UP or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                life = self._lives[_role(process)][process.pid, began]
                life.samples.append((age, process.memory_info().rss / 2**20, float(process.num_fds())))
        size = 0
        for file in self._storage.rglob("*"):
            with suppress(OSError):
                size += file.stat().st_size
        self.disk.append(size / 2**20)

    def table(self) -> str:
        """Of each kind of process the longest life and the one that grew most of those that lived long enough."""
        self._over.set()
        self._thread.join()
        heads = ("processes", "longest", "MB then", "MB last", "growth", "most", "files then", "files last")
        lines = [f"{'':<42}" + "".join(f"{head:>12}" for head in heads)]
        for role, lives in sorted(self._lives.items()):
            longest = max(lives.values(), key=lambda life: life.seconds)
            most = max((life.growth for life in lives.values() if life.seconds >= self.LONG), default=None)
            memory, open_files = longest.ends(1), longest.ends(2)
            lines.append(
                f"{role:<42}{len(lives):>12}{longest.seconds / 60:>8.1f} min{memory[0]:>12.1f}{memory[1]:>12.1f}"
                f"{longest.growth:>12.1%}{'' if most is None else f'{most:.1%}':>12}"
                f"{open_files[0]:>12.0f}{open_files[1]:>12.0f}"
            )
        third = max(1, len(self.disk) // 3)
        most_first, most_last = max(self.disk[:third]), max(self.disk[-third:])
        return "\n".join([*lines, f"disk: at most {most_first:.1f} MB in the first third, {most_last:.1f} in the last"])


def _role(process: psutil.Process) -> str:
    """What a process is: its title, its program, or the module that Python runs."""
    words = process.cmdline() or [process.name()]
    if "python" not in Path(words[0]).name:
        return Path(words[0]).name[:40]
    return " ".join(words[1:3])[-40:]


def disturb(stage: Stage, options: Soak) -> Counter[str]:
    """Run a training to its end with faults in between; how many of each kind were injected."""
    kinds = [name for name in FAULTS if any(kind in name for kind in options.kinds)]
    done: Counter[str] = Counter()
    stage.run()
    while stage.ended() is None:
        if not training(stage):
            break
        until = time.monotonic() + stage.dice.expovariate(1 / options.every)
        while time.monotonic() < until and stage.ended() is None:
            time.sleep(0.5)
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
        watch = Watch(storage)
        calm = stage_on(cluster, storage, "calm", options.seed, epochs=options.epochs)
        calm.run()
        assert calm.reap() == 0, calm.told[-1]
        print(f"calm: {time.strftime('%H:%M:%S')}", flush=True)
        began = time.monotonic()
        while time.monotonic() < began + 60 * options.minutes:
            print(f"training {rounds}", flush=True)
            stage = stage_on(cluster, storage, f"round{rounds}", options.seed + rounds, epochs=options.epochs)
            injected += disturb(stage, options)
            tiny.assert_equal_runs(calm.folder, stage.folder, epochs=options.epochs)
            assert tiny.tracked_epochs(storage, stage.folder.name) == tiny.tracked_epochs(storage, calm.folder.name)
            assert len(checkpoint_names(RunFolder(str(stage.folder)))) <= tiny.config(storage).run.keep_checkpoints
            rounds += 1
        table = watch.table()
    for kind, count in injected.most_common():
        print(f"{count:>4}  {kind}")
    print(f"{injected.total()} faults in {rounds} trainings of {options.epochs} epochs: all ended with equal bits")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
