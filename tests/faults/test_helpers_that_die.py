"""Processes that prepare images: one that is killed is noticed, and none outlives the process that it works for."""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from metamixer_ray.data import Batch, BatchOrder, DataConfig, helpers, load_splits, train_batches
from metamixer_ray.data.helpers import helped
from metamixer_ray.errors import ProcessKilled, UserError
from tests.data.drawing import drawn_set
from tests.e2e.waiting import wait_for

EXAMPLES = int(os.environ.get("FAULTS_EXAMPLES", "1"))
"""How often each kill is repeated; where in its work it meets a process is chance."""


def config_of(folder: Path, streaming: str) -> DataConfig:
    return DataConfig(
        data=str(folder / "set"),
        streaming=streaming,  # type: ignore[arg-type]
        image_size=8,
        stream_window=64,
        loader_processes=2,
        cache_dir=str(folder / "cache"),
    )


def batches(config: DataConfig, first: int = 0) -> Iterator[Batch]:
    images = load_splits(config).train
    order = BatchOrder(images.labels, batch_size=4, replicas=1, quadruples=False, seed=1, layout=images.layout)
    return train_batches(images, order, config, seed=1, epoch=0, replica=0, first_step=first)


def in_a_thread(work: Callable[[], object]) -> None:
    """As a Ray Train worker runs its function."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it hangs"
    if raised:
        raise raised[0]


@pytest.mark.parametrize("streaming", ["no", "yes"])
@pytest.mark.parametrize("victims", [1, 2])
@pytest.mark.parametrize("attempt", range(EXAMPLES))
def test_a_killed_loader_process_is_noticed_and_training_can_go_on(
    tmp_path: Path, streaming: str, victims: int, attempt: int
) -> None:
    drawn_set(tmp_path / "set", train=120)
    config = config_of(tmp_path, streaming)
    whole = list(batches(config))
    before = set(multiprocessing.active_children())
    seen: list[Batch] = []

    def train() -> None:
        coming = batches(config)
        seen.append(next(coming))
        for child in list(set(multiprocessing.active_children()) - before)[:victims]:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        seen.extend(coming)

    with pytest.raises(ProcessKilled, match=r"a loader process was killed.*--loader-processes") as raised:
        in_a_thread(train)
    assert not isinstance(raised.value, UserError), "of which a restarted worker would be told the same again"
    assert wait_for(lambda: set(multiprocessing.active_children()) == before, 30)
    rest = list(batches(config, first=len(seen)))
    assert [batch.step for batch in [*seen, *rest]] == list(range(len(whole)))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole, [*seen, *rest], strict=True))


MEGABYTES = 20
"""Of a result: far more than a pipe holds, so that a process could be killed after half of it."""


def large(job: int) -> tuple[int, NDArray[np.uint8], bytes]:
    return job, np.full(MEGABYTES << 19, job % 251, np.uint8), bytes(MEGABYTES << 19)


@pytest.mark.parametrize("attempt", range(10 * EXAMPLES))
def test_a_helper_killed_while_it_sends_a_large_result_is_noticed(attempt: int) -> None:
    dice = random.Random(attempt)
    before = set(multiprocessing.active_children())
    done: list[int] = []

    def consume() -> None:
        coming = helped(large, itertools.count(), processes=2, each=3, who="a process", remedy="go on")
        for (job, array, _), due in zip(coming, itertools.count(), strict=False):
            assert (job, int(array[0]), int(array[-1])) == (due, due % 251, due % 251)
            done.append(job)

    def kill() -> None:
        assert wait_for(lambda: bool(done), 30)
        time.sleep(dice.uniform(0, 0.1))
        dice.choice(list(set(multiprocessing.active_children()) - before)).kill()

    murderer = threading.Thread(target=kill)
    murderer.start()
    with pytest.raises(ProcessKilled, match=r"^a process was killed, most likely .* \(process \d+\); go on"):
        in_a_thread(consume)
    murderer.join()
    assert set(multiprocessing.active_children()) == before


def ends_itself(job: int) -> int:
    if job == 1:
        time.sleep(3600)
    if job == 2:
        os._exit(3)
    if job == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return job


def stops_itself(job: int) -> int:
    if job == 0:
        time.sleep(1.2)
    else:
        os.kill(os.getpid(), signal.SIGSTOP)
    return job


def test_a_death_is_noticed_while_another_one_is_waited_for() -> None:
    coming = helped(ends_itself, [0, 1, 2], processes=2, each=2, who="a process", remedy="go on")
    assert next(coming) == 0
    with pytest.raises(ProcessKilled, match=r"^a process ended in the midst of its work \(.*exit code 3\).*; go on"):
        next(coming)


def test_one_that_was_stopped_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "SILENCE", 0.5)
    coming = helped(stops_itself, [0, 1], processes=1, each=2, who="a process", remedy="go on")
    # What only takes long is waited for.
    assert next(coming) == 0
    with pytest.raises(ProcessKilled, match=r"^a process was stopped, and has not gone on for 0.5 seconds .*; go on"):
        next(coming)


def test_a_signal_is_named_and_is_the_helpers_own() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(ProcessKilled, match=r"^a process was ended by SIGTERM \("):
            list(helped(ends_itself, [4], processes=1, each=1, who="a process", remedy="go on"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not heard


LOADING = """
from pathlib import Path
from tests.faults.test_helpers_that_die import batches, config_of
coming = batches(config_of(Path({folder!r}), {streaming!r}))
next(coming)
"""
DECODING = """
from metamixer_ray.data import decoding
from metamixer_ray.data.sources.base import Chunk
from tests.data.drawing import encoded, picture
decoding.HELPED_FROM_ROWS = 0
chunks = (Chunk([encoded(picture(0))] * 128, [0] * 128, [""] * 128) for _ in range(10_000))
stream = decoding.decode_all(chunks, size=8, rows=1_280_000, processes=2)
next(stream)
"""


LONG = """
import os, time
from metamixer_ray.data.helpers import helped
def work(job):
    time.sleep(job)
coming = helped(work, (3600 * (job > 0) for job in range(100)), processes=2, each=2, who="a process", remedy="go on")
next(coming)
if os.fork() == 0:  # it holds all that its parent had open
    os.close(1)
    time.sleep(3600)
"""


@pytest.mark.parametrize("work", ["loading, no", "loading, yes", "decoding", "a long job"])
def test_helpers_end_with_the_process_that_they_work_for(tmp_path: Path, work: str) -> None:
    drawn_set(tmp_path / "set", train=400)
    scripts = {"decoding": DECODING, "a long job": LONG}
    script = scripts.get(work) or LOADING.format(folder=str(tmp_path), streaming=work.split()[1])
    code = f"{script}\nprint('ready', flush=True)\nimport time\ntime.sleep(600)\n"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "ready\n"
            children = psutil.Process(parent.pid).children(recursive=True)
        finally:
            parent.kill()
    helpers, others = children[:2], children[2:]
    assert len(others) == (1 if work == "a long job" else 0)
    gone, alive = psutil.wait_procs(helpers, timeout=60)
    for process in (*alive, *others):
        process.kill()
    assert not alive
    assert len(gone) == 2
