"""Memory, open files and disk of all that runs under this process, for as long as one looks."""

import os
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from tests.faults.disk import BALLAST


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

    WARM_UP, LOOK_SECONDS, LONG = 60.0, 2.0, 60.0
    # Titles of processes that run this project's code, and by how much most of them may grow.
    OURS = ("metamixer_ray.train", "TrainController", "TrainWorker")
    FLAT, MORE_FILES = 0.05, 2

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
                resident, open_files = process.memory_info().rss, process.num_fds()
                if resident > 0:  # else it is ending
                    life = self._lives[role(process)][process.pid, began]
                    life.samples.append((age, resident / 2**20, float(open_files)))
        stored = 0
        # Passes over folders that vanish while it looks, which Path.rglob doesn't.
        for folder, _, files in os.walk(self._storage):
            for file in set(files) - {BALLAST}:
                with suppress(OSError):
                    stored += os.stat(os.path.join(folder, file)).st_size
        self.disk.append(stored / 2**20)

    @property
    def goes_on(self) -> bool:
        """Whether it still looks."""
        return self._thread.is_alive()

    def end(self) -> None:
        """Look no longer."""
        assert self.goes_on, "the watch ended before what it watched"
        self._over.set()
        self._thread.join()

    def grown(self) -> list[str]:
        """The kinds of this project's processes that grew by more than they may, or of which none lived long enough to
        tell: what the median life of them gained in memory and open files."""
        found = []
        for kind in self.OURS:
            lives = [life for role, all_of in self._lives.items() if kind in role for life in all_of.values()]
            long = [life for life in lives if life.seconds >= self.LONG]
            if not long:
                found.append(f"{kind}: none of {len(lives)} lived for {self.LONG + self.WARM_UP:g} seconds")
                continue
            memory = median(life.growth for life in long)
            files = median(last - first for first, last in (life.ends(2) for life in long))
            if memory > self.FLAT or files > self.MORE_FILES:
                found.append(f"{kind}, {len(long)} lives: memory {memory:+.1%}, open files {files:+g}")
        return found

    def table(self) -> str:
        """Of each kind of process the longest life and the one that grew most of those that lived long enough."""
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


def role(process: psutil.Process) -> str:
    """What a process is: its title, its program, or the module that Python runs."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        # The title of an actor changes with what it is at.
        return words[0].split(".")[0][:40]
    if "python" not in Path(words[0]).name:
        return Path(words[0]).name[:40]
    return " ".join(words[1:3])[-40:]
