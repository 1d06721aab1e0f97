"""What happens to one batch: a small record, drawn on the CPU, that every peer computes for itself.

A plan is a pure function of (seed, epoch, step, replica). Peers therefore see the same mix without exchanging
a byte, and a resumed run needs no saved random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from metamixer_ray.mixing.config import MixingConfig, resolve_stages
from metamixer_ray.randomness import numpy_generator


@dataclass(frozen=True, eq=False)
class LocalMix:
    """Pasting at the input: row i takes what is inside its n-th box from row ``partners[n, i]``.

    Partners are pasted as they were before mixing, later boxes over earlier ones. CutMix has N = 1 box, Cut^nMix
    several.
    """

    partners: Tensor
    """int64 [N, B], the rows that are pasted from."""
    boxes: Tensor
    """int64 [N, B, 4]: top, left, bottom, right in pixels, clipped to the image, half-open."""
    weights: Tensor
    """float32 [N + 1, B], exact shares of the pixels: those left of the row itself, then those seen of each box."""
    resized: bool = False
    """Whether a box shows the whole partner, scaled down to it, instead of the part of the partner that lies there."""

    @property
    def kept(self) -> Tensor:
        """float32 [B], the share of the row's own pixels left outside of all boxes."""
        return self.weights[0]

    def to(self, device: torch.device | str) -> LocalMix:
        """The same on ``device``."""
        partners, boxes, weights = (_move(tensor, device) for tensor in (self.partners, self.boxes, self.weights))
        return LocalMix(partners, boxes, weights, self.resized)


@dataclass(frozen=True, eq=False)
class GlobalMix:
    """Interpolation: row i becomes ``kept[i] * row i + (1 - kept[i]) * row partner[i]``."""

    partner: Tensor
    """int64 [B], the row that is blended in."""
    kept: Tensor
    """float32 [B], lambda, the weight of the row itself."""
    stage: int
    """0 = at the input (after local mixing), k = on what flows out of stage k."""

    def to(self, device: torch.device | str) -> GlobalMix:
        """The same on ``device``."""
        return GlobalMix(_move(self.partner, device), _move(self.kept, device), self.stage)


@dataclass(frozen=True, eq=False)
class MixPlan:
    """How one batch of ``rows`` rows is mixed: locally at the input, then globally, either, or not at all."""

    rows: int
    local: LocalMix | None = None
    glob: GlobalMix | None = None

    @property
    def mixed(self) -> bool:
        """Whether the batch is mixed at all."""
        return self.local is not None or self.glob is not None

    def to(self, device: torch.device | str) -> MixPlan:
        """The same plan with its tensors on ``device``, where what is mixed must be as well."""
        local = None if self.local is None else self.local.to(device)
        glob = None if self.glob is None else self.glob.to(device)
        return MixPlan(self.rows, local, glob)


class Mixer(Protocol):
    """Decides how a batch is mixed."""

    @property
    def organised(self) -> bool:
        """Whether batches must be quadruples (rows 4q .. 4q+3 are A1, A2, B1, B2)."""

    def draw(self, rng: np.random.Generator, *, rows: int, height: int, width: int, stages: Sequence[int]) -> MixPlan:
        """A plan for ``rows`` images of ``height`` x ``width`` pixels, drawn from ``rng`` alone.

        Global mixing inside the networks picks one of ``stages``. Organised mixers raise ``ConfigError``
        naming ``--batch-size`` if ``rows`` is not a multiple of four.
        """


def _move(tensor: Tensor, device: torch.device | str) -> Tensor:
    # A copy to the CPU must be waited for; one to an accelerator is ordered by its stream and need not be.
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


def draw_plan(
    mixer: Mixer,
    config: MixingConfig,
    *,
    seed: int,
    epoch: int,
    step: int,
    replica: int,
    rows: int,
    height: int,
    width: int,
    epochs: int,
    available_stages: int,
) -> MixPlan:
    """The plan of one batch: a pure function of its arguments, the same in every process.

    ``epoch`` counts from 0 and lies below ``epochs``; the last ``config.off_epochs`` of them are unmixed
    (all, if there are no more). ``rows`` is this replica's share of the batch, ``available_stages`` the
    number of stages of the networks (of the shallowest, if they differ): stages 0 .. available_stages - 1 can
    be mixed.

    Raises ``ConfigError`` naming ``--mix-stages`` (a stage that the networks lack) or ``--batch-size`` (an
    organised mixer without quadruples), and ``ValueError`` for an epoch outside the training.
    """
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch {epoch} does not lie in 0..{epochs - 1}: epochs count from 0")
    stages = resolve_stages(config, available_stages)
    if epoch >= epochs - config.off_epochs:
        return MixPlan(rows)
    rng = numpy_generator(seed, "mix", epoch, step, replica)
    return mixer.draw(rng, rows=rows, height=height, width=width, stages=stages)


def label_sources(plan: MixPlan) -> tuple[Tensor, Tensor]:
    """The source rows of every mixed row, and their label weights.

    Returns (indices int64 [B, S], weights float32 [B, S]); weights of a row sum to one, column 0 is the row
    itself. S is 1 (unmixed), N + 1 (N boxes pasted), twice that with global mixing: own row and its local
    partners, then the global partner and *its* local partners, since local mixing comes first. With random
    partners an index may occur twice in a row.
    """
    device = next((mix.kept.device for mix in (plan.local, plan.glob) if mix is not None), None)
    indices = torch.arange(plan.rows, device=device)[:, None]
    weights = torch.ones(plan.rows, 1, device=device)
    if plan.local is not None:
        indices = torch.cat((indices, plan.local.partners.T), dim=1)
        weights = plan.local.weights.T
    if plan.glob is not None:
        partner, kept = plan.glob.partner, plan.glob.kept[:, None]
        indices = torch.cat((indices, indices[partner]), dim=1)
        weights = torch.cat((weights * kept, weights[partner] * (1 - kept)), dim=1)
    return indices, weights
