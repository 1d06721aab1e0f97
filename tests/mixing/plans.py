"""Plans to test with: strategies, and small constructors of plans with given contents."""

from typing import get_args

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from metamixer_ray.mixing import GlobalMix, LocalMix, MixingConfig, MixPlan, build_mixer, draw_plan, local_mixing
from metamixer_ray.mixing.config import MixerName, Pairing

quick = settings(max_examples=60, deadline=None)

STAGES = 3

configs = st.builds(
    MixingConfig,
    # Most often the one that has the most ways to mix.
    mixer=st.sampled_from((*get_args(MixerName), *["metamixer"] * 7)),
    pairing=st.sampled_from(get_args(Pairing)),
    local_alpha=st.floats(0.05, 5),
    global_alpha=st.floats(0.05, 5),
    cuts=st.integers(1, 4),
    local_probability=st.sampled_from((0.0, 0.5, 1.0, 1.0, 1.0)),
    global_probability=st.sampled_from((0.0, 0.5, 1.0, 1.0, 1.0)),
)


def plan_of(
    config: MixingConfig,
    *,
    seed: int = 0,
    epoch: int = 0,
    step: int = 0,
    replica: int = 0,
    rows: int = 8,
    height: int = 8,
    width: int = 12,
    epochs: int = 10,
    available_stages: int = STAGES,
) -> MixPlan:
    """``draw_plan`` with defaults for what a test does not care about."""
    return draw_plan(
        build_mixer(config),
        config,
        seed=seed,
        epoch=epoch,
        step=step,
        replica=replica,
        rows=rows,
        height=height,
        width=width,
        epochs=epochs,
        available_stages=available_stages,
    )


@st.composite
def drawn_plans(draw: st.DrawFn, configs: st.SearchStrategy[MixingConfig] = configs) -> tuple[MixPlan, int, int]:
    """(plan, height, width) of a random configuration, with a random number of quadruples."""
    height, width = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    plan = plan_of(
        draw(configs),
        seed=draw(st.integers(0, 10**9)),
        rows=4 * draw(st.integers(1, 4)),
        height=height,
        width=width,
    )
    return plan, height, width


def local_mix(partner: Tensor, boxes: np.ndarray, *, height: int, width: int) -> LocalMix:
    """A local mix of one given box [B, 4] per row."""
    return local_mixing.local_mix(partner[None], boxes[None], height=height, width=width)


def global_plan(rows: int, *, stage: int, seed: int = 0) -> MixPlan:
    """A plan that interpolates random rows by lambdas of any float32 value."""
    generator = torch.Generator().manual_seed(seed)
    partner = torch.randperm(rows, generator=generator)
    return MixPlan(rows, glob=GlobalMix(partner, torch.rand(rows, generator=generator), stage))


def matrix(indices: Tensor, weights: Tensor) -> Tensor:
    """[B, B]: row i holds the weights of all rows in the mixture i, from what ``label_sources`` says."""
    rows = len(indices)
    return torch.zeros(rows, rows, dtype=torch.float64).scatter_add_(1, indices, weights.double())


def same_plan(a: MixPlan, b: MixPlan) -> bool:
    """Whether two plans are equal to the bit."""
    return flat(a) == flat(b)


def flat(plan: MixPlan) -> list[object]:
    """Everything in a plan as plain values."""
    values: list[object] = [plan.rows]
    if plan.local is not None:
        values += ["local", plan.local.partners.tolist(), plan.local.boxes.tolist(), plan.local.weights.tolist()]
        values += [plan.local.resized]
    if plan.glob is not None:
        values += ["global", plan.glob.partner.tolist(), plan.glob.kept.tolist(), plan.glob.stage]
    return values
