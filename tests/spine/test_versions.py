"""The oldest versions that are asked for are those that `.ci/run oldest` installs."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import Specifier
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def floors(requirements: list[str]) -> dict[str, Version]:
    """By name, the version after ``>=`` or ``==``."""
    found = {}
    for line in requirements:
        requirement = Requirement(line)
        (bound,) = requirement.specifier
        assert isinstance(bound, Specifier)
        assert bound.operator in (">=", "=="), line
        found[requirement.name] = Version(bound.version)
    return found


def test_the_oldest_versions_allowed_are_the_oldest_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = floors(project["dependencies"] + project["optional-dependencies"]["export"])
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    assert floors([line for line in lines if not line.startswith("#")]) == allowed
