"""What the image holds."""

import re
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[2]


def pinned() -> dict[str, Version]:
    """Versions in ``constraints.txt`` by package; the file has a version of each line."""
    lines = (ROOT / "cluster" / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    found = {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in pairs}
    assert len(found) == len(pairs)
    return found
