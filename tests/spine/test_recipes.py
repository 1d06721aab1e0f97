"""The recipes: whole, true to their protocols, and used like a file of settings."""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import metamixer_ray.plan
import metamixer_ray.train
import metamixer_ray.tune
from metamixer_ray.cli import parse
from metamixer_ray.config import TrainConfig, flatten, read_yaml, sections, to_yaml
from metamixer_ray.errors import ConfigError
from metamixer_ray.mixing import MixingConfig
from metamixer_ray.networks import NetworkConfig, build_network
from metamixer_ray.planning import NAMED
from metamixer_ray.recipes import FOLDER, load_recipe, read_header, read_recipe, recipe_names

ROOT = Path(__file__).parents[2]
NAMES = recipe_names()
PROTOCOL = {"epochs", "batch_size", "augment", "optimizer", "lr", "momentum", "nesterov", "weight_decay", "schedule"}
PROTOCOL |= {"kd_weight", "temperature"}
"""What every recipe must say, even where it says what the default is."""


Command = Callable[[Sequence[str]], int]
COMMANDS: list[Command] = [metamixer_ray.train.main, metamixer_ray.tune.main, metamixer_ray.plan.main]


def parsed(*words: str) -> TrainConfig:
    return parse(words, program="python -m metamixer_ray.train", description="Train.")


@cache
def operations(network: str, classes: int, size: int) -> float:
    """Operations of training ``network``, built as a training would, on one image."""
    built = build_network(network, classes=classes, image_size=size, config=NetworkConfig()).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        built(torch.zeros(1, 3, size, size))
    return 3.0 * counter.get_total_flops()


def test_what_was_published_has_a_recipe() -> None:
    for data in ("cifar10", "cifar100"):
        for network in ("resnet32", "resnet110", "vgg16", "wrn20-8", "wrn40-2", "densenet40-12"):
            assert f"{data}-{network}" in NAMES
    assert {len(read_recipe(name).peers) for name in NAMES} == {2, 4}
    assert set(NAMES) >= {"cifar100-resnet32-resnet110", "cifar100-resnet32-mobilenetv2", "imagenet-resnet34"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_whole(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    settings = yaml.safe_load(text)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 120
    assert set(settings) <= set(sections()), "flat, by the names of the flags"
    assert set(settings) >= {"data", "peers"} | PROTOCOL
    assert "milestones" not in settings["schedule"] or set(settings) >= {"milestones", "lr_decay"}
    recipe = load_recipe(name)
    recipe.config.check()
    assert name.removeprefix("low-data-").startswith(recipe.config.dataset.data)
    assert set(recipe.header) >= {"source", "protocol", "expected", "GPU-hours"}
    assert re.match(r"(\d\d\.\d|none known)", recipe.header["expected"])
    # What one compares under a condition is no part of it.
    assert recipe.config.mixing == MixingConfig()
    assert recipe.config.distillation.distiller == TrainConfig().distillation.distiller


@pytest.mark.parametrize("name", NAMES)
def test_its_networks_can_be_built_and_its_hours_are_plausible(name: str) -> None:
    recipe = load_recipe(name)
    config, known = recipe.config, NAMED[recipe.config.dataset.data]
    size = config.dataset.image_size or known.size
    slowest = max(operations(network, known.classes, size) for network in config.peers)
    estimated = re.match(r"([\d.]+) by plan --tflops (\d+) --bandwidth 100 --latency 30", recipe.header["GPU-hours"])
    assert estimated
    hours, tflops = map(float, estimated.groups())
    images = config.dataset.train_limit or known.train
    # All peers wait for the slowest. On top come evaluations, about a third of training as many images, and exchanges.
    hours_per_image = len(config.peers) * config.epochs * slowest / (tflops * 1e12) / 3600
    watched = config.dataset.validation_fraction * known.train or known.test
    assert 0.95 * images * hours_per_image <= hours <= 1.25 * (images + watched / 3) * hours_per_image


def test_recipes_of_one_protocol_agree() -> None:
    by_protocol: dict[str, list[dict[str, object]]] = {}
    for recipe in map(load_recipe, NAMES):
        settings = {k: v for k, v in flatten(recipe.config).items() if k not in ("data", "peers")}
        by_protocol.setdefault(recipe.header["protocol"], []).append(settings)
    assert [len(set(map(repr, group))) for group in by_protocol.values()] == [1] * len(by_protocol)
    assert len(by_protocol) < len(NAMES) / 3


def test_a_header_is_read_by_topic() -> None:
    text = "# Two peers. source: none here\n# source: a\n#   and b\n# expected: 1: 2\n#   3\nlr: 1\n# protocol: no\n"
    assert read_header(text) == {"source": "a and b", "expected": "1: 2 3"}
    assert read_header("lr: 1\n") == {}


@pytest.mark.parametrize("order", ["recipe first", "recipe last", "joined"])
def test_flags_override_a_recipe_wherever_they_stand(order: str) -> None:
    given = ["--recipe=cifar100-resnet32"] if order == "joined" else ["--recipe", "cifar100-resnet32"]
    flags = ["--epochs", "9", "--kd-warmup-epochs", "2", "--mixer", "none"]
    config = parsed(*([*flags, *given] if order == "recipe last" else [*given, *flags]))
    expected = {**flatten(read_recipe("cifar100-resnet32")), "epochs": 9, "kd_warmup_epochs": 2.0, "mixer": "none"}
    assert flatten(config) == expected


def test_a_run_can_be_repeated_without_the_recipe(tmp_path: Path) -> None:
    config = parsed("--recipe", "imagenet-resnet18-resnet34", "--seed", "3")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert read_yaml(file) == config
    assert set(sections()) <= set(re.findall(r"^\s*(\w+):", file.read_text(), flags=re.MULTILINE))


def test_plans_take_recipes_too() -> None:
    config = metamixer_ray.plan.parse_plan(["--recipe", "low-data-cifar10", "--epochs", "5"]).training
    assert (config.epochs, config.batch_size, config.dataset.train_limit) == (5, 64, 2000)


@pytest.mark.parametrize(("flags", "epochs"), [([], 200), (["--epochs", "5"], 5)])
def test_sweeps_take_recipes_too(flags: Sequence[str], epochs: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert metamixer_ray.tune.main(["--recipe", "low-data-cifar10", "--grace-epochs", "500", *flags]) == 2
    assert f"between 1 and the {epochs} --epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--recipe", "cifar100-resnet33"], "no recipe 'cifar100-resnet33'. Did you mean cifar100-resnet32"),
        (["--recipe", "xyzzy"], "no recipe 'xyzzy'. --recipe list shows them"),
        (["--recipe", "../recipes/low-data-cifar10"], "no recipe '../recipes/low-data-cifar10'"),
        (["--recipe"], "no recipe ''"),
        (["--recipe", "cifar10-vgg16", "--config", "x.yaml"], "--recipe cifar10-vgg16 and --config x.yaml: start"),
        (["--config=x.yaml", "--recipe=low-data-cifar10"], "--config x.yaml and --recipe low-data-cifar10: start"),
        (["--recipe", "a", "--recipe", "b"], "--recipe a and --recipe b: start from one of them"),
        (["--recipe", "cifar10-resnet32", "--epochs", "3"], "--kd-warmup-epochs 80"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_meant_gets_one_clear_error(
    command: Command, words: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(words) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("command", [metamixer_ray.train.main, metamixer_ray.tune.main])
def test_imagenet_must_be_somewhere(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--recipe", "imagenet-resnet34"]) == 2
    assert "--data imagenet: it is not downloaded, so say where it is" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_has_a_line_for_every_recipe(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(["--recipe", "list"])
    assert caught.value.code == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(NAMES)]] == NAMES
    assert lines[len(NAMES)] == ""
    assert max(map(len, [header, *lines[: len(NAMES)]])) <= 120
    starts = [match.start() for match in re.finditer(r"\S+( \S+)*", header)]
    assert len(starts) == 5
    for line in lines[: len(NAMES)]:
        assert all(line[start] != " " and line[start - 1] == " " for start in starts[1:]), line


def test_an_installed_package_has_the_recipes(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    for name in ("metamixer_ray", "tune_spaces"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, "dist"], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert {f"metamixer_ray/recipes/{name}.yaml" for name in NAMES} <= set(zipfile.ZipFile(wheel).namelist())


def test_a_wrong_recipe_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("epoch: 3\n")
    with pytest.raises(ConfigError, match=r"^--recipe wrong: unknown setting 'epoch'; did you mean 'epochs'\?"):
        read_yaml(file, source="--recipe wrong")
