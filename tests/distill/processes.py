"""Real process groups for tests: gloo on this machine, one thread per rank, results handed back through
files."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

_TIMEOUT = datetime.timedelta(seconds=60)


def run_ranks(work: Callable[[int], Any], world: int, directory: Path) -> list[Any]:
    """Run ``work(rank)`` in ``world`` processes that share a gloo group; what each returned, by rank.

    ``work`` must be a module's function. An exception in a rank is raised here with its traceback.
    """
    # A fork server imports torch once for all ranks, and forks before any thread runs.
    torch.multiprocessing.set_forkserver_preload(["torch", "metamixer_ray.distill"])
    torch.multiprocessing.start_processes(_rank, args=(work, world, directory), nprocs=world, start_method="forkserver")
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, work: Callable[[int], Any], world: int, directory: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    result = work(rank)
    torch.save(result, directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
