"""Any mixer goes with any distiller, in real process groups."""

import math
import typing
from collections.abc import Callable
from pathlib import Path

import pytest

from metamixer_ray.config import TrainConfig
from metamixer_ray.distill import distiller_names
from metamixer_ray.mixing.config import MixerName
from tests.spine.pool import Pool
from tests.spine.training import learn_together


@pytest.mark.parametrize("distiller", distiller_names())
@pytest.mark.parametrize("mixer", typing.get_args(MixerName))
def test_every_mixer_works_with_every_distiller(
    pool: Pool, small: Callable[..., TrainConfig], tmp_path: Path, mixer: str, distiller: str
) -> None:
    # One method asks for a validation split, and one needs more steps than there are.
    needs = {"kdcl-general": {"validation_fraction": 0.1}, "codistillation": {"stale_steps": 1}}.get(distiller, {})
    peers = ["tests.spine.networks:tiny"] * 3
    config = small(mixer=mixer, distiller=distiller, peers=peers, epochs=1, kd_warmup_epochs=0, **needs)
    outcomes = pool.run(3, learn_together, config, tmp_path)
    for outcome in outcomes:
        assert outcome.ended == "finished"
        train = outcome.epochs[-1]["train"]
        assert math.isfinite(train["loss"])
        assert (train["kd"] > 0) == (distiller != "none")
        assert train["loss"] == pytest.approx(train["cross_entropy"] + train["kd"], rel=1e-5)
