"""What a sweep found: the best settings, what was gained over the defaults, and which settings mattered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from metamixer_ray.sweeps.ledger import Trial

# Fewer points than this say nothing about importance.
LEAST_POINTS = 8
_REPEATS = 20


@dataclass(frozen=True)
class Gain:
    """The best settings against the defaults, on seeds that the search never saw."""

    defaults: tuple[float, ...]
    best: tuple[float, ...]
    maximised: bool = True
    failed: tuple[str, ...] = ()
    """Of the further trainings those that failed: with what, and why. Their seeds count for neither."""

    @property
    def seeds(self) -> int:
        """Seeds on which both came to their end."""
        return len(self.best)

    @property
    def mean(self) -> float:
        """Mean difference over the seeds; positive where the best settings are better."""
        sign = 1.0 if self.maximised else -1.0
        return sign * fmean(b - d for b, d in zip(self.best, self.defaults, strict=True))

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the difference over the seeds; None for a single seed."""
        differences = [b - d for b, d in zip(self.best, self.defaults, strict=True)]
        return stdev(differences) if len(differences) > 1 else None


def ranked(trials: Sequence[Trial], *, maximised: bool) -> list[Trial]:
    """Trials that ran to their end, the best first; where none did, those that got furthest first."""
    whole = [trial for trial in trials if trial.status == "finished" and trial.objective is not None]
    some = [trial for trial in trials if trial.status == "stopped" and trial.objective is not None]
    sign = -1.0 if maximised else 1.0
    return sorted(whole or some, key=lambda t: (-t.epochs, sign * (t.objective or 0.0), t.number))


def importance(
    points: Sequence[Mapping[str, Any]], values: Sequence[float], *, seed: int = 0
) -> dict[str, tuple[float, float]] | None:
    """How much of the objective's variation a random forest explains with each setting (permutation importance).

    Args:
        points: settings; what a point doesn't have is what its choice made meaningless.
        values: what came of each, the same measure for all.

    Returns:
        Per setting the mean and the standard deviation of the loss in explained variance when its values are shuffled;
        None where there are too few points.
    """
    names = [name for name in sorted({n for p in points for n in p}) if len({repr(p.get(name)) for p in points}) > 1]
    if len(points) < LEAST_POINTS or not names:
        return None
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    columns = np.array([_column([point.get(name) for point in points]) for name in names]).T
    forest = RandomForestRegressor(n_estimators=200, random_state=seed, min_samples_leaf=2)
    forest.fit(columns, values)
    found = permutation_importance(forest, columns, values, n_repeats=_REPEATS, random_state=seed)
    pairs = zip(names, found.importances_mean, found.importances_std, strict=True)
    return {name: (float(mean), float(std)) for name, mean, std in sorted(pairs, key=lambda p: -p[1])}


def common_epoch(curves: Sequence[Mapping[int, float]]) -> int | None:
    """The last epoch that enough trials reached to be compared there: half of them, and no fewer than the least."""
    reached = sorted((max(curve) for curve in curves if curve), reverse=True)
    if not reached:
        return None
    enough = max(LEAST_POINTS, (len(reached) + 1) // 2)
    return reached[min(enough, len(reached)) - 1]


def _column(values: Sequence[Any]) -> list[float]:
    """Numbers as they are, all else numbered by its text; what is missing is below all."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values if value is not None):
        known = [float(value) for value in values if value is not None]
        below = min(known, default=0.0) - 1.0
        return [below if value is None else float(value) for value in values]
    texts = sorted({repr(value) for value in values})
    return [float(texts.index(repr(value))) for value in values]
