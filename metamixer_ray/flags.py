"""What all ranks must see alike at a step: the flags that rode along with the exchange, and when to give up."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from metamixer_ray.distill import ControlSum
from metamixer_ray.mesh import PeerMesh

MAX_SKIPPED_IN_A_ROW = 20


class Diverged(FloatingPointError):
    """Training can't go on: values stay non-finite."""


def share_flags(control: ControlSum, mesh: PeerMesh, device: torch.device) -> ControlSum:
    """The flags of all peers over all replicas too, so that replicas of one peer act alike."""
    if control.culprit is not None:
        control = replace(control, culprit=mesh.peers_by_rank[control.culprit] if control.peers > 1 else mesh.peer)
    if mesh.replica_group is None:
        return control
    culprit = -1 if control.culprit is None else control.culprit
    flags = torch.tensor([control.nonfinite, culprit, control.wish_checkpoint, control.wish_stop], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=mesh.replica_group)
    nonfinite, culprit, wish_checkpoint, wish_stop = (int(flag) for flag in flags.tolist())
    return replace(
        control,
        nonfinite=nonfinite,
        culprit=None if culprit < 0 else culprit,
        wish_checkpoint=wish_checkpoint,
        wish_stop=wish_stop,
    )


def diverged(steps: int, culprit: int | None, peers: Sequence[str]) -> Diverged:
    """The error after ``steps`` non-finite steps in a row."""
    who = "several peers" if culprit is None else f"peer {culprit} ({peers[culprit]})"
    return Diverged(
        f"{steps} steps in a row had non-finite values in {who}; "
        "lower --lr or --kd-weight, or give --lr-warmup-epochs or --kd-warmup-epochs"
    )
