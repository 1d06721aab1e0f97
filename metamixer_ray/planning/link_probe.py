"""How fast two workers on this machine talk: all-reduces of several sizes between two processes over gloo."""

import datetime
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from metamixer_ray.errors import ConfigError
from metamixer_ray.planning.collectives import Link

SIZES = (64, 16 * 2**10, 128 * 2**10, 2**20, 4 * 2**20)
"""Bytes of the messages that are timed."""
ROUNDS, WARM_UP = 25, 5
_MEMBERS = 2
_TIMEOUT = datetime.timedelta(seconds=120)


def measure_link() -> Link:
    """The link between two processes of this machine.

    Raises:
        ConfigError: they can't talk to each other; names the options that do without.
    """
    multiprocessing.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory(prefix="metamixer_ray-") as scratch:
        try:
            # A fork server imports torch once for both.
            start_processes(_time_all_reduces, args=(scratch,), nprocs=_MEMBERS, start_method="forkserver")
        except (ProcessExitedException, ProcessRaisedException) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(
                f"two processes of this machine can't talk over gloo ({reason}); "
                "give --bandwidth and --latency of your network instead"
            ) from error
        seconds = json.loads((Path(scratch) / "seconds.json").read_text())
    return fit_link({int(size): value for size, value in seconds.items()}, members=_MEMBERS)


def fit_link(seconds: Mapping[int, float], *, members: int) -> Link:
    """The link that explains all-reduces over ``members`` workers best: bytes of the message -> seconds.

    Least squares of the *relative* error of ``2 (P-1) latency + 2 (P-1) / P bytes / bandwidth``, so that short
    messages count as much as long ones. A fit that would make either part negative gives it its bound instead: the
    shortest time for the latency, the longest message for the bandwidth.
    """
    hops, share = 2 * (members - 1), 2 * (members - 1) / members
    sizes, times = np.array(list(seconds), dtype=float), np.array(list(seconds.values()))
    design = np.stack([hops / times, share * sizes / times], axis=1)
    latency, per_byte = np.linalg.lstsq(design, np.ones(len(times)), rcond=None)[0]
    if latency <= 0:
        latency = times.min() / hops / 2
    if per_byte <= 0:
        longest = sizes.argmax()
        per_byte = times[longest] / (share * sizes[longest])
    return Link(bandwidth=float(1 / per_byte), latency=float(latency))


def _time_all_reduces(rank: int, scratch: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{scratch}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=_MEMBERS, timeout=_TIMEOUT)
    start, buffers = torch.zeros(1), {size: torch.zeros(size // 4) for size in SIZES}
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    for turn in range(WARM_UP + ROUNDS):
        for size, buffer in buffers.items():
            # Both begin together: what one waits for the other is no part of the link.
            dist.all_reduce(start)
            began = time.perf_counter()
            dist.all_reduce(buffer)
            if turn >= WARM_UP:
                seconds[size].append(time.perf_counter() - began)
    if rank == 0:
        # The lower quartile: what else the machine does is no part of the link.
        typical = {size: statistics.quantiles(values)[0] for size, values in seconds.items()}
        (Path(scratch) / "seconds.json").write_text(json.dumps(typical))
    dist.barrier()
    dist.destroy_process_group()
