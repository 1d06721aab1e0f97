"""What a person sees of a sweep: a line per trial that ended, and on a terminal a short table of those that run."""

import os
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from metamixer_ray.masking import masked
from metamixer_ray.printing import lenient

MOST_ROWS = 8
"""Of running trials in the live table."""
# What stands before the settings of a trial, and what they take at least.
_BEFORE = 46
_LEAST = 64


class TrialView(Protocol):
    """What the board shows of a trial."""

    @property
    def number(self) -> int:
        """Its number."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What differs from the defaults."""

    @property
    def status(self) -> str:
        """running, finished, stopped or failed."""

    @property
    def reason(self) -> str:
        """Why it failed."""

    @property
    def epochs(self) -> int:
        """Trained so far."""

    @property
    def objective(self) -> float | None:
        """At its last epoch."""


class Board:
    """A sweep on the console. Plain lines without control characters where the output is no terminal.

    Args:
        samples: trials in all.
        epochs: of a whole trial.
        nll: whether the objective is a negative log-likelihood and not a share of hits.
        stream: where to write; default: standard output.
    """

    def __init__(self, samples: int, epochs: int, *, nll: bool = False, stream: TextIO | None = None) -> None:
        self._stream = lenient(stream if stream is not None else sys.stdout)
        self._samples, self._epochs, self._nll = samples, epochs, nll
        self._running: dict[int, TrialView] = {}
        self._ended = 0
        self._best: TrialView | None = None
        self._began = time.monotonic()
        self._header = False
        self._width = max(_LEAST, shutil.get_terminal_size((160, 24)).columns - _BEFORE)
        self._live: Any = None
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream, highlight=False), transient=True, auto_refresh=False)
            self._live.start()

    def known(self, trial: TrialView) -> None:
        """A trial that ended before the sweep was resumed."""
        self._ended += 1
        self._compare(trial)

    def running(self, trial: TrialView) -> None:
        """A trial began, or finished an epoch."""
        self._running[trial.number] = trial
        self._refresh()

    def over(self, trial: TrialView) -> None:
        """A trial ended: a line."""
        self._running.pop(trial.number, None)
        self._ended += 1
        self._compare(trial)
        if not self._header:
            self._header = True
            self.say(f"{'trial':>9}  {'':8} {'epochs':>7} {self._title():>8} {'best':>8}  settings")
        best = "-" if self._best is None else self.value(self._best.objective)
        text = trial.reason if trial.status == "failed" else settings_text(trial.settings, self._width)
        epochs = f"{trial.epochs}/{self._epochs}"
        of = f"{self._ended}/{self._samples}"
        self.say(f"{of:>9}  {trial.status:8} {epochs:>7} {self.value(trial.objective):>8} {best:>8}  {text}")
        self._refresh()

    def next(self, samples: int) -> "Board":
        """A board for further trials, in place of this one."""
        self.close()
        return Board(samples, self._epochs, nll=self._nll, stream=self._stream)

    def warn(self, text: str) -> None:
        """A line that asks for attention."""
        self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """A line; secrets in it are masked."""
        text = masked(text)
        if self._live is not None:
            self._live.console.print(text.rstrip(), markup=False, soft_wrap=True)
            return
        print(text.rstrip(), file=self._stream, flush=True)

    def close(self) -> None:
        """Take the live table away; safe to call more than once."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def value(self, objective: float | None) -> str:
        """An objective as text: percent, or nats."""
        if objective is None:
            return "-"
        return f"{objective:.4f}" if self._nll else f"{100 * objective:.2f} %"

    def _title(self) -> str:
        return "NLL" if self._nll else "top-1"

    def _compare(self, trial: TrialView) -> None:
        if trial.status != "finished" or trial.objective is None:
            return
        if (
            self._best is None
            or self._best.objective is None
            or ((trial.objective < self._best.objective) if self._nll else (trial.objective > self._best.objective))
        ):
            self._best = trial

    def _refresh(self) -> None:
        if self._live is None:
            return
        from rich.table import Table

        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        best = "" if self._best is None else f", best {self.value(self._best.objective)} (trial {self._best.number})"
        table = Table.grid(padding=(0, 2))
        table.title = (
            f"{self._ended} of {self._samples} trials, {len(self._running)} running, {minutes}:{seconds:02}{best}"
        )
        table.title_justify = "left"
        for trial in list(self._running.values())[:MOST_ROWS]:
            table.add_row(
                f"trial {trial.number}",
                f"{trial.epochs}/{self._epochs}",
                self.value(trial.objective),
                settings_text(trial.settings, self._width),
            )
        if len(self._running) > MOST_ROWS:
            table.add_row("...", "", "", f"and {len(self._running) - MOST_ROWS} more")
        self._live.update(table, refresh=True)


def settings_text(settings: Mapping[str, Any], length: int) -> str:
    """Settings on one line, what was chosen by name first: ``pairing=free local_alpha=0.4``; none are ``defaults``."""
    words: list[tuple[bool, str]] = []
    for name, value in settings.items():
        items = value if isinstance(value, list | tuple) else [value]
        text = ",".join(f"{item:.3g}" if isinstance(item, float) else str(item) for item in items)
        words.append((not all(isinstance(item, str) for item in items), f"{name}={text}"))
    line = " ".join(word for _, word in sorted(words, key=lambda word: word[0])) or "defaults"
    return line if len(line) <= length else line[: length - 3] + "..."
