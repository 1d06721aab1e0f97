"""A worker's side of Ray Train: who it is, where it starts from, whom it tells."""

import tempfile
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import CheckpointUploadMode

from metamixer_ray.allocation import keep_freed_memory
from metamixer_ray.config import from_settings
from metamixer_ray.folder import RunFolder
from metamixer_ray.mesh import Host, build_mesh, seats
from metamixer_ray.placement import selectors
from metamixer_ray.ticker import Ticker
from metamixer_ray.worker import WriteCheckpoint, train_peer


class RaySession:
    """The :class:`~metamixer_ray.worker.Session` of a Ray Train worker.

    Args:
        folder: the run's.
        start: name of a checkpoint in it to start from while Ray Train knows of none.
        ticker: where the first worker notes its steps.
    """

    def __init__(self, folder: RunFolder, start: str | None, ticker: Ticker) -> None:
        self._folder, self._start = folder, start
        self._scratch = tempfile.TemporaryDirectory(prefix="metamixer_ray-")
        self._storage = ray.train.get_context().get_storage()
        self._written = threading.Event()
        self._written.set()
        self._ticker = ticker if dist.get_rank() == 0 else None

    def start_from(self) -> Path | None:
        checkpoint, target = ray.train.get_checkpoint(), Path(self._scratch.name) / "start"
        if checkpoint is not None:
            return Path(checkpoint.to_directory(str(target)))
        return None if self._start is None else self._folder.fetch(self._start, target)

    def report(self, metrics: dict[str, Any], write: WriteCheckpoint | None, name: str | None) -> None:
        if write is None:
            ray.train.report(metrics, checkpoint_dir_name=name, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        # Training goes on while files are written and uploaded; a storage slower than the checkpoints come holds
        # it up here, rather than let them pile up in memory.
        self.finish()
        folder = Path(tempfile.mkdtemp(dir=self._scratch.name))
        self._written.clear()
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=partial(self._upload, write),
        )

    def stepped(self, epoch: int, step: int, steps: int) -> None:
        if self._ticker is not None:
            self._ticker.note(epoch, step, steps)

    def told_to_stop(self) -> bool:
        return self._ticker is not None and self._ticker.stopping

    def finish(self) -> None:
        """Wait until the last checkpoint is where it belongs."""
        self._written.wait()

    def _upload(self, write: WriteCheckpoint, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        try:
            write(Path(checkpoint.path))
            return self._storage.persist_current_checkpoint(checkpoint, name)
        finally:
            self._written.set()


def ray_worker(settings: Mapping[str, Any]) -> None:
    """The function that Ray Train runs on every worker.

    Args:
        settings: ``config``, ``threads``, the run's ``folder`` and ``key``, the checkpoint to ``start`` from or None.
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
        dist.all_gather_object(hosts, Host(here.get_node_id(), dict(here.get_node_labels())))
    seating = seats(wanted, len(config.peers), config.placement.replicas, hosts)
    mesh = build_mesh(len(config.peers), config.placement.replicas, device, seating)
    session = RaySession(RunFolder(settings["folder"]), settings["start"], Ticker(settings["key"]))
    train_peer(config, mesh, device, session)
    session.finish()
