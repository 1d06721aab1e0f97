"""What may be searched, and what is refused before Ray starts."""

from pathlib import Path
from typing import Any

import pytest
from hyperopt import hp, space_eval
from hyperopt.pyll import as_apply
from hypothesis import given, settings
from hypothesis import strategies as st

from metamixer_ray.config import TrainConfig, flatten, from_settings
from metamixer_ray.errors import ConfigError
from metamixer_ray.sweeps.spaces import (
    built_in_spaces,
    check_space,
    draws,
    field_names,
    flattened,
    grid,
    load_spaces,
    locate,
)


def conditional() -> dict[str, Any]:
    return {
        "pairing": hp.choice("pairing", ["cross-class", "within-class"]),
        "mix_stages": hp.choice("stages", [None, [0], [0, 1]]),
        "coins": hp.choice(
            "coins",
            [
                {"mix_together": True, "local_probability": hp.choice("both", [0.25, 0.5])},
                {"mix_together": False},
            ],
        ),
    }


def test_a_choice_brings_only_its_own_settings() -> None:
    assert field_names(conditional()) == {"pairing", "mix_stages", "mix_together", "local_probability"}
    for point in draws(conditional(), 50, seed=0):
        assert ("local_probability" in point) == point["mix_together"]
        assert "coins" not in point


@pytest.mark.parametrize("name", [None, *built_in_spaces()])
def test_every_draw_is_found_again(name: str | None) -> None:
    """What the labels of a draw's settings stand for is the draw."""
    space = conditional() if name is None else load_spaces([name])
    defaults = flatten(TrainConfig())
    for point in draws(space, 20, seed=1):
        labels = locate(space, {**defaults, **point})
        assert labels is not None
        again = flattened(space_eval(dict(space), labels))
        assert from_settings({**defaults, **again}) == from_settings({**defaults, **point})


@given(st.floats(0.01, 20))
def test_a_number_is_found_where_its_distribution_may_draw_it(number: float) -> None:
    space = {
        "local_alpha": hp.uniform("a", 0.5, high=2),
        "global_alpha": hp.loguniform("b", 0, 1),
        "lr": hp.lognormal("c", 0, 1),
    }
    point = {"local_alpha": number, "global_alpha": number, "lr": [number]}
    within = 1 <= number <= 2
    assert locate(space, point) == ({"a": number, "b": number, "c": number} if within else None)
    whole = round(number)
    steps = {"batch_size": hp.quniform("d", 0, 20, 4), "off_epochs": hp.randint("e", 2, 9)}
    found = locate(steps, {"batch_size": whole, "off_epochs": whole})
    assert found == ({"d": whole, "e": whole} if whole in (4, 8) else None)


def test_what_cannot_be_turned_round_is_not_found() -> None:
    assert locate({"batch_size": 2 ** as_apply(hp.randint("a", 9))}, {"batch_size": 64}) is None


def test_a_grid_is_every_combination_once() -> None:
    points = grid(conditional())
    assert len(points) == 2 * 3 * (2 + 1)
    assert len({repr(sorted(point.items(), key=str)) for point in points}) == len(points)


def test_a_grid_needs_finite_choices() -> None:
    with pytest.raises(ConfigError, match="--search grid: 'lr' has infinitely many values"):
        grid({"lr": hp.uniform("lr", 0.01, 1.0)})


@pytest.mark.parametrize("name", built_in_spaces())
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_every_draw_of_every_space_is_a_configuration(name: str, seed: int) -> None:
    (point,) = draws(load_spaces([name]), 1, seed)
    config = flatten(from_settings(point))
    assert point
    assert {name: tuple(v) if isinstance(v := config[name], tuple) else v for name in point} == {
        name: tuple(v) if isinstance(v, list) else (v,) if isinstance(config[name], tuple) else v
        for name, v in point.items()
    }


def test_built_in_spaces_are_those_that_are_promised() -> None:
    wanted = {f"tune_spaces.{name}" for name in ("mixing", "distillation", "optimisation", "peers", "joint")}
    assert set(built_in_spaces()) == wanted
    joined = load_spaces(["tune_spaces.mixing", "tune_spaces.optimisation"])
    assert {"pairing", "lr"} <= field_names(joined)
    assert field_names(load_spaces(["tune_spaces.joint"])) > field_names(joined)


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"pairng": hp.choice("p", ["free"])}, r"unknown setting 'pairng'; did you mean 'pairing'"),
        ({"pairing": hp.choice("p", ["fre"])}, r"pairing: Input should be"),
        ({"seed": hp.choice("p", [1, 2])}, r"'seed' can't be searched: it is the same for all trials"),
        ({"validation_fraction": hp.choice("p", [0.0, 0.1])}, r"'validation_fraction' can't be searched"),
        ({"replicas": hp.choice("p", [1, 2])}, r"'replicas' can't be searched"),
        ({"lr": hp.choice("p", ["fast"])}, r"lr: Input should be a valid number"),
    ],
)
def test_what_can_not_be_searched_is_named(space: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_space(space, source="--space mine")


def test_spaces_from_files(tmp_path: Path) -> None:
    one, other, bare, clash = (tmp_path / f"{name}.py" for name in ("one", "other", "bare", "clash"))
    one.write_text('from hyperopt import hp\ndef space():\n    return {"lr": hp.uniform("lr", 0.1, 0.2)}\n')
    other.write_text('from hyperopt import hp\ndef space():\n    return {"batch_size": hp.choice("lr", [32, 64])}\n')
    clash.write_text('from hyperopt import hp\ndef space():\n    return {"lr": hp.uniform("rate", 0.1, 0.2)}\n')
    bare.write_text("x = 1\n")
    broken = tmp_path / "broken.py"
    broken.write_text('def space():\n    return {"lr": hp.uniform("lr", 0.1, 0.2)}\n')
    with pytest.raises(ConfigError, match=r"broken.py: NameError: name 'hp' is not defined"):
        load_spaces([str(broken)])
    assert field_names(load_spaces([str(one)])) == {"lr"}
    with pytest.raises(ConfigError, match=r"HyperOpt's label 'lr' is used twice"):
        load_spaces([str(one), str(other)])
    with pytest.raises(ConfigError, match=r"'lr' is searched by both .*one.py and .*clash.py"):
        load_spaces([str(one), str(clash)])
    with pytest.raises(ConfigError, match=r"bare.py: there is no function space\(\)"):
        load_spaces([str(bare)])
    with pytest.raises(ConfigError, match=r"no such file"):
        load_spaces([str(tmp_path / "absent.py")])
    with pytest.raises(ConfigError, match=r"did you mean 'tune_spaces.mixing'"):
        load_spaces(["tune_spaces.mixin"])
