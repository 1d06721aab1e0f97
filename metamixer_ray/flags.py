"""What all ranks must see alike: the images, the flags that rode along with a step's exchange, and when to give up."""

import datetime
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist

from metamixer_ray.distill import ControlSum
from metamixer_ray.errors import DataError
from metamixer_ray.mesh import PeerMesh, gather_json

MAX_SKIPPED_IN_A_ROW = 20
PREPARATION = datetime.timedelta(hours=6)


class Diverged(FloatingPointError):
    """Training can't go on: values stay non-finite.

    Attributes:
        learnt_steps: how many steps there were before those that were skipped. The last of them may be what spoilt the
            weights.
    """

    learnt_steps: int


def agree_on_images(fingerprint: str, world: int, expected: str | None = None) -> None:
    """Wait until all ranks have their images, and make sure that they are the same, and those that are ``expected``.

    A node that has to decode them may take longer than any collective of a training.

    Raises:
        DataError: on all ranks, when a rank holds other images.
    """
    everybody = [fingerprint]
    if world > 1:
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PREPARATION))
        everybody = gather_json(fingerprint, group)
        dist.destroy_process_group(group)
    if len(set(everybody)) > 1:
        ranks = [rank for rank, theirs in enumerate(everybody) if theirs != everybody[0]]
        raise DataError(
            f"the workers hold different images (rank {ranks[0]} and {len(ranks) - 1} more differ from rank 0): "
            "--data must give the same files on every node, and a function of your own the same images at every call"
        )
    if expected is not None and everybody[0] != expected:
        raise DataError(
            "--data: the workers hold other images than the training was started on: put back those that were there "
            "then, or choose another --name to train on those that are there now; a function of your own must give the "
            "same images at every call"
        )


def share_flags(control: ControlSum, mesh: PeerMesh, device: torch.device) -> ControlSum:
    """The flags of all peers over all replicas too, so that replicas of one peer act alike."""
    if control.culprit is not None:
        control = replace(control, culprit=mesh.peers_by_rank[control.culprit] if control.peers > 1 else mesh.peer)
    if mesh.replica_group is None:
        return control
    # A maximum of x and of -x gives the last and the first culprit, who are one where there is only one. Replicas whose
    # peers are all fine name nobody; several peers at once stand on both sides of all.
    last = first = -mesh.peers
    if control.nonfinite:
        last, first = (mesh.peers, 1) if control.culprit is None else (control.culprit, -control.culprit)
    flags = torch.tensor([control.nonfinite, last, first, control.wish_checkpoint, control.wish_stop], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=mesh.replica_group)
    nonfinite, last, first, wish_checkpoint, wish_stop = (int(flag) for flag in flags.tolist())
    return replace(
        control,
        nonfinite=nonfinite,
        culprit=last if nonfinite and last == -first else None,
        wish_checkpoint=wish_checkpoint,
        wish_stop=wish_stop,
    )


def diverged(steps: int, learnt_steps: int, culprit: int | None, peers: Sequence[str]) -> Diverged:
    """The error after ``steps`` non-finite steps in a row."""
    who = "several peers" if culprit is None else f"peer {culprit} ({peers[culprit]})"
    error = Diverged(
        f"{steps} steps in a row had non-finite values in {who}; "
        "lower --lr or --kd-weight, or give --lr-warmup-epochs or --kd-warmup-epochs"
    )
    error.learnt_steps = learnt_steps
    return error
