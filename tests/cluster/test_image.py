"""The image has the project and its packages, each in one version that the project asks for, and no more rights or
files than it needs."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.cluster.image import pinned

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()


def asked() -> list[Requirement]:
    """What the project asks for, with the extras that the image installs."""
    extras = PROJECT["optional-dependencies"]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *extras["cloud"], *extras["export"]]]


@pytest.mark.parametrize("requirement", asked(), ids=lambda requirement: requirement.name)
def test_every_package_has_one_version_that_the_project_asks_for(requirement: Requirement) -> None:
    version = pinned()[re.sub(r"[-_.]+", "-", requirement.name).lower()]
    assert requirement.specifier.contains(version, prereleases=True)


def test_nothing_is_installed_in_a_version_of_its_own() -> None:
    installs = re.findall(r"pip install (.*)", DOCKERFILE)
    assert installs
    assert all("cluster/constraints.txt" in words for words in installs)


def test_python_is_one_that_the_project_asks_for() -> None:
    version = re.search(r"^FROM python:(\d+\.\d+\.\d+)-", DOCKERFILE, re.MULTILINE)
    assert version is not None
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version[1])


def test_the_image_has_the_version_of_the_project() -> None:
    assert f"REGISTRY/metamixer-ray:{PROJECT['version']}" in DOCKERFILE


def test_it_runs_as_nobody_special_and_holds_no_secret() -> None:
    users = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)
    assert users[-1] != "root"
    assert f"--uid 1000 --create-home --shell /bin/bash {users[-1]}" in DOCKERFILE
    assert not re.search(r"(?i)password|secret|api_key|auth_token\b|access_key", DOCKERFILE)


def test_what_is_copied_is_there_and_let_through() -> None:
    words = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    sources = [source for line in words for source in line]
    assert sources
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    assert "*" in patterns
    for source in sources:
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed)
