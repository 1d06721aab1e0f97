"""What a person sees of a training: a few opening lines, one line per epoch, a closing table.

On a terminal a live bar stays under the lines; elsewhere (job logs, files) there are plain lines without
control characters. Both show the same text.
"""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from metamixer_ray.masking import masked
from metamixer_ray.printing import lenient
from metamixer_ray.tracking.rows import Row, evaluated, mean, number, peer_names
from metamixer_ray.tracking.summary import Places, RunSummary, count, decimal, percent, score_table

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress, TaskID

_PLAIN_WIDTH = 110
_QUIET_SECONDS = 300.0
_GAP = "  "


class Console:
    """Prints one training to a stream.

    Args:
        verbose: adds to each epoch its losses and what the exchange cost.
        stream: where to print; default: standard output as it is at this moment.
        width: columns to fill; default: the terminal's, or 110 where there is none.
    """

    def __init__(self, verbose: bool = False, stream: TextIO | None = None, width: int | None = None) -> None:
        self._stream = lenient(stream if stream is not None else sys.stdout)
        self._verbose = verbose
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        columns = shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns if self._live else _PLAIN_WIDTH
        self._width = max(width or columns, 40)
        self._epochs = self._done = 0
        self._last_line = time.monotonic()
        self._columns: _Columns | None = None
        self._recent: list[float] = []
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._rich: RichConsole | None = None
        if self._live:
            from rich import console

            self._rich = console.Console(file=self._stream, width=self._width, highlight=False)

    def opening(self, summary: RunSummary) -> None:
        """Say what will run and where it is kept."""
        self._epochs = summary.epochs
        kinds: dict[tuple[str, int], int] = {}
        for peer in summary.peers:
            kind = (
                peer.name.partition("-")[2] or peer.name if peer.name[:1].isdigit() else peer.name,
                peer.parameters,
            )
            kinds[kind] = kinds.get(kind, 0) + 1
        networks = [
            f"{f'{times} x ' if times > 1 else ''}{name} ({count(parameters)})"
            for (name, parameters), times in kinds.items()
        ]
        facts = [
            ("peers", ", ".join(networks)),
            ("data", summary.data),
            ("method", f"{summary.mixer}; {summary.distiller}"),
            (
                "training",
                f"{summary.epochs} epochs x {summary.steps_per_epoch} steps of {summary.batch_size} images; "
                f"{summary.placement}",
            ),
            ("folder", summary.run_folder),
        ]
        self._say(summary.name, style="bold")
        for name, text in facts:
            self._say(f"{name:<9} {text}")

    def epoch(self, row: Row) -> None:
        """One line for an epoch, and the bar moves on."""
        if self._columns is None:
            self._columns = _Columns(peer_names([row]), self._epochs, self._width)
            self._say("")
            self._say(self._columns.header(), style="bold")
        self._done = int(row["epoch"])
        seconds = number(row, "seconds")
        if seconds is not None:
            self._recent = [*self._recent[-4:], seconds]
        left = (mean(self._recent) or 0.0) * max(self._epochs - int(row["epoch"]), 0)
        self._start_bar()
        self._say(self._columns.line(row, left))
        if self._verbose:
            self._say(f"{'':8}{_details(row)}", style="dim")
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=int(row["epoch"]), left=duration(left))

    def step(self, epoch: int, step: int, steps: int) -> None:
        """Move the live bar inside an epoch; without a terminal, a plain line when nothing was printed for minutes.

        Args:
            epoch: the running one, from 1.
            step: how many of its ``steps`` are done.
        """
        if epoch <= self._done:
            return  # news from before the last line
        self._start_bar()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=epoch - 1 + step / max(steps, 1))
        elif self._rich is None and time.monotonic() - self._last_line >= _QUIET_SECONDS:
            self._say(f"{f'{epoch}/{self._epochs}':>9}  step {step:,} of {steps:,}")

    def note(self, text: str) -> None:
        """One line in between."""
        self._say(text, style="dim")

    def warn(self, text: str) -> None:
        """One line that asks for attention."""
        self._say(f"warning: {text}", style="yellow")

    def closing(self, row: Row, places: Places, alone: Sequence[float | None] | None = None) -> None:
        """The table of the last epoch's scores, and where everything is.

        Args:
            row: the last epoch's row.
            places: where the run left its things.
            alone: top-1 of each peer's network trained alone (fractions), for the gain.
        """
        self.close()
        header, lines = score_table(row, alone)
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        self._say("")
        self._say(_aligned(header, widths), style="bold")
        for line in lines:
            self._say(_aligned(line, widths), style="bold" if line[0] == "ensemble" else None)
        facts = [f"{row.get('split', 'test')} split, epoch {row['epoch']}"]
        if (agreement := number(row, "agreement")) is not None:
            facts.append(f"the peers agree on {percent(agreement)} % of the images")
        if (elapsed := number(row, "elapsed")) is not None:
            facts.append(f"trained for {duration(elapsed)}")
        self._say("; ".join(facts), style="dim")
        self._say("")
        for name, place in (
            ("folder", places.run_folder),
            ("figures", places.figures),
            ("MLflow", places.tracking),
            ("open it", places.ui_command),
        ):
            if place:
                self._say(f"{name:<9} {place}")

    def close(self) -> None:
        """Take the live bar away; safe to call more than once."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _start_bar(self) -> None:
        if self._rich is None or self._progress is not None or self._epochs == 0:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[left]} left"),
            console=self._rich,
            transient=True,
        )
        self._task = self._progress.add_task("", total=self._epochs, left="-")
        self._progress.start()

    def _say(self, text: str, style: str | None = None) -> None:
        text = masked(text).rstrip()
        self._last_line = time.monotonic()
        if self._rich is not None:
            self._rich.print(text, style=style, markup=False, soft_wrap=True)
            return
        print(text, file=self._stream, flush=True)


class _Columns:
    """The epoch lines' layout: a column per peer where they fit, else one column with their range."""

    def __init__(self, names: Sequence[str], epochs: int, width: int) -> None:
        self._epochs = epochs
        self._each = True
        self._several = len(names) > 1
        # Below full names, peers are numbered: they stand in the order of the opening line.
        for titles in (list(names), [f"peer{i}" for i in range(len(names))], [f"peers 0-{len(names) - 1}"]):
            self._each = len(titles) == len(names)
            body = [max(len(title), 7 if self._each else 14) for title in titles]
            titles = [*titles, *(["ensemble"] if self._several else [])]
            self._titles = ["epoch", "loss", *titles, "images/s", "left"]
            self._widths = [max(2 * len(str(epochs)) + 1, 5), 7, *body, *([8] if self._several else []), 8, 8]
            if len(self.header()) <= width:
                break

    def header(self) -> str:
        return _aligned(self._titles, self._widths, first_left=False)

    def line(self, row: Row, left: float) -> str:
        tested = evaluated(row)
        key = "top1" if tested else "train_top1"
        values = [number(peer, key) for peer in row["peers"]]
        if self._each:
            cells = [_percent_sign(value) for value in values]
        else:
            known = [value for value in values if value is not None]
            cells = [f"{percent(min(known))}-{_percent_sign(max(known))}" if known else "-"]
        if self._several:
            cells.append(_percent_sign(number(row.get("ensemble"), "top1")) if tested else "")
        loss = mean([number(peer, "loss") for peer in row["peers"]])
        speed = number(row, "images_per_second")
        text = _aligned(
            [
                f"{row['epoch']}/{self._epochs}",
                _loss(loss),
                *cells,
                "-" if speed is None else f"{speed:,.0f}",
                duration(left),
            ],
            self._widths,
            first_left=False,
        )
        return text + ("" if tested else "  (on training images)")


def duration(seconds: float) -> str:
    """Seconds as ``m:ss``, ``h:mm:ss`` or ``3d 04h``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _loss(value: float | None) -> str:
    """In seven characters, also where training has gone wrong: ``2.300``, ``1.4e+08``."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}" if abs(value) < 10_000 else f"{value:.1e}"


def _percent_sign(value: float | None) -> str:
    return "-" if value is None else f"{percent(value)}%"


def _details(row: Row) -> str:
    parts = []
    for key in ("cross_entropy", "kd", "statistics", "lr"):
        if (value := mean([number(peer, key) for peer in row["peers"]])) is not None:
            parts.append(f"{key.replace('_', ' ')} {decimal(value)}")
    exchange = row.get("exchange")
    if (seconds := number(exchange, "seconds_per_step")) is not None:
        parts.append(f"exchange {1000 * seconds:.2f} ms/step")
    if (waiting := number(exchange, "wait_fraction")) is not None:
        parts.append(f"waiting {percent(waiting)} %")
    if skipped := number(row, "skipped_steps"):
        parts.append(f"{skipped:.0f} steps skipped")
    return ", ".join(parts)


def _aligned(cells: Sequence[str], widths: Sequence[int], *, first_left: bool = True) -> str:
    first = cells[0].ljust(widths[0]) if first_left else cells[0].rjust(widths[0])
    return _GAP.join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))])
