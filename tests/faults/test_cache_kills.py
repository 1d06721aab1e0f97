"""Processes that prepare one cache at once and are killed at random moments: the next one gets the same images."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from metamixer_ray.data import DataConfig, load_splits
from metamixer_ray.data.loader import eval_batches
from tests.data.drawing import encoded, picture, write_parquet

FORK = multiprocessing.get_context("fork")
# More kills, at other moments: METAMIXER_FAULTS=500 pytest tests/faults
KILLS = int(os.environ.get("METAMIXER_FAULTS", "10"))
ROWS = 900


def content(config: DataConfig) -> tuple[str, int]:
    """Fingerprint, and the sum of all pixels of both splits."""
    splits = load_splits(config)
    batches = (
        b for part in (splits.train, splits.test) for b in eval_batches(part, batch_size=300, replica=0, replicas=1)
    )
    return splits.fingerprint, sum(int(batch.images.sum()) for batch in batches)


def check_content(config: DataConfig, expected: tuple[str, int]) -> None:
    assert content(config) == expected


@pytest.mark.parametrize("streaming", ["no", "yes"])
@pytest.mark.timeout(0)
def test_kills_at_random_moments(tmp_path: Path, streaming: Any, record_property: Any) -> None:
    images = [encoded(picture(number, 64)) for number in range(30)]
    folder = tmp_path / "set"
    write_parquet(folder / "train.parquet", images * (ROWS // 30), [i % 3 for i in range(ROWS)], row_group=100)
    write_parquet(folder / "test.parquet", images, [i % 3 for i in range(30)])

    def configured(name: str) -> DataConfig:
        return DataConfig(data=str(folder), image_size=16, streaming=streaming, cache_dir=str(tmp_path / name))

    dice = random.Random(11)
    whole = content(configured("undisturbed"))
    # The first one of a process also imports.
    began = time.monotonic()
    assert content(configured("again")) == whole
    duration = time.monotonic() - began
    halved = 0
    for kill in range(KILLS):
        cache = tmp_path / f"cache{kill}"
        racers = [FORK.Process(target=check_content, args=(configured(cache.name), whole)) for _ in range(2)]
        for racer in racers:
            racer.start()
        time.sleep(dice.uniform(0, 1.5 * duration))
        # One of them, or both: the one that decodes, or the one that waits for it.
        for victim in dice.choice([racers, racers[:1], racers[1:]]):
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            halved += any(cache.rglob(f".t*.{victim.pid}.*"))
        for racer in racers:
            racer.join()
            assert racer.exitcode in (0, -signal.SIGKILL)
        assert content(configured(cache.name)) == whole
        assert list(cache.rglob(".t*")) == [], "what was left half-written is gone"
    record_property("left half-written", halved)
    # The index of a streamed set is too small a file to be met half-written.
    assert halved > 0 or KILLS < 10 or streaming == "yes"


def test_the_decoders_of_a_killed_process_end(tmp_path: Path) -> None:
    image = encoded(picture(0, 128), "JPEG")
    folder = tmp_path / "set"
    write_parquet(folder / "train.parquet", [image] * 4000, [i % 3 for i in range(4000)], row_group=500)
    write_parquet(folder / "test.parquet", [image] * 3, [0, 1, 2])
    config = DataConfig(data=str(folder), image_size=16, cache_dir=str(tmp_path / "cache"))
    # Not forked: it has processes of its own.
    victim = multiprocessing.get_context("spawn").Process(target=load_splits, args=(config,), kwargs={"processes": 2})
    victim.start()
    process = psutil.Process(victim.pid)
    while not [path for path in (tmp_path / "cache").rglob(".train.*.raw") if path.stat().st_size]:
        assert victim.is_alive()
        time.sleep(0.01)
    helpers = process.children(recursive=True)
    assert helpers
    process.kill()
    victim.join()
    _, alive = psutil.wait_procs(helpers, timeout=60)
    assert not alive, "they outlive the process that they decode for"
