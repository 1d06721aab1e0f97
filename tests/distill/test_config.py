"""The options of distillation: what is refused, and the ramp."""

import ast
import dataclasses
import inspect
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metamixer_ray.distill import DistillConfig, kd_ramp
from metamixer_ray.distill import config as config_module
from metamixer_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"kd_weight": -0.1}, "--kd-weight"),
        ({"kd_weight": float("nan")}, "--kd-weight"),
        ({"temperature": 0.0}, "--temperature"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"kd_warmup_epochs": -1.0}, "--kd-warmup-epochs"),
        ({"statistics_weight": -1.0}, "--statistics-weight"),
        ({"statistics": "none", "statistics_weight": 0.1}, "--statistics attention"),
        ({"statistics_grid": 1}, "--statistics-grid"),
        ({"statistics_every": 0}, "--statistics-every"),
        ({"projection_dim": 0}, "--projection-dim"),
        ({"contrast_temperature": 0.0}, "--contrast-temperature"),
        ({"soft_vcl_weight": -1.0}, "--soft-vcl-weight"),
        (
            {
                "distiller": "mcl",
                "vcl_weight": 0.0,
                "icl_weight": 0.0,
                "soft_vcl_weight": 0.0,
                "soft_icl_weight": 0.0,
            },
            "--distiller mcl has nothing to learn",
        ),
    ],
)
def test_impossible_values_are_refused_by_name(options: dict, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        DistillConfig(**options)


def test_defaults_are_possible() -> None:
    assert DistillConfig().distiller == "dml"


@given(warmup=st.floats(0.01, 300), progress=st.floats(0, 400))
def test_ramp_is_linear_then_one(warmup: float, progress: float) -> None:
    config = DistillConfig(kd_warmup_epochs=warmup)
    assert kd_ramp(config, progress, epochs=100) == pytest.approx(min(1.0, progress / warmup))
    assert kd_ramp(config, 0.0, epochs=100) == 0
    assert kd_ramp(config, warmup / 2, epochs=100) == pytest.approx(0.5)


def test_no_warmup_is_full_weight_at_once() -> None:
    assert kd_ramp(DistillConfig(kd_warmup_epochs=0), 0.0, epochs=100) == 1
    # Unless it is given, a quarter of all epochs.
    assert kd_ramp(DistillConfig(), 5.0, epochs=40) == 0.5
    assert kd_ramp(DistillConfig(), 10.0, epochs=40) == 1


def test_every_option_is_explained() -> None:
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(config_module)).body
        if isinstance(node, ast.ClassDef) and node.name == "DistillConfig"
    )
    explained = {
        node.target.id
        for node, after in pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    assert explained == {field.name for field in dataclasses.fields(DistillConfig)}
