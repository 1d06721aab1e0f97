"""Who says what is tried next: fixed points first, then HyperOpt, and in a resumed sweep first what was there already.

HyperOpt's Tree of Parzen Estimators is used directly and not through Ray's ``HyperOptSearch``, whose state is a pickle
and which can't be told of earlier points in a conditional space.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from hyperopt import JOB_STATE_DONE, STATUS_OK, Domain, Trials, space_eval, tpe
from hyperopt.pyll import as_apply
from ray.tune.search import Searcher

from metamixer_ray.errors import UserError
from metamixer_ray.sweeps.ledger import Ledger, Trial
from metamixer_ray.sweeps.spaces import Settings, Space, flattened

# Proposals whose settings can't work together, one after the other.
_ATTEMPTS = 50
_WORST_LOSS = 1e9


class Tpe:
    """Tree of Parzen Estimators (Bergstra et al. 2011) over a space.

    Args:
        seed: decides, together with what was told, what is proposed.
        random_first: so many points are drawn at random first.
    """

    def __init__(self, space: Space, *, seed: int, random_first: int) -> None:
        self._space, self._seed, self._random_first = as_apply(dict(space)), seed, random_first
        self._trials = Trials()
        self._domain = Domain(lambda point: point, self._space)

    def propose(self, number: int, attempt: int = 0) -> tuple[Settings, dict[str, Any]]:
        """Settings for trial ``number``, and HyperOpt's labels of them to :meth:`tell` with."""
        (identifier,) = self._trials.new_trial_ids(1)
        rng = np.random.default_rng([self._seed, number, attempt])
        (document,) = tpe.suggest(
            [identifier],
            self._domain,
            self._trials,
            seed=int(rng.integers(2**31)),
            n_startup_jobs=self._random_first,
            verbose=False,
        )
        labels = {label: _number(values[0]) for label, values in document["misc"]["vals"].items() if len(values)}
        return flattened(space_eval(self._space, labels)), labels

    def tell(self, labels: Mapping[str, Any], score: float | None) -> None:
        """How good a point was, the more the better; None when it failed."""
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


class Proposer(Searcher):
    """Ray Tune's searcher of a sweep; gives what :class:`~metamixer_ray.sweeps.trial.PeersTrial` takes.

    Args:
        ledger: where trials are recorded. Those that it holds already as running go on first.
        points: settings to try first, each with its origin.
        tpe: proposes what comes after them; None when nothing does.
        samples: trials in all.
        at_once: how many trials the cluster can hold now; asked again and again, since it may grow and shrink.
        check: raises ``UserError`` for settings that can't work together; tpe then proposes others.
        halted: whether nothing more is to be begun.
    """

    def __init__(
        self,
        ledger: Ledger,
        points: Sequence[tuple[Settings, str]],
        tpe: Tpe | None,
        samples: int,
        at_once: Callable[[], int],
        check: Callable[[Settings], object],
        halted: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(metric="score", mode="max")
        self._ledger, self._tpe, self._samples = ledger, tpe, samples
        self._at_once, self._check, self._halted = at_once, check, halted
        self._again = [trial for trial in ledger.trials() if not trial.over]
        known = [trial.settings for trial in ledger.trials() if trial.origin != "tpe"]
        self._points = [point for point in points if point[0] not in known]
        self._running: dict[str, Trial] = {}
        for trial in ledger.trials() if tpe is not None else ():
            self._remember(trial)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Nothing to set: all was given."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """See :class:`ray.tune.search.Searcher`."""
        number = len(self._ledger.trials())
        if self._halted():
            return Searcher.FINISHED
        if not self._again and (number >= self._samples or not (self._points or self._tpe)):
            return Searcher.FINISHED
        if len(self._running) >= self._at_once():
            return None
        if self._again:
            trial = self._again.pop(0)
        elif self._points:
            trial = self._ledger.add(*self._points.pop(0))
        else:
            trial = self._propose(number)
        self._running[trial_id] = trial
        return {"number": trial.number, "settings": trial.settings}

    def _remember(self, trial: Trial) -> None:
        """Tell what an earlier attempt of the sweep saw of a trial."""
        assert self._tpe is not None
        for labels in trial.refused:
            self._tpe.tell(labels, None)
        if trial.over and trial.labels:
            self._tpe.tell(trial.labels, None if trial.status == "failed" else trial.score)

    def _propose(self, number: int) -> Trial:
        assert self._tpe is not None
        refused: list[dict[str, Any]] = []
        while True:
            settings, labels = self._tpe.propose(number, len(refused))
            try:
                self._check(settings)
            except UserError:
                self._tpe.tell(labels, None)
                refused.append(labels)
                if len(refused) < _ATTEMPTS:
                    continue
                # The trial itself will say what is wrong with them.
            return self._ledger.add(settings, "tpe", labels, refused)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See :class:`ray.tune.search.Searcher`."""
        trial = self._running.pop(trial_id, None)
        if trial is not None and self._tpe is not None and trial.labels:
            failed = error or result is None or "failed" in result
            self._tpe.tell(trial.labels, None if failed or result is None else result["score"])

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
