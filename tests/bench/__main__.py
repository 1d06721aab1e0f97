"""The bench: ``python -m tests.bench`` from the repository's root."""

import importlib
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Section = Literal["limit", "textbook", "peers", "classes-batch", "data", "streaming", "start", "epoch"]
SECTIONS: tuple[Section, ...] = ("limit", "textbook", "peers", "classes-batch", "data", "streaming", "start", "epoch")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure and print a table of ratios: ours to what it is compared with, both run in turn.

    All sections take about 20 minutes on an idle machine of two cores. Nothing is asserted; a busy machine blurs the
    figures, most of all those in seconds and images/s.
    """

    only: tuple[Section, ...] = SECTIONS
    """Sections to run: limit (against a bare loop), textbook (against what a user would write), peers (2 to 16),
    classes-batch (bytes and collectives), data (loader and memory), streaming (JPEGs that stay encoded), start (of the
    command), epoch (evaluation and checkpoints)."""
    rounds: int = 5
    """Rounds of each pair; what is printed are medians."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the header and all rows to this file too."""


def main() -> None:
    """The command."""
    options = tyro.cli(Options, prog="python -m tests.bench")
    if options.rounds < 1:
        sys.exit("error: --rounds must be at least 1")
    with tempfile.TemporaryDirectory(prefix="metamixer_ray-bench-") as folder:
        # Before anything of the project is imported, here or in a process that inherits this.
        os.environ["METAMIXER_HOME"] = folder
        os.environ["METAMIXER_CACHE"] = str(Path(folder) / "cache")
        report = importlib.import_module("tests.bench.report")
        header = report.machine(options.rounds)
        rows = []
        for section in options.only:
            print(f"measuring: {section}", file=sys.stderr, flush=True)
            rows += importlib.import_module(f"tests.bench.{section.replace('-', '_')}").measure(options.rounds)
    report.show(header, rows)
    if options.json is not None:
        report.write_json(options.json, header, rows)


if __name__ == "__main__":
    main()
