"""Running sums of an epoch's metrics, kept on the device and read once; and its seconds."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class Meters:
    """Sums of named scalars with their counts; adding never waits for the device. What isn't finite counts for nothing,
    as nothing is learnt from it, nor does what comes together with it."""

    def __init__(self, sums: dict[str, float] | None = None) -> None:
        self._before = dict(sums or {})
        # One sum per set of names that come together, so that a step adds a handful of numbers at once; their common
        # count is the last of them.
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Count one value of each name: scalars, all on one device. A name always comes with the same others."""
        names = tuple(values)
        amounts = torch.stack([value.detach().double() for value in values.values()])
        if names not in self._sums:
            before = [self._before.pop(name, 0.0) for name in names]
            count = max([self._before.pop(f"{name}/count", 0.0) for name in names])
            self._sums[names] = torch.tensor([*before, count], dtype=torch.float64, device=amounts.device)
        self._sums[names] += torch.where(amounts.isfinite().all(), F.pad(amounts, (0, 1), value=1.0), 0.0)

    def sums(self) -> dict[str, float]:
        """All sums and counts as numbers, from which ``Meters(sums)`` goes on."""
        totals = dict(self._before)
        for names, sums in self._sums.items():
            *amounts, count = sums.tolist()
            totals |= dict(zip(names, amounts, strict=True))
            totals |= {f"{name}/count": count for name in names}
        return totals

    def shared(self, group: dist.ProcessGroup | None, device: torch.device) -> dict[str, float]:
        """Like :meth:`sums`, but the mean over the ranks of ``group``: each can go on from it, and all together
        then have what all together had."""
        sums = self.sums()
        if group is None:
            return sums
        packed = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64, device=device)
        dist.all_reduce(packed, group=group)
        return dict(zip(sorted(sums), (packed / dist.get_world_size(group)).tolist(), strict=True))

    def means(self, group: dist.ProcessGroup | None, device: torch.device) -> dict[str, float]:
        """Mean of every name over all that was added, on all ranks of ``group`` (each adds the same names)."""
        sums = self.sums()
        names = sorted(sums)
        if group is not None:
            packed = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=device)
            dist.all_reduce(packed, group=group)
            sums = dict(zip(names, packed.tolist(), strict=True))
        return {n: sums[n] / sums[f"{n}/count"] for n in names if sums.get(f"{n}/count")}


def gather_stages(means: dict[str, float], name: str) -> dict[str, Any]:
    """``{"a/1": x, "a/2": y}`` as ``{"a": [x, y]}``; None when there is no stage."""
    stages = sorted((k for k in means if k.startswith(f"{name}/")), key=lambda k: int(k.rpartition("/")[2]))
    rest = {k: v for k, v in means.items() if k not in stages}
    return {**rest, name: [means[k] for k in stages] or None}


class Clock:
    """Seconds of the running epoch, those before a resume included, and seconds since the last checkpoint."""

    def __init__(self, already: float) -> None:
        self._already = already
        self._began = self._checkpoint = time.perf_counter()

    def seconds(self) -> float:
        """Of the epoch."""
        return self._already + self.since_start()

    def since_start(self) -> float:
        """Of the epoch in this process."""
        return time.perf_counter() - self._began

    def since_checkpoint(self) -> float:
        """Since the last checkpoint, or the start."""
        return time.perf_counter() - self._checkpoint

    def checkpointed(self) -> None:
        """A checkpoint was just taken."""
        self._checkpoint = time.perf_counter()
