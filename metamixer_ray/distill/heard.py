"""What a peer hears from the others at one step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor

from metamixer_ray.distill.control import ControlSum

Reduce = Literal["mean", "each", "lowest"]
"""What a distiller needs of the others: their mean, each peer's own tensors, or the lowest value of any peer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Heard:
    """What the peers said, float32 on the exchange's device and without gradient. Safe to keep: nothing is
    reused.

    When a peer had non-finite values (``control.nonfinite``), it counts in the means as zeros.
    """

    peers: int
    """How many peers spoke, itself included."""
    own_index: int
    """This peer's index among them."""
    others: Mapping[str, Tensor]
    """Per name, the mean over the *other* peers; the shape of what was said. Empty when there is no other
    peer."""
    each: Mapping[str, Tensor]
    """Per name, [P, ...] every peer's own in the order of their index; filled only with reduce 'each'."""
    lowest: Mapping[str, Tensor]
    """Per name, element by element the lowest that any peer said, this one included; filled only with 'lowest'."""
    read_control: Callable[[], ControlSum] = field(repr=False)
    """How ``control`` is read."""

    @cached_property
    def control(self) -> ControlSum:
        """The sum of everyone's control. On a GPU the first read waits for the exchange (not for what was
        queued after it), so read it after the backward pass has been queued.

        Raises:
            PeersDrifted: the peers are at different steps.
        """
        return self.read_control()
