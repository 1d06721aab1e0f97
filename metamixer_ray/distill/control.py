"""Control that rides along with the exchange: a few floats by which all peers agree without a barrier or a
clock.

Every peer adds its floats into one sum and every peer reads the same sum, so all of them act at the same
step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONTROL_FLOATS = 6
"""Floats that control takes in the buffer: step, step squared, two wishes, the non-finite flag, the flag's
bearer."""

_EXACT_IN_FLOAT32 = 2**24


class PeersDisagree(RuntimeError):
    """The peers are not doing the same thing, so what they exchange has no meaning."""


class PeersDrifted(PeersDisagree):
    """The peers are at different steps."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """What one peer tells the others about itself at a step."""

    step: int
    """The global step it is at."""
    nonfinite: bool = False
    """It already knows that its step is spoiled; what the exchange finds in the tensors is added to this."""
    wish_checkpoint: bool = False
    """It would like everyone to checkpoint after this step."""
    wish_stop: bool = False
    """It would like everyone to stop after this step."""


@dataclass(frozen=True, kw_only=True)
class ControlSum:
    """What all peers said, itself included. Counts of peers: zero is false."""

    peers: int
    """How many spoke."""
    nonfinite: int
    """How many had non-finite values and sent zeros instead. All peers should then skip the step."""
    culprit: int | None
    """The index of the peer with non-finite values when there is exactly one such peer, else None."""
    wish_checkpoint: int
    """How many wish to checkpoint."""
    wish_stop: int
    """How many wish to stop."""


def step_modulus(peers: int) -> int:
    """Steps are sent modulo this: at most 1024, and small enough that float32 sums of their squares stay
    exact."""
    return min(1024, math.isqrt(_EXACT_IN_FLOAT32 // peers))


def encode_control(control: Control, peers: int) -> list[float]:
    """The floats of ``control`` that the host knows: step, step squared, the two wishes."""
    step = control.step % step_modulus(peers)
    return [float(step), float(step * step), float(control.wish_checkpoint), float(control.wish_stop)]


def decode_control(total: Sequence[float], peers: int, own_step: int) -> ControlSum:
    """Read the sum over ``peers`` of the control floats.

    The last two are, summed, the non-finite flags and flag x (peer index + 1).

    Raises:
        PeersDrifted: when not all steps are equal (modulo ``step_modulus``). By Cauchy-Schwarz, P x (sum of
            squares) equals (sum) squared only if they are; all numbers here are integers that float32 holds
            exactly.
    """
    step_sum, square_sum, wish_checkpoint, wish_stop, flags, bearers = (round(value) for value in total)
    if peers * square_sum != step_sum**2:
        raise PeersDrifted(
            f"peers are at different steps: this one is at step {own_step}, at least one other is not. "
            "Resume all of them from the same checkpoint and give all of them the same number of batches."
        )
    return ControlSum(
        peers=peers,
        nonfinite=flags,
        culprit=bearers - 1 if flags == 1 else None,
        wish_checkpoint=wish_checkpoint,
        wish_stop=wish_stop,
    )
