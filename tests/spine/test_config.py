"""The configuration tree: files, names, checks, and what makes two runs the same."""

import dataclasses
import typing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from metamixer_ray.config import (
    TrainConfig,
    flatten,
    from_settings,
    home,
    identity,
    nest,
    read_yaml,
    sections,
    to_settings,
    to_yaml,
)
from metamixer_ray.distill.config import DistillerName
from metamixer_ray.errors import ConfigError
from metamixer_ray.masking import masked

words = st.text(min_size=1, max_size=12)
positive = st.floats(1e-6, 1e6)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "peers": st.lists(words, min_size=1, max_size=4).map(tuple),
    "epochs": st.integers(1, 1000),
    "batch_size": st.integers(2, 4096),
    "seed": st.integers(0, 2**40),
    "precision": st.sampled_from(["auto", "bf16", "float32"]),
    "compile": st.booleans(),
    "data": words,
    "test_data": st.none() | words,
    "image_size": st.none() | st.integers(4, 512),
    "validation_fraction": st.floats(0, 0.99),
    "sampler": st.sampled_from(["auto", "quadruple", "shuffle"]),
    "mixer": st.sampled_from(["none", "mixup", "cutmix", "cutnmix", "manifold-mixup", "metamixer"]),
    "global_alpha": positive,
    "mix_together": st.booleans(),
    "mix_stages": st.none() | st.sets(st.integers(0, 9), min_size=1).map(lambda s: tuple(sorted(s))),
    "distiller": st.sampled_from(typing.get_args(DistillerName)),
    "temperature": positive,
    "statistics": st.sampled_from(["none", "attention", "similarity"]),
    "small_stem": st.sampled_from(["auto", "yes", "no"]),
    "stage_names": st.none() | st.lists(words, max_size=3).map(tuple),
    "optimizer": st.lists(st.sampled_from(["sgd", "adamw"]), min_size=1, max_size=3).map(tuple),
    "lr": st.lists(positive, min_size=1, max_size=3).map(tuple),
    "milestones": st.lists(st.floats(0.01, 0.99), max_size=3).map(tuple),
    "nesterov": st.booleans(),
    "replicas": st.integers(1, 64),
    "gpus_per_worker": st.none() | st.floats(0, 8),
    "peer_labels": st.lists(words, max_size=3).map(tuple),
    "name": st.none() | words,
    "resume": st.booleans(),
    "checkpoint_seconds": st.floats(0, 1e5),
}
some_settings = st.fixed_dictionaries({}, optional=VALUES)


@settings(deadline=None, max_examples=20)
@given(some_settings)
def test_settings_survive_flat_nested_and_yaml(chosen: dict[str, Any]) -> None:
    config = from_settings(chosen)
    assert {name: flatten(config)[name] for name in chosen} == chosen
    assert from_settings(to_settings(config)) == config
    assert from_settings(flatten(config)) == config
    assert from_settings(yaml.safe_load(to_yaml(config))) == config
    assert from_settings({name.replace("_", "-"): value for name, value in chosen.items()}) == config


@settings(deadline=None, max_examples=20)
@given(some_settings)
def test_what_is_not_named_keeps_its_default(chosen: dict[str, Any]) -> None:
    default, flat = flatten(TrainConfig()), flatten(from_settings(chosen))
    assert {name for name in flat if flat[name] != default[name]} <= set(chosen)


def test_names_are_unique_over_the_tree() -> None:
    rooms = [
        dataclasses.fields(f.default_factory)
        for f in dataclasses.fields(TrainConfig)
        if f.default_factory is not dataclasses.MISSING
    ]
    top = [f for f in dataclasses.fields(TrainConfig) if f.default_factory is dataclasses.MISSING]
    names = Counter(f.name for group in (top, *rooms) for f in group)
    assert {name for name, times in names.items() if times > 1} == set()
    assert set(names) == set(sections())
    assert not set(names) & {section for section in sections().values() if section}


def test_one_value_stands_for_a_sequence_of_one() -> None:
    config = from_settings({"peers": "resnet8", "optimisation": {"lr": 0.5, "optimizer": "adamw"}, "mix_stages": 0})
    assert config.peers == ("resnet8",)
    assert config.optimisation.lr == (0.5,)
    assert config.optimisation.optimizer == ("adamw",)
    assert config.mixing.mix_stages == (0,)


def test_flat_and_nested_settings_may_stand_together() -> None:
    config = from_settings({"local_alpha": 0.3, "mixing": {"global-alpha": 0.4}, "epochs": 7})
    assert (config.mixing.local_alpha, config.mixing.global_alpha, config.epochs) == (0.3, 0.4, 7)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"epoch": 3}, ["'epoch'", "'epochs'"]),
        ({"optimisation": {"momentun": 0.5}}, ["'momentun'", "'momentum'"]),
        ({"mixing": {"epochs": 3}}, ["'epochs'", "'mixing'"]),
        ({"mixing": {"temperature": 3}}, ["'temperature'", "'mixing'"]),
        ({"xyzzy": 3}, ["'xyzzy'"]),
        ({"epochs": "many"}, ["epochs", "'many'"]),
        ({"epochs": 1.5}, ["epochs", "1.5"]),
        ({"lr": "high"}, ["lr", "'high'"]),
        ({"dataset": {"image_size": "big"}}, ["image_size", "'big'"]),
        ({"mix_stages": ["a"]}, ["mix_stages", "'a'"]),
        ({"mixer": "metamixr"}, ["mixer", "'metamixr'"]),
        ({"optimizer": ["sgd", "sdg"]}, ["optimizer", "'sdg'"]),
        ({"temperature": 0}, ["--temperature"]),
        ({"local_probability": 2}, ["--local-probability"]),
        ({"image_size": 1}, ["--image-size"]),
    ],
)
def test_what_does_not_fit_is_named_with_its_source(wrong: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_settings(wrong, source="here")
    message = str(caught.value)
    assert message.startswith("here: ")
    assert all(word in message for word in words)
    assert "\n" not in message


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = from_settings({"peers": ["wrn-16-2", "größe:netz"], "mixer": "none", "small_stem": "no", "lr": [1e-5]})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert read_yaml(path) == config
    path.write_text("")
    assert read_yaml(path) == TrainConfig()
    path.write_text("lr: 1e-3\nepochs: 3\n")
    assert read_yaml(path).optimisation.lr == (0.001,)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"- a\n- b\n", "list"),
        (b"just words", "str"),
        (b"a: [1", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"epochs: x", "epochs"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=told) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        'tracking_uri: "postgresql://mlflow:S3cretPassw0rdXY@db.example.com/mlflow\nepochs: 3\n',
        "- a: [postgresql://mlflow:S3cretPassw0rdXY@db.example.com/mlflow\n b: 1\n",
        "storage: [s3://AKIAIOSFODNN7EXAMPLE:S3cretPassw0rdXYpqrstuvw@bucket/runs?endpoint_override=http://127.0.0.1:9]",
        "dataset: postgresql://mlflow:S3cretPassw0rdXY@db.example.com/mlflow",
        "epochs: postgresql://mlflow:S3cretPassw0rdXY@db.example.com/a-database-of-quite-a-long-name-in-all-respects",
        "? postgresql://mlflow:S3cretPassw0rdXY@db.example.com/a-database-of-quite-a-long-name-in-all-respects\n: 1",
    ],
)
def test_a_file_that_cannot_be_used_keeps_its_secrets(tmp_path: Path, content: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    told = masked(str(caught.value))
    secret = "S3cretPassw0rdXY"
    assert not [part for part in (secret[i : i + 4] for i in range(len(secret) - 3)) if part in told], told


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": 1}, "--batch-size"),
        ({"evaluate_every": 0}, "--evaluate-every"),
        ({"seed": -1}, "--seed"),
        ({"peers": []}, "--peers"),
        ({"replicas": 0}, "--replicas"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints"),
        ({"peers": ["resnet8"]}, "--distiller dml"),
        ({"peers": ["resnet8"], "distiller": "okddip"}, "--distiller okddip needs at least three --peers"),
        ({"peers": ["resnet8"] * 2, "distiller": "okddip"}, "--distiller okddip needs at least three --peers"),
        ({"epochs": 5, "off_epochs": 5}, "--off-epochs 5"),
        ({"epochs": 5, "kd_warmup_epochs": 6}, "--kd-warmup-epochs 6"),
        ({"peer_labels": ["a=b"]}, "--peer-labels"),
        ({"gpus_per_worker": -1}, "--gpus-per-worker"),
        ({"cpus_per_worker": -0.5}, "--cpus-per-worker"),
        ({"name": ""}, "--name"),
        ({"name": ".."}, "--name"),
        ({"name": "a/b"}, "--name"),
        ({"storage": "a\0b"}, "--storage"),
        ({"data": "a\0b"}, "--data"),
        ({"cache_dir": "\0"}, "--cache-dir"),
        ({"optimizer": ["sgd"] * 3}, "--optimizer has 3 values for 2 peers"),
        ({"lr": [0.1] * 3}, "--lr has 3 values"),
        ({"weight_decay": []}, "--weight-decay has 0 values"),
        ({"schedule": ["cosine"] * 4}, "--schedule has 4 values"),
        ({"lr": [0.1, 0]}, "--lr must be a positive number"),
        ({"weight_decay": -1}, "--weight-decay"),
        ({"momentum": 1}, "--momentum"),
        ({"momentum": 0}, "--nesterov"),
        ({"milestones": [0.75, 0.5]}, "--milestones"),
        ({"milestones": [150, 225]}, "--milestones"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(wrong: dict[str, Any], told: str) -> None:
    config = from_settings(wrong)
    with pytest.raises(ConfigError, match=told):
        config.check()


@pytest.mark.parametrize(
    "right",
    [
        {},
        {"peers": ["resnet8"], "distiller": "none"},
        {"peers": ["resnet8"] * 3, "distiller": "okddip"},
        {"epochs": 5, "off_epochs": 5, "mixer": "none"},
        {"momentum": 0, "nesterov": False},
        {"momentum": 0, "optimizer": "adamw"},
        {"peers": ["a", "b", "c"], "lr": [0.1, 0.2, 0.3], "peer_labels": ["-", "-", "x=y"]},
        {"name": ".hidden", "gpus_per_worker": 0},
    ],
)
def test_what_can_work_is_accepted(right: dict[str, Any]) -> None:
    config = from_settings(right)
    config.check()
    assert config.workers == len(config.peers) * config.placement.replicas


SAME = {
    "name": "x",
    "storage": "/x",
    "resume": True,
    "checkpoint_seconds": 1.0,
    "keep_checkpoints": 9,
    "tracking_uri": "x",
    "experiment": "x",
    "log_models": False,
    "verbose": True,
    "gpus_per_worker": 0.5,
    "cpus_per_worker": 1.0,
    "threads": 2,
    "peer_labels": ("a=b", "-"),
    "address": "x",
    "max_failures": 1,
    "loader_processes": 2,
    "cache_dir": "/x",
    "data_root": "/x",
    "evaluate_every": 2,
    "baseline": True,
}
OTHER = {
    "replicas": 2,
    "seed": 1,
    "peers": ("resnet8", "resnet14"),
    "epochs": 21,
    "batch_size": 64,
    "precision": "bf16",
    "train_limit": 100,
    "mix_stages": (0,),
    "temperature": 2.0,
    "lr": (0.2,),
    "lr_decay": 0.2,
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_identity_is_what_decides_the_weights(name: str) -> None:
    value = {**SAME, **OTHER}[name]
    assert flatten(TrainConfig())[name] != value
    changed = from_settings({name: value})
    assert (identity(changed) == identity(TrainConfig())) is (name in SAME)


def test_nesting_keeps_every_value() -> None:
    flat = flatten(TrainConfig())
    nested = nest(flat)
    assert {k for k, v in nested.items() if isinstance(v, dict)} == {s for s in sections().values() if s}
    assert nest(nested) == nested


def test_the_default_home_does_not_stand_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody works in the home folder, Python takes the folders in it for packages."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("METAMIXER_HOME")
    assert home().parent == tmp_path
    assert not home().name.isidentifier()
