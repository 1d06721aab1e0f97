"""Groups of processes that stay: one actor per rank, all on one gloo group, each with its own threads.

A group idles while another one is measured, so blocks of two things can take turns in one run.
"""

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=300)


class RankFailed(RuntimeError):
    """A rank raised; the message holds its traceback."""


class Group:
    """``world`` processes, each with an actor ``make(*arguments, **named)``; all ranks call a method at the same time.

    Args:
        make: a module's function or class; the process group is there when it is called.
        threads: what each rank computes with; None leaves it to torch.
    """

    def __init__(
        self, world: int, make: Callable[..., Any], *arguments: Any, threads: int | None = 1, **named: Any
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        # One import for all ranks, which are forked from there before any thread runs.
        context.set_forkserver_preload(["metamixer_ray.worker"])
        self._store = tempfile.TemporaryDirectory(prefix="metamixer_ray-bench-")
        self._ranks: list[tuple[Any, Connection]] = []
        for rank in range(world):
            here, there = context.Pipe()
            seat = (rank, world, Path(self._store.name) / "store", threads)
            # Not daemonic: loader processes are children of a rank.
            process = context.Process(
                target=_serve, args=(there, seat, partial(make, *arguments, **named)), daemon=False
            )
            process.start()
            there.close()
            self._ranks.append((process, here))
        self._gather()

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """What the method returned, by rank.

        Raises:
            RankFailed: with the tracebacks of the ranks that raised.
        """
        for _, connection in self._ranks:
            connection.send((method, arguments))
        return self._gather()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _gather(self) -> list[Any]:
        results: list[Any] = []
        failures: list[str] = []
        for rank, (_, connection) in enumerate(self._ranks):
            try:
                good, content = connection.recv()
            except EOFError:
                good, content = False, "the process died"
            (results if good else failures).append(content if good else f"rank {rank}: {content}")
        if failures:
            self._end()
            raise RankFailed("\n".join(failures))
        return results

    def _end(self) -> None:
        for _, connection in self._ranks:
            connection.close()
        for process, _ in self._ranks:
            process.join(20)
            if process.is_alive():
                process.terminate()
        self._ranks.clear()
        self._store.cleanup()


def _serve(
    connection: Connection,
    seat: tuple[int, int, Path, int | None],
    make: Callable[[], Any],
) -> None:
    rank, world, store, threads = seat
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
        actor = make()
        connection.send((True, None))
        while True:
            method, given = connection.recv()
            connection.send((True, getattr(actor, method)(*given)))
    except EOFError:
        pass
    except Exception:
        connection.send((False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def threads_each(world: int) -> int:
    """An even share of this machine's cores, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // world)
