"""A network whose values aren't finite where its name says, as ``--peers tests.faults.spoiling:spoilt_logits_nan_3_1``
is at step 3 (from 0) on rank 1."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

VALUES = {"nan": torch.nan, "inf": torch.inf, "ninf": -torch.inf, "huge": 1e25}
FORWARD = [(place, value) for place in ("logits", "features", "activations") for value in ("nan", "inf", "ninf")]
# The square of it is infinite, and so is a running variance; all else stays finite.
FORWARD.append(("activations", "huge"))
BACKWARD = [("gradients", value) for value in ("nan", "inf", "ninf")]
FINE_GRADIENTS = [("logits", "ninf"), ("activations", "huge")]
"""Of those in the forward pass the ones that make no gradient infinite, with a cross-entropy and dml."""


@dataclass(frozen=True)
class Spoilt:
    """One value of one rank is ``value`` at a training step."""

    place: str
    """Which values: the logits; what the last stage makes of the images, while the logits stay fine; what a BatchNorm
    gets; or the gradients."""
    value: str
    step: int
    """From 0, over all epochs."""
    rank: int


def named(faults: Iterable[Spoilt]) -> str:
    """The name of the network that suffers these faults."""
    words = (f"_{fault.place}_{fault.value}_{fault.step}_{fault.rank}" for fault in faults)
    return f"{__name__}:spoilt" + "".join(words)


def __getattr__(name: str) -> Callable[[int], nn.Module]:
    # --peers module:function passes on nothing but the number of classes, so the rest is in the function's name.
    if re.fullmatch(r"spoilt(_[a-z]+_[a-z]+_\d+_\d+)*", name) is None:
        raise AttributeError(name)
    found = re.findall(r"_([a-z]+)_([a-z]+)_(\d+)_(\d+)", name)
    faults = [Spoilt(place, value, int(step), int(rank)) for place, value, step, rank in found]
    return lambda classes: Suffering(classes, faults)


class Suffering(nn.Module):
    """Two stages with BatchNorm and a head."""

    stage_names = ("one", "two")

    def __init__(self, classes: int, faults: list[Spoilt]) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            Spoiling(self, "activations"),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Spoiling(self, "features"),
        )
        self.head = nn.Linear(16, classes)
        self.faults = faults
        self.steps = 0

    def fault(self, place: str) -> float | None:
        """The value that is in ``place`` at this step, if any."""
        if self.training:
            for fault in self.faults:
                if (fault.place, fault.step, fault.rank) == (place, self.steps, dist.get_rank()):
                    return VALUES[fault.value]
        return None

    def forward(self, images: Tensor) -> Tensor:
        features = torch.nan_to_num(self.two(self.one(images)), posinf=0.0, neginf=0.0)
        logits: Tensor = self.head(features.mean((2, 3)))
        if (slope := self.fault("gradients")) is not None:
            logits.register_hook(partial(with_one, value=slope))
        if (value := self.fault("logits")) is not None:
            logits = with_one(logits, value)
        self.steps += self.training
        return logits


class Spoiling(nn.Module):
    """A place inside a network."""

    def __init__(self, network: Suffering, place: str) -> None:
        super().__init__()
        # Not as a part of this one: it is the other way round.
        self._of, self._place = [network], place

    def forward(self, features: Tensor) -> Tensor:
        value = self._of[0].fault(self._place)
        return features if value is None else with_one(features, value)


def with_one(values: Tensor, value: float) -> Tensor:
    """A copy of ``values``, the first of them ``value``."""
    spoilt = values.clone()
    spoilt[(0,) * spoilt.ndim] = value
    return spoilt
