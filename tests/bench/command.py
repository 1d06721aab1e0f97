"""The training command with marks: what the bench's own copy of it notes, in the driver and in the workers.

``python -m tests.bench.command FLAGS`` is ``python -m metamixer_ray.train FLAGS``, which itself has no part in this:
the marks are put around its functions here. Each mark is a line of the file that $METAMIXER_BENCH_MARKS names.
"""

import time

_BEGAN = time.time()  # before anything heavy is imported

import functools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

MARKS = "METAMIXER_BENCH_MARKS"


def mark(name: str, began: float, ended: float, rank: int | None = None) -> None:
    """Append one mark: wall-clock seconds since 1970."""
    line = json.dumps({"name": name, "began": began, "ended": ended, "rank": rank}) + "\n"
    with open(os.environ[MARKS], "a") as file:
        file.write(line)


@contextmanager
def marked(name: str, rank: int | None = None) -> Iterator[None]:
    began = time.time()
    try:
        yield
    finally:
        mark(name, began, time.time(), rank)


def wrap(owner: Any, attribute: str, name: str, rank: int | None = None, only_first: bool = False) -> None:
    """Mark the calls of ``owner.attribute``."""
    original: Callable[..., Any] = getattr(owner, attribute)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if only_first:
            setattr(owner, attribute, original)
        with marked(name, rank):
            return original(*args, **kwargs)

    setattr(owner, attribute, wrapped)


def marking_worker(settings: Mapping[str, Any]) -> None:
    """What Ray Train runs on every worker in place of ``ray_worker``: the same, with marks."""
    began = time.time()
    import torch.distributed as dist

    from metamixer_ray import session, worker

    rank = dist.get_rank()
    mark("worker's imports", _BEGAN, began, rank)
    for name in ("load_splits", "set_up", "train_epoch", "evaluate_epoch"):
        wrap(worker, name, name, rank)
    wrap(worker, "learn", "first step", rank, only_first=True)
    wrap(session.RaySession, "report", "report", rank)
    session.ray_worker(settings)


def main() -> int:
    """The driver's side."""
    from metamixer_ray import fitting

    train = sys.modules.get("metamixer_ray.train") or __import__("metamixer_ray.train", fromlist=["main"])
    mark("imports", _BEGAN, time.time())
    wrap(train, "load_splits", "data")
    wrap(train, "connect", "Ray")
    wrap(train, "fit", "fit")
    # By its importable name, since this module is __main__ here and another in the workers.
    fitting.ray_worker = __import__("tests.bench.command", fromlist=["marking_worker"]).marking_worker
    status: int = train.main(sys.argv[1:])
    return status


def run(flags: list[str], folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Run the command in a Ray cluster of its own; when it was started, and all its marks.

    Raises:
        RuntimeError: the command failed; holds what it printed.
    """
    root = Path(__file__).parents[2]
    marks = folder / "marks.jsonl"
    marks.write_text("")
    environment = {
        **os.environ,
        MARKS: str(marks),
        "METAMIXER_HOME": str(folder),
        # A cluster that somebody runs here is not joined.
        "RAY_TMPDIR": str(folder / "ray"),
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "METAMIXER_STORAGE"):
        environment.pop(name, None)
    began = time.time()
    words = [sys.executable, "-m", "tests.bench.command", *flags]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the command failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return began, [json.loads(line) for line in marks.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
