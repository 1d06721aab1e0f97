"""Memory that is kept: set in a process of its own, because it stays set."""

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource
from metamixer_ray.allocation import keep_freed_memory
assert keep_freed_memory()
import torch
def step():
    return [torch.ones(2**20) for _ in range(4)]
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these thresholds")
def test_pages_are_used_again() -> None:
    # More than once: without kept memory most processes, but not all, fault their 4096 pages anew in every step.
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True, timeout=120
        )
        assert int(done.stdout) < 4096
