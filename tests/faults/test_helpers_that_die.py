"""Processes that prepare images: one that is killed is noticed, and none outlives the process that it works for."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from metamixer_ray.data import Batch, BatchOrder, DataConfig, load_splits, train_batches
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


@pytest.fixture
def _unsignalled() -> Iterator[None]:
    """torch tells a main thread of the deaths of loader processes by a signal, once it ever had one."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("_unsignalled")
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
decoding.POOL_FROM_ROWS = 0
chunks = (Chunk([encoded(picture(0))] * 128, [0] * 128, [""] * 128) for _ in range(10_000))
stream = decoding.decode_all(chunks, size=8, rows=1_280_000, processes=2)
next(stream)
"""


@pytest.mark.parametrize("work", ["loading, no", "loading, yes", "decoding"])
def test_helpers_end_with_the_process_that_they_work_for(tmp_path: Path, work: str) -> None:
    drawn_set(tmp_path / "set", train=400)
    script = DECODING if work == "decoding" else LOADING.format(folder=str(tmp_path), streaming=work.split()[1])
    code = f"{script}\nprint('ready', flush=True)\nimport time\ntime.sleep(600)\n"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "ready\n"
            helpers = psutil.Process(parent.pid).children(recursive=True)
            assert len(helpers) == 2
        finally:
            parent.kill()
    gone, alive = psutil.wait_procs(helpers, timeout=60)
    for process in alive:
        process.kill()
    assert not alive
    assert len(gone) == 2
