"""``python -m tests.faults``: faults at random moments, for as long as one likes; what was lost, what memory did."""

import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from metamixer_ray.folder import RunFolder, checkpoint_names
from tests.e2e import tiny
from tests.e2e.own_parts import REST
from tests.faults.disk import Disk, Unmountable, mounted
from tests.faults.injecting import FAULTS, Stage, stage_on, training, two_nodes
from tests.faults.watch import Watch

DISK_MEGABYTES = 256
# Ray remembers up to 100,000 tasks, actors and workers that are over, which two hours don't fill: memory would grow all
# the while, and hide what grows for ever.
REMEMBERED = {
    "RAY_task_events_max_num_task_in_gcs": "1000",
    "RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs": "1000",
    "RAY_maximum_gcs_destroyed_actor_cached_count": "100",
    "RAY_maximum_gcs_dead_worker_cached_count": "100",
    "RAY_maximum_gcs_dead_node_cached_count": "10",
}


@dataclass(frozen=True, kw_only=True)
class Soak:
    """Disturb trainings of two tiny peers, one after the other, and compare each with one that nothing happened to.

    Their runs are on a small disk of their own, which is filled and protected, too, where one may be mounted.
    """

    minutes: float = 20.0
    """How long; the training that is under way is ended."""
    epochs: int = 200
    """Of each training."""
    every: float = 30.0
    """Mean seconds from when workers are there to the next fault."""
    seed: int = 0
    """Decides which faults come, and when."""
    rest: float = 0.0
    """Seconds for which each training step rests, so that the machine can do something else beside."""
    kinds: tuple[str, ...] = tuple(FAULTS)
    """Which faults come; a part of a name is enough."""

    def chosen(self) -> list[str]:
        """The whole names of ``kinds``."""
        return [name for name in FAULTS if any(kind in name for kind in self.kinds)]


def disturb(stage: Stage, options: Soak) -> Counter[str]:
    """Run a training to its end with faults in between; how many of each kind were injected."""
    kinds, done = options.chosen(), Counter[str]()
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
            if FAULTS[kind](stage):
                done[kind] += 1
            else:
                print("           too late: whom it was for had just gone", flush=True)
    assert stage.reap() == 0, stage.told
    return done


def soak(cluster: Any, disk: Disk, options: Soak) -> None:
    """Disturb one training after another until time is up; each must end as the one before all of them did."""
    changed: dict[str, Any] = {"epochs": options.epochs}
    if options.rest:
        changed["peers"] = ["tests.e2e.own_parts:leisurely"] * 2
    storage = disk.place.parent
    calm = stage_on(cluster, disk, "calm", options.seed, **changed)
    calm.run()
    assert calm.reap(timeout=None) == 0, calm.told
    injected: Counter[str] = Counter()
    rounds, began = 0, time.monotonic()
    try:
        while time.monotonic() < began + 60 * options.minutes:
            print(f"training {rounds}", flush=True)
            stage = stage_on(cluster, disk, f"round{rounds}", options.seed + rounds, **changed)
            injected += disturb(stage, options)
            tiny.assert_equal_runs(calm.folder, stage.folder, epochs=options.epochs)
            assert tiny.tracked_epochs(storage, stage.folder.name) == tiny.tracked_epochs(storage, calm.folder.name)
            assert len(checkpoint_names(RunFolder(str(stage.folder)))) <= tiny.config(storage).run.keep_checkpoints
            rounds += 1
    finally:
        for kind, count in injected.most_common():
            print(f"{count:>4}  {kind}")
        print(f"{injected.total()} faults; trainings of {options.epochs} epochs that ended with equal bits: {rounds}")


def main() -> int:
    options = tyro.cli(Soak, prog="python -m tests.faults")
    storage = Path(tempfile.mkdtemp(prefix="metamixer_ray-faults-"))
    os.environ.setdefault("METAMIXER_HOME", str(storage / "home"))
    os.environ.setdefault("METAMIXER_CACHE", str(storage / "cache"))
    os.environ[REST] = str(options.rest)
    os.environ.update(REMEMBERED)
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(mounted(storage / "runs", DISK_MEGABYTES))
        except Unmountable as error:
            print(f"without the faults of disks, since none can be mounted here: {error}")
            disk = Disk(storage / "runs")
            options = replace(options, kinds=tuple(kind for kind in options.chosen() if "disk" not in kind))
        cluster = stack.enter_context(two_nodes())
        watch = Watch(storage)
        try:
            soak(cluster, disk, options)
        finally:
            # Also of a soak that found something.
            watch.end()
            print(watch.table())
    for kind in (grown := watch.grown()):
        print(f"not flat, or not known to be: {kind}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
