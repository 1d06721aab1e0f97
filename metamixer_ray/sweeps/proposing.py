"""Who says what is tried next: fixed points first, then HyperOpt, and in a resumed sweep first what was there already.

HyperOpt's Tree of Parzen Estimators is used directly and not through Ray's ``HyperOptSearch``, whose state is a pickle
and which can't be told of earlier points in a conditional space.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hyperopt import JOB_STATE_DONE, STATUS_OK, Domain, Trials, space_eval, tpe
from hyperopt.pyll import as_apply
from ray.tune.search import Searcher

from metamixer_ray.config import from_settings
from metamixer_ray.errors import UserError
from metamixer_ray.sweeps.ledger import Ledger, Trial
from metamixer_ray.sweeps.spaces import Settings, Space, flattened, locate

# Proposals whose settings can't work together, one after the other.
_ATTEMPTS = 50
_WORST_LOSS = 1e9


class Tpe:
    """Tree of Parzen Estimators (Bergstra et al. 2011) over a space.

    Args:
        seed: decides, together with what was told, what is proposed.
        random_first: so many points are drawn at random first.
        defaults: all settings of a training, which a point may change.
    """

    def __init__(self, space: Space, *, seed: int, random_first: int, defaults: Settings) -> None:
        self._seed, self._random_first, self._defaults = seed, random_first, defaults
        self._space = as_apply(dict(space))
        self._trials = Trials()
        # Of what it was told, so much was not drawn by it, or not tried.
        self._besides = 0
        self._domain = Domain(lambda point: point, self._space)

    def locate(self, settings: Settings) -> dict[str, Any]:
        """HyperOpt's labels of a point of somebody else; empty when the space doesn't hold it."""
        wanted = {**self._defaults, **settings}
        labels = locate(self._space, wanted) or {}
        meant = {**self._defaults, **flattened(space_eval(self._space, labels))} if labels else {}
        # What the labels don't say must be as it is by default.
        return labels if labels and from_settings(meant) == from_settings(wanted) else {}

    def propose(self, number: int, attempt: int = 0) -> tuple[Settings, dict[str, Any]]:
        """Settings for trial ``number``, and HyperOpt's labels of them to :meth:`tell` with."""
        (identifier,) = self._trials.new_trial_ids(1)
        rng = np.random.default_rng([self._seed, number, attempt])
        (document,) = tpe.suggest(
            [identifier],
            self._domain,
            self._trials,
            seed=int(rng.integers(2**31)),
            n_startup_jobs=self._random_first + self._besides,
            verbose=False,
        )
        labels = {label: _number(values[0]) for label, values in document["misc"]["vals"].items() if len(values)}
        return flattened(space_eval(self._space, labels)), labels

    def refuse(self, labels: Mapping[str, Any]) -> None:
        """A point can't work, and was not tried."""
        self.tell(labels, None, drawn=False)

    def tell(self, labels: Mapping[str, Any], score: float | None, *, drawn: bool = True) -> None:
        """How good a point was, the more the better; None when it failed.

        ``drawn``: it was proposed here, and tried.
        """
        self._besides += not drawn
        (identifier,) = self._trials.new_trial_ids(1)
        known = {node.pos_args[0].obj for node in _parameters(self._space)}
        misc = {
            "tid": identifier,
            "cmd": self._domain.cmd,
            "workdir": None,
            "idxs": {label: [identifier] if label in labels else [] for label in known},
            "vals": {label: [labels[label]] if label in labels else [] for label in known},
        }
        # A failure is worse than anything. HyperOpt's own kind of failure says nothing, and would be proposed again.
        result = {"status": STATUS_OK, "loss": _WORST_LOSS if score is None else -score}
        (document,) = self._trials.new_trial_docs([identifier], [None], [result], [misc])
        document["state"] = JOB_STATE_DONE
        self._trials.insert_trial_docs([document])
        self._trials.refresh()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the cluster, and the person, allow."""

    samples: int
    """Trials in all."""
    most: int
    """Trials at once."""
    places: Callable[[], int]
    """Workers that the cluster can hold now; asked again and again, since it may grow and shrink."""
    workers: Callable[[Settings], int]
    """The workers of a trial; raises ``UserError`` for settings that can't work together."""
    placeable: Callable[[int], object]
    """Raises ``UserError`` for more workers than there can ever be."""


class Proposer(Searcher):
    """Ray Tune's searcher of a sweep; gives what :class:`~metamixer_ray.sweeps.trial.PeersTrial` takes.

    Args:
        ledger: where trials are recorded. Those that it holds already as running go on first.
        points: settings to try first, each with its origin.
        tpe: proposes what comes after them; None when nothing does.
        limits: see there. One trial is begun even where there is no room now: nodes may come for it.
        never: is told the number of a trial of ``points`` that can't work, and why.
        left_out: is told once why tpe's proposals were left out.
        halted: whether nothing more is to be begun.
    """

    def __init__(
        self,
        ledger: Ledger,
        points: Sequence[tuple[Settings, str]],
        tpe: Tpe | None,
        limits: Limits,
        *,
        never: Callable[[int, str], None] = lambda number, reason: None,
        left_out: Callable[[str], None] = lambda reason: None,
        halted: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(metric="score", mode="max")
        self._ledger, self._tpe, self._limits = ledger, tpe, limits
        self._never, self._left_out, self._halted = never, left_out, halted
        self._again = [trial for trial in ledger.trials() if not trial.over]
        known = [trial.settings for trial in ledger.trials() if trial.origin != "tpe"]
        self._points = [point for point in points if point[0] not in known]
        self._running: dict[str, tuple[Trial, int]] = {}
        self._waiting: Trial | None = None
        self._told: set[str] = set()
        for trial in ledger.trials() if tpe is not None else ():
            self._remember(trial)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Nothing to set: all was given."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """See :class:`ray.tune.search.Searcher`."""
        if self._halted():
            return Searcher.FINISHED
        if self._waiting is None:
            if not self._has_room(1):
                # What is over there decides what comes next, so nothing is drawn before there is room for it.
                return None if self._more() else Searcher.FINISHED
            self._waiting = self._next()
        if (trial := self._waiting) is None:
            return Searcher.FINISHED
        workers = self._limits.workers(trial.settings)
        if not self._has_room(workers):
            return None
        self._waiting = None
        self._running[trial_id] = (trial, workers)
        return {"number": trial.number, "settings": trial.settings}

    def done(self) -> bool:
        """Whether nothing more will be proposed."""
        return self._halted() or (self._waiting is None and not self._more())

    def _has_room(self, workers: int) -> bool:
        if not self._running:
            return True
        taken = sum(size for _, size in self._running.values())
        return len(self._running) < self._limits.most and taken + workers <= self._limits.places()

    def _more(self) -> bool:
        unfinished = len(self._ledger.trials()) < self._limits.samples and bool(self._points or self._tpe)
        return bool(self._again) or unfinished

    def _next(self) -> Trial | None:
        """What is to be tried next; None when there is nothing more."""
        while self._more():
            if self._again:
                return self._again.pop(0)
            if not self._points:
                return self._propose(len(self._ledger.trials()))
            settings, origin = self._points.pop(0)
            trial = self._ledger.add(settings, origin, self._tpe.locate(settings) if self._tpe else None)
            try:
                self._check(trial.settings)
            except UserError as error:
                self._never(trial.number, str(error).splitlines()[0])
                self._tell(trial, None)
            else:
                return trial
        return None

    def _check(self, settings: Settings) -> None:
        self._limits.placeable(self._limits.workers(settings))

    def _remember(self, trial: Trial) -> None:
        """Tell what an earlier attempt of the sweep saw of a trial."""
        assert self._tpe is not None
        for labels in trial.refused:
            self._tpe.refuse(labels)
        if trial.over:
            self._tell(trial, None if trial.status == "failed" else trial.score)

    def _tell(self, trial: Trial, score: float | None) -> None:
        if self._tpe is not None and trial.labels:
            self._tpe.tell(trial.labels, score, drawn=trial.origin == "tpe")

    def _propose(self, number: int) -> Trial | None:
        assert self._tpe is not None
        refused: list[dict[str, Any]] = []
        while True:
            settings, labels = self._tpe.propose(number, len(refused))
            try:
                self._check(settings)
            except UserError as error:
                self._tpe.refuse(labels)
                refused.append(labels)
                if (reason := str(error).splitlines()[0]) not in self._told:
                    self._told.add(reason)
                    self._left_out(reason)
                if len(refused) < _ATTEMPTS:
                    continue
                self._left_out(f"{_ATTEMPTS} proposals in a row can't be tried, so there are no more")
                self._tpe = None
                return None
            return self._ledger.add(settings, "tpe", labels, refused)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See :class:`ray.tune.search.Searcher`."""
        trial, _ = self._running.pop(trial_id, (None, 0))
        if trial is not None:
            failed = error or result is None or "failed" in result
            self._tell(trial, None if failed or result is None else result.get("score"))

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles all that it is given, for a restoration of its own, which is never asked for.
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """See :meth:`save`."""


def _parameters(space: Any) -> list[Any]:
    found, stack = [], [space]
    while stack:
        node = stack.pop()
        if node.name == "hyperopt_param":
            found.append(node)
        stack += node.inputs()
    return found


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
