"""Processes that stay: each job gets a fresh gloo group of as many ranks as it asks for.

Importing torch takes longer than most of these trainings, so the processes are started once for all tests.
"""

import datetime
import io
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=120)


class RankFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


class Pool:
    """Runs ``work(*args)`` on ranks of a gloo group and hands back what each rank returned."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        # One import for all ranks; they are forked from there before any thread runs.
        self._context.set_forkserver_preload(["tests.spine.training"])
        self._ranks: list[tuple[Any, Connection]] = []
        self._stores = tempfile.TemporaryDirectory(prefix="metamixer_ray-test-")
        self._jobs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._stores.cleanup()

    def run(self, world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``work(*args)`` returned on each of ``world`` ranks; ``work`` must be a module's function."""
        while len(self._ranks) < world:
            here, there = self._context.Pipe()
            # Not daemonic: loader processes are children of a rank.
            process = self._context.Process(target=_serve, args=(there,), daemon=False)
            process.start()
            there.close()
            self._ranks.append((process, here))
        self._jobs += 1
        store = Path(self._stores.name) / f"job{self._jobs}"
        for rank in range(world):
            self._ranks[rank][1].send((work, args, rank, world, store))
        failures, results = [], []
        for rank in range(world):
            try:
                good, content = self._ranks[rank][1].recv()
            except EOFError:
                good, content = False, "the process died"
            if good:
                results.append(torch.load(io.BytesIO(content), weights_only=False))
            else:
                failures.append(f"rank {rank}: {content}")
        if failures:
            self._end()
            raise RankFailed("\n".join(failures))
        return results

    def _end(self) -> None:
        for _, connection in self._ranks:
            connection.close()
        for process, _ in self._ranks:
            process.join(10)
            if process.is_alive():
                process.terminate()
        self._ranks.clear()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            work, args, rank, world, store = connection.recv()
        except EOFError:
            return
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
            buffer = io.BytesIO()
            torch.save(work(*args), buffer)
            dist.barrier()
            connection.send((True, buffer.getvalue()))
        except Exception:
            connection.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
