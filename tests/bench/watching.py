"""Looking at the project's own functions while they run, in the processes of the bench only."""

import functools
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather",
    "all_gather_single",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "isend",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)


def rebind(original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Put ``replacement`` wherever the project, or ``torch.distributed`` itself, holds ``original`` by a name."""
    found = 0
    for name, module in list(sys.modules.items()):
        # Not the modules inside torch.distributed, whose functions call each other.
        if not (name.startswith("metamixer_ray") or name == "torch.distributed"):
            continue
        for key, value in list(vars(module).items()):
            if value is original:
                setattr(module, key, replacement)
                found += 1
    if not found:
        raise LookupError(f"nothing in the project is called {original!r}: the bench must follow a change")


class Stopwatch:
    """Seconds by name: the sum over all calls of the functions that were given this name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return timed

    def time_everywhere(self, name: str, *functions: Callable[..., Any]) -> None:
        """Time functions of the project wherever it uses them."""
        for function in functions:
            rebind(function, self.time(name, function))

    def time_iteration(self, name: str, function: Callable[..., Iterator[Any]]) -> None:
        """Time how long the items are waited for of what ``function`` returns."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            advance = self.time(name, functools.partial(next, function(*args, **kwargs), None))
            return iter(advance, None)

        rebind(function, timed)

    def take(self) -> dict[str, float]:
        """The seconds since the last look."""
        seconds = dict(self.seconds)
        self.seconds.clear()
        return seconds


class CallCounter:
    """Counts this process's calls of torch.distributed's collectives and messages."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        originals = {getattr(dist, name): name for name in COLLECTIVES if hasattr(dist, name)}
        for original, name in originals.items():
            rebind(original, self._counted(name, original))

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return original(*args, **kwargs)

        return counted

    def take(self) -> dict[str, int]:
        """The calls since the last look."""
        calls = dict(self.calls)
        self.calls.clear()
        return calls
