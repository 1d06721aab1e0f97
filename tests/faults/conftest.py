"""Disks that fail for real. The suite of faults also uses the spine's processes that stay."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.disk import Disk, Unmountable, mounted
from tests.spine.conftest import pool, small

__all__ = ["disk", "pool", "small"]


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A disk of 2 MB, or of as many as the test says; whoever may not mount one skips the test."""
    with ExitStack() as stack:
        try:
            yield stack.enter_context(mounted(tmp_path / "disk", getattr(request, "param", 2)))
        except Unmountable as error:
            pytest.skip(f"a small disk can't be mounted here: {error}")
