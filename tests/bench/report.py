"""What a section hands back, and how all of it is shown: a header, a table of ratios, JSON."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from metamixer_ray.precision import native_bf16

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "pyarrow", "numpy", "pytorch-dml")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a figure of ours, and what it is compared with where there is something."""

    section: str
    what: str
    ours: float
    unit: str
    versus: str = ""
    """What it is compared with."""
    other: float | None = None
    """The figure of that."""
    ratio: float | None = None
    """Ours / other: the median of the ratios of the rounds, each of which ran both right after one another."""
    low: float | None = None
    high: float | None = None
    """The smallest and the largest ratio of a round."""
    wanted: str = ""
    """What the ratio (or the figure, where there is none) should be on an idle machine."""


Measure = Callable[[int], list[Row]]
"""A section: takes the number of rounds."""


def single(section: str, what: str, values: Sequence[float], unit: str, *, wanted: str = "") -> Row:
    """A figure of its own: the median over rounds."""
    return Row(section=section, what=what, ours=median(values), unit=unit, wanted=wanted)


def compared(
    section: str,
    what: str,
    ours: Sequence[float],
    versus: str,
    others: Sequence[float],
    unit: str,
    *,
    wanted: str = "",
) -> Row:
    """Two figures that were measured in turn, round by round."""
    ratios = [one / other for one, other in zip(ours, others, strict=True)]
    return Row(
        section=section,
        what=what,
        ours=median(ours),
        unit=unit,
        versus=versus,
        other=median(others),
        ratio=median(ratios),
        low=min(ratios),
        high=max(ratios),
        wanted=wanted,
    )


def machine(rounds: int) -> dict[str, Any]:
    """Where and with what this was measured."""
    cores = len(os.sched_getaffinity(0))
    return {
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "native_bf16": native_bf16(torch.device("cpu")),
        "load_before": round(os.getloadavg()[0], 2),
        "rounds": rounds,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def show(header: dict[str, Any], rows: Iterable[Row]) -> None:
    """Print the header and the table."""
    console = Console(width=None if os.isatty(1) else 150, highlight=False)
    busy = " (the machine was not idle)" if header["load_before"] > 0.5 else ""
    packages = ", ".join(f"{name} {number}" for name, number in header["packages"].items())
    console.print(
        f"{header['processor']}, {header['cores']} cores, {header['memory_gib']} GiB, "
        f"bf16 {'native' if header['native_bf16'] else 'emulated'}, {header['system']}\n"
        f"Python {header['python']}, {packages}; commit {header['commit']}\n"
        f"{header['when']}, medians of {header['rounds']} rounds; load before: {header['load_before']}{busy}\n"
    )
    for section, lines in groupby(rows, key=lambda row: row.section):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=section, title_justify="left", title_style="bold")
        for name in ("", "ours", "other", "compared with", "ratio", "(of all rounds)", "wanted"):
            right = name in ("ours", "other", "ratio")
            table.add_column(name, justify="right" if right else "left", no_wrap=name not in ("", "compared with"))
        for row in lines:
            table.add_row(
                row.what,
                f"{_digits(row.ours)} {row.unit}",
                "" if row.other is None else f"{_digits(row.other)} {row.unit}",
                row.versus,
                "" if row.ratio is None else f"{row.ratio:.3f}",
                "" if row.low is None or row.high is None else f"({row.low:.2f} to {row.high:.2f})",
                row.wanted,
            )
        console.print(table)


def write_json(path: Path, header: dict[str, Any], rows: Iterable[Row]) -> None:
    """``{"machine": header, "rows": [...]}``, a row's fields as in :class:`Row`."""
    path.write_text(json.dumps({"machine": header, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    here = Path(__file__).parent
    try:
        said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, cwd=here)
    except OSError:
        return "unknown"
    return f"{said.stdout.strip() or 'unknown'}{' with changes' if changed.stdout else ''}"
