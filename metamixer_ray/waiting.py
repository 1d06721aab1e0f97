"""Waiting for a place on the cluster: said at once, said again while it lasts, and what it was that was missing."""

import time
from collections.abc import Callable

AGAIN_SECONDS = 300.0
"""Between two lines that say the same."""
IN_PIECES = "Ray to place the workers: what is free seems enough, but may be in pieces, or on nodes with other labels"


class Waiting:
    """What a person is told while workers wait for nodes or for what others have reserved.

    Args:
        missing: what there is no room for at this moment; None when there is room for all.
        tell: takes a line.
        clock: the time in seconds since the epoch.
    """

    def __init__(
        self, missing: Callable[[], str | None], tell: Callable[[str], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._missing, self._tell, self._clock = missing, tell, clock
        self._since: float | None = None
        self._told: tuple[str, float] | None = None

    def begin(self) -> None:
        """The workers ask for their place from now on."""
        self._since = self._clock()

    def look(self, *, in_vain: bool = False) -> None:
        """They ask still; a line when something else is missing than before, or when it has been for long.

        Args:
            in_vain: whether Ray has looked for their place, and found none.
        """
        now = self._clock()
        if self._since is None:
            self._since = now
        lacking = self._missing() or (IN_PIECES if in_vain else None)
        if lacking is None or (
            self._told is not None and lacking == self._told[0] and now < self._told[1] + AGAIN_SECONDS
        ):
            return
        self._told = (lacking, now)
        self._tell(f"waiting since {time.strftime('%H:%M:%S', time.localtime(self._since))} for {lacking}")

    def end(self) -> None:
        """They have their place; said if waiting was."""
        if self._told is not None and self._since is not None:
            minutes, seconds = divmod(round(self._clock() - self._since), 60)
            self._tell(f"all workers have their place, after {minutes}:{seconds:02}")
        self._since = self._told = None
