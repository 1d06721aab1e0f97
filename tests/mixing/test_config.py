"""Every value that cannot work is refused with a message naming the flag."""

from typing import get_args

import pytest

from metamixer_ray.errors import ConfigError
from metamixer_ray.mixing import MixingConfig, build_mixer, resolve_stages
from metamixer_ray.mixing.config import MixerName
from metamixer_ray.mixing.registry import MIXERS
from tests.mixing.plans import plan_of


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mixer", "mixdown"),
        ("pairing", "random"),
        ("local_alpha", 0.0),
        ("local_alpha", float("inf")),
        ("global_alpha", -1.0),
        ("global_alpha", float("nan")),
        ("local_probability", -0.1),
        ("local_probability", float("nan")),
        ("global_probability", 1.1),
        ("cuts", 0),
        ("cuts", 17),
        ("off_epochs", -1),
        ("mix_stages", ()),
        ("mix_stages", (-1,)),
        ("mix_stages", (1, 2, 1)),
    ],
)
def test_impossible_values_name_their_flag(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        MixingConfig(**{field: value})  # type: ignore[arg-type]
    assert f"--{field.replace('_', '-')}" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_limits_themselves_work() -> None:
    config = MixingConfig(local_probability=0, global_probability=1, off_epochs=0, mix_stages=(0,), local_alpha=1e-3)
    assert config.mix_stages == (0,)


def test_stages_default_to_all_that_the_networks_have() -> None:
    assert resolve_stages(MixingConfig(), 4) == (0, 1, 2, 3)
    assert resolve_stages(MixingConfig(mix_stages=(2, 0)), 3) == (2, 0)


@pytest.mark.parametrize("mixer", get_args(MixerName))
def test_a_stage_the_networks_lack_is_refused_when_a_plan_is_drawn(mixer: MixerName) -> None:
    with pytest.raises(ConfigError, match=r"--mix-stages asks for stage 3.* to 2 "):
        plan_of(MixingConfig(mixer=mixer, mix_stages=(0, 3)), available_stages=3)


@pytest.mark.parametrize("rows", [0, 2, 6, 127])
@pytest.mark.parametrize("pairing", ["cross-class", "within-class"])
def test_an_organised_batch_without_quadruples_is_refused(rows: int, pairing: str) -> None:
    config = MixingConfig(pairing=pairing, local_probability=0, global_probability=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--batch-size"):
        plan_of(config, rows=rows)


@pytest.mark.parametrize("mixer", ["none", "mixup", "cutmix", "manifold-mixup"])
def test_unorganised_mixers_take_any_number_of_rows(mixer: MixerName) -> None:
    for config in (MixingConfig(mixer=mixer), MixingConfig(mixer="metamixer", pairing="free")):
        assert plan_of(config, rows=7).rows == 7


def test_every_name_has_a_mixer() -> None:
    assert tuple(MIXERS) == get_args(MixerName)


def test_only_the_organised_pairings_of_metamixer_need_quadruples() -> None:
    organised = {
        (mixer, pairing)
        for mixer in get_args(MixerName)
        for pairing in ("cross-class", "within-class", "free")
        if build_mixer(MixingConfig(mixer=mixer, pairing=pairing)).organised
    }
    assert organised == {("metamixer", "cross-class"), ("metamixer", "within-class")}
