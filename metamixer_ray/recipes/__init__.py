"""Published conditions by name: one YAML file each, the data, networks and schedule that its numbers belong to.

A file is a configuration like any other. It doesn't say how to mix and whom to imitate, which is what one compares
under a condition: that is the default or a flag. The comment before its settings has these topics, each on one line or
more (further lines are indented):

    source      whose condition it is
    protocol    which of them, in a few words; files of one protocol agree on all but the data and the peers
    expected    the published top-1 in percent, the first before a semicolon; or that there is none
    GPU-hours   what ``metamixer_ray.plan`` estimates, and under which assumptions
    differs     where training here is known to differ from it
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from metamixer_ray.config import TrainConfig, read_yaml
from metamixer_ray.errors import ConfigError

FOLDER = Path(__file__).parent
TOPICS = ("source", "protocol", "expected", "GPU-hours", "differs")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One file."""

    name: str
    config: TrainConfig
    header: Mapping[str, str]
    """What the file's comment says to each topic."""


def recipe_names() -> list[str]:
    """All recipes, in the order of the alphabet."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> TrainConfig:
    """The configuration of the recipe ``name``.

    Raises:
        ConfigError: there is none of that name.
    """
    return load_recipe(name).config


def load_recipe(name: str) -> Recipe:
    """The recipe ``name``.

    Raises:
        ConfigError: there is none of that name.
    """
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"--recipe: there is no recipe {name!r}.{hint} --recipe list shows them")
    path = FOLDER / f"{name}.yaml"
    config = read_yaml(path, source=f"--recipe {name}")
    return Recipe(name=name, config=config, header=read_header(path.read_text()))


def read_header(text: str) -> dict[str, str]:
    """The topics of the comment that ``text`` begins with."""
    header: dict[str, str] = {}
    topic = None
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        named = re.match(rf"# ({'|'.join(TOPICS)}): +(.*)", line)
        if named:
            topic, words = named.groups()
            header[topic] = words
        elif topic:
            header[topic] += " " + line.removeprefix("#").strip()
    return header


def recipe_table() -> str:
    """All recipes as aligned text, a line each."""
    rows = [["recipe", "data", "networks", "expected top-1 %", "GPU-hours"]]
    for recipe in map(load_recipe, recipe_names()):
        rows.append(
            [
                recipe.name,
                recipe.config.dataset.data,
                networks_text(recipe.config.peers),
                recipe.header["expected"].partition(";")[0],
                recipe.header["GPU-hours"].partition(" ")[0],
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", "Source, protocol, all numbers and assumptions stand in the files:", str(FOLDER)])


def networks_text(peers: tuple[str, ...]) -> str:
    """The peers in a few words: ``2 x resnet32-okd``, ``resnet18 + resnet34``."""
    if len(set(peers)) == 1:
        return f"{len(peers)} x {peers[0]}"
    return " + ".join(peers)
