"""Control that rides along with the exchange: a few floats by which all peers agree without a barrier or a
clock.

Every peer adds its floats into one sum and every peer reads the same sum, so all of them act at the same
step. All floats are zeros and ones (but the bearer of a flag), so that their sums stay exact even in bfloat16, up to
``MAX_PEERS_IN_BF16`` peers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

STEP_BITS = 10
KNOWN_FLOATS = STEP_BITS + 2
"""Control floats that the host knows when it sends: the step's bits and the two wishes."""
CONTROL_FLOATS = KNOWN_FLOATS + 2
"""Floats that control takes in the buffer: those, the non-finite flag, and the flag's bearer."""
MAX_PEERS_IN_BF16 = 256
"""bfloat16 holds whole numbers exactly up to here."""


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


def encode_control(control: Control) -> list[float]:
    """The ``KNOWN_FLOATS`` of ``control``: the lowest bits of the step, the two wishes."""
    bits = [float(control.step >> bit & 1) for bit in range(STEP_BITS)]
    return [*bits, float(control.wish_checkpoint), float(control.wish_stop)]


def decode_control(total: Sequence[float], peers: int, own_step: int) -> ControlSum:
    """Read the sum over ``peers`` of the control floats.

    The last two are, summed, the non-finite flags and flag x (peer index + 1).

    Raises:
        PeersDrifted: when not all steps are equal (modulo 2 to the ``STEP_BITS``): some bit was then set by some
            of the peers, but not by all.
    """
    *bits, wish_checkpoint, wish_stop, flags, bearers = (round(value) for value in total)
    if any(count not in (0, peers) for count in bits):
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
