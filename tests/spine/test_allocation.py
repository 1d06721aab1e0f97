"""Memory that is kept: set in a process of its own, because it stays set."""

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys
from metamixer_ray.allocation import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import torch
def step():
    return [torch.ones(2**20) for _ in range(4)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these thresholds")
def test_pages_are_used_again() -> None:
    faults = {}
    for how in ("keep", "default"):
        done = subprocess.run(
            [sys.executable, "-c", COUNT_FAULTS, how], capture_output=True, text=True, check=True, timeout=120
        )
        faults[how] = int(done.stdout)
    # Ten steps of 16 MB are 40,960 pages of 4 kB.
    assert faults["keep"] < 0.2 * faults["default"]
