"""What ran, where and from which code: recorded as tags so that a run can be understood and repeated."""

import contextlib
import getpass
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from metamixer_ray.masking import masked, masked_uri

# In which Ray tells a job's driver about the job.
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_PACKAGES = ("metamixer-ray", "torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow")


def environment_tags() -> dict[str, str]:
    """Versions of Python and packages, host, hardware, user and code, as tags. No variables, no secrets."""
    tags = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            tags[package.replace("-", "_")] = version(package)
    tags |= {"host": socket.gethostname(), "platform": platform.platform(), "hardware": hardware()}
    with contextlib.suppress(Exception):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit[0]
        tags["git_changes"] = "uncommitted changes" if commit[1] else "none"
    return tags


def source_tags(command: str) -> dict[str, str]:
    """The tags with which MLflow's UI shows where a run came from."""
    submission = ray_job()
    # The UI shows what follows the last slash of the name, so the arguments have a tag of their own.
    program = " ".join(command.split()[:3])
    return {
        "mlflow.source.name": masked(program),
        "mlflow.source.type": "LOCAL" if submission is None else "JOB",
        "command": masked(command),
    } | ({} if submission is None else {"ray_job": submission})


def ray_job() -> str | None:
    """The submission id of the Ray job that this process belongs to, as ``ray job logs`` takes it; None outside one."""
    try:
        metadata = json.loads(os.environ[_JOB_VARIABLE])["metadata"]
        return str(metadata["job_submission_id"])
    except (KeyError, TypeError, ValueError):
        return None


def repeat_command(module: str, *, instead: Sequence[str] = ()) -> str:
    """The shell line that repeats this program, secrets masked: ``python -m <module> <arguments>``.

    Where another program runs, such as a notebook, whose arguments mean something else, those are ``instead``.
    """
    running = getattr(sys.modules.get("__main__"), "__spec__", None)
    arguments = sys.argv[1:] if running is not None and running.name == module else instead
    words = ["python", "-m", module, *arguments]
    return masked(shlex.join(map(masked_uri, words)))


def hardware() -> str:
    """This machine in one line, such as ``AMD EPYC 7763, 64 cores, 512 GB; 8 x NVIDIA A100-SXM4-80GB``."""
    import psutil
    import torch

    parts = f"{_processor()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    counts = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    return "; ".join([parts, *counts])


def git_commit(folder: Path = Path(__file__).parent) -> tuple[str, bool] | None:
    """Commit of the repository that tracks this package's files, and whether they changed since; else None.

    A repository that only happens to lie above an installed copy is not taken for it.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(folder, "rev-parse", "HEAD")
        return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".."))
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()
