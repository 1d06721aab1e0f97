"""A worker's side of Ray Train: who it is, where it starts from, whom it tells."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from metamixer_ray import departure
from metamixer_ray.allocation import keep_freed_memory
from metamixer_ray.checkpoint import peer_files
from metamixer_ray.config import from_settings
from metamixer_ray.flags import Diverged
from metamixer_ray.folder import RunFolder, checkpoint_names
from metamixer_ray.mesh import Host, build_mesh, gather_json, seats
from metamixer_ray.patience import insist
from metamixer_ray.placement import selectors
from metamixer_ray.runs import METRICS
from metamixer_ray.ticker import Ticker
from metamixer_ray.troubles import Troubles
from metamixer_ray.uploads import UNWRITTEN, Upload, Uploads
from metamixer_ray.worker import WriteCheckpoint, train_peer

T = TypeVar("T")

FAREWELL_SECONDS = 30.0
"""For how long a training that is given up waits for its last checkpoint."""


@dataclass(frozen=True)
class Storage:
    """How long it may fail (seconds), and who hears of it."""

    patience: float
    trouble: Callable[[str], None]

    def read(self, work: Callable[[], T], what: str) -> T:
        """What ``work`` returns, once storage gives it.

        Raises:
            StorageFailed: patience is over.
        """
        return insist(work, f"{what} can't be read", self.patience, self.trouble)


class RaySession:
    """The :class:`~metamixer_ray.worker.Session` of a Ray Train worker.

    Args:
        folder: the run's.
        ticker: where the first worker notes its steps.
        storage: how long it may fail, and who hears of it.
    """

    def __init__(self, folder: RunFolder, ticker: Ticker, storage: "Storage") -> None:
        self._folder, self._storage = folder, storage
        self._uploads = Uploads(str(folder), storage.patience, storage.trouble)
        self._fetched, self._scratch = ExitStack(), ""
        self._ticker = ticker if dist.get_rank() == 0 else None
        self._courier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="courier")
        self._under_way: Future[None] | None = None

    def persist(self, work: Callable[[], T], what: str) -> T:
        return self._storage.read(work, what)

    def checkpoints(self) -> list[str]:
        return self._read(lambda: checkpoint_names(self._folder))

    def recorded(self) -> int:
        # The controller may be writing to it, so it is only looked at.
        return self._read(lambda: self._folder.read(METRICS) or b"").count(b"\n")

    def fetch(self, name: str, peers: Sequence[int]) -> Path:
        wanted = [file for peer in peers for file in peer_files(peer)]
        if self._folder.local is not None:
            return self._folder.local / name
        if not self._scratch:
            self._scratch = self._fetched.enter_context(tempfile.TemporaryDirectory(prefix="metamixer_ray-"))
        return self._folder.fetch(name, Path(self._scratch) / name, wanted)

    def _read(self, work: Callable[[], T]) -> T:
        return self._storage.read(work, f"checkpoints in {self._folder}")

    def report(self, metrics: dict[str, Any], write: WriteCheckpoint | None, name: str | None) -> None:
        # What was fetched has long been read. Most workers are killed, and would leave it behind.
        self._fetched.close()
        self._scratch = ""
        # Training goes on while files are written and uploaded; a storage slower than the checkpoints come holds
        # it up here, rather than let them pile up in memory. One that fails doesn't.
        upload = self._uploads.begin()
        if self._under_way is not None and self._under_way.done():
            self._under_way.result()
        told = {**metrics, "checkpoint": name, "leaving": departure.due()}
        self._under_way = self._courier.submit(self._deliver, upload, told, write, self._under_way)

    def stepped(self, epoch: int, step: int, steps: int) -> None:
        if self._ticker is not None:
            self._ticker.note(epoch, step, steps)

    def told_to_stop(self) -> bool:
        return departure.due() or (self._ticker is not None and self._ticker.stopping)

    def finish(self, seconds: float | None = None) -> None:
        """Wait until what was reported last is where it belongs, so many seconds at most.

        Raises:
            TimeoutError: it isn't by then.
        """
        if self._under_way is not None:
            self._under_way.result(seconds)

    def _deliver(
        self, upload: Upload, metrics: dict[str, Any], write: WriteCheckpoint | None, before: Future[None] | None
    ) -> None:
        if before is not None and (ended := before.exception()) is not None:
            # All ranks report equally often, or the run is over.
            upload.settled.set()
            raise ended
        name = metrics["checkpoint"]
        if not self._uploads.carry_out(
            upload, lambda: None if write is None or name is None else self._folder.fill(name, write)
        ):
            metrics[UNWRITTEN] = True
        # Only when all ranks' files are there do all ranks' reports become one, see EpochReporter.
        ray.train.report(metrics)


def ray_worker(settings: Mapping[str, Any]) -> None:
    """The function that Ray Train runs on every worker.

    Args:
        settings: ``config``, ``threads``, the run's ``folder`` and ``key``, and the fingerprint of its ``images``.
    """
    config = from_settings(settings["config"])
    torch.set_num_threads(settings["threads"])
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        keep_freed_memory()
    wanted = selectors(config.placement.peer_labels)
    hosts = [Host("")] * dist.get_world_size()
    if any(wanted) or config.placement.replicas > 1:
        here = ray.get_runtime_context()
        hosts = [Host(*told) for told in gather_json([here.get_node_id(), dict(here.get_node_labels())])]
    seating = seats(wanted, len(config.peers), config.placement.replicas, hosts)
    mesh = build_mesh(len(config.peers), config.placement.replicas, device, seating)
    key = settings["key"]
    storage = Storage(config.run.storage_patience, partial(Troubles(key).say, "checkpoints"))
    folder = storage.read(lambda: RunFolder.again(settings["folder"]), "the run's folder")
    session = RaySession(folder, Ticker(key), storage)
    try:
        train_peer(config, mesh, device, session, settings["images"])
    except Diverged:
        # What is still being written must be there when the controller looks for what to go back to.
        with suppress(Exception):
            session.finish(FAREWELL_SECONDS)
        raise
    session.finish()
