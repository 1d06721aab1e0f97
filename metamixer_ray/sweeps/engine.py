"""Many trainings on one cluster: as many at once as it holds, each to its end or until the scheduler stops it.

Ray Tune runs them; what is proposed, what is recorded and what is shown are given. A sweep searches with it, and a
comparison runs its grid with it.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from metamixer_ray.capacity import WorkerResources, room
from metamixer_ray.config import TrainConfig
from metamixer_ray.errors import ConfigError
from metamixer_ray.growth import NodeType, startable
from metamixer_ray.placement import cluster_nodes, worker_resources
from metamixer_ray.sweeps.config import SweepConfig
from metamixer_ray.sweeps.proposing import Proposer
from metamixer_ray.sweeps.trial import PeersTrial, SweepPlan
from metamixer_ray.sweeps.watching import Watcher

# A trial's own process reserves so much of the driver's node: nothing that a worker could want.
_SLIVER = 1e-3
# Between two looks at how large the cluster is.
ASK_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How trials are run."""

    halted: Callable[[], bool]
    """Whether all trials are to be stopped."""
    failures: int
    """How often a trial is taken up again when more than its workers died."""
    scheduler: TrialScheduler
    verbose: bool = False


def run_trials(plan: SweepPlan, proposer: Proposer, samples: int, options: EngineOptions, watcher: Watcher) -> None:
    """Run what ``proposer`` proposes, ``samples`` trials in all, and tell ``watcher``; returns when none is left."""
    quiet = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": "3600"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if not options.verbose:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    address = ray.util.get_node_ip_address()
    trainable = tune.with_resources(
        tune.with_parameters(PeersTrial, plan=plan), tune.PlacementGroupFactory([{f"node:{address}": _SLIVER}])
    )
    # The ledger is what a killed sweep goes on from, so what Tune keeps itself is thrown away.
    with tempfile.TemporaryDirectory(prefix="metamixer_ray-tune-") as scratch:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=samples,
                search_alg=proposer,
                scheduler=options.scheduler,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                callbacks=[_Forward(watcher)],
                stop=_Halt(options.halted),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=options.failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()


def build_scheduler(config: SweepConfig, curves: Mapping[str, Mapping[int, float]]) -> TrialScheduler:
    """The scheduler that the options name, over epochs.

    Args:
        curves: scores after each epoch of the trials of an earlier attempt, by their names; asha compares with them.
    """
    if config.scheduler == "asha":
        asha = AsyncHyperBandScheduler(
            metric="score",
            mode="max",
            time_attr="epoch",
            max_t=config.training.epochs,
            grace_period=config.grace,
            reduction_factor=config.reduction_factor,
        )
        for name, curve in curves.items():
            for epoch, score in sorted(curve.items()):
                # Whether it would go on is no question any more: what counts is that the rungs know of it.
                asha._brackets[0].on_result(SimpleNamespace(trial_id=name), epoch, score)
        return asha
    if config.scheduler == "median":
        return MedianStoppingRule(
            metric="score",
            mode="max",
            time_attr="epoch",
            grace_period=config.grace,
            # It would otherwise pause trials until there are enough to compare, and ours can't be paused.
            min_time_slice=float("inf"),
        )
    return FIFOScheduler()


def trial_resources(config: TrainConfig) -> WorkerResources:
    """What each worker of a trial reserves: one CPU, or a GPU and its share of the CPUs, unless the options say else.

    A single training spreads over all there is; trials are many, and more of them at once are faster.

    Raises:
        ConfigError: the cluster can't hold one trial.
    """
    if config.placement.cpus_per_worker is not None:
        return worker_resources(config)
    try:
        whole = worker_resources(replace(config, placement=replace(config.placement, cpus_per_worker=1.0)))
    except ConfigError:
        return worker_resources(config)
    if whole.gpus == 0:
        return whole
    nodes = cluster_nodes(startable(config.placement.grows_to))
    per_gpu = min((node.cpus / node.gpus * whole.gpus for node in nodes if node.gpus), default=1.0)
    share = max(1.0, float(int(min(4.0, per_gpu))))
    return worker_resources(replace(config, placement=replace(config.placement, cpus_per_worker=share)))


class Room:
    """How many trials of ``workers`` workers the cluster holds at its autoscaling maximum, as it is now; at least 1.

    Args:
        most: never more than so many.
        types: of nodes that the autoscaler may start.
    """

    def __init__(
        self, resources: WorkerResources, workers: int, most: int | None, types: Sequence[NodeType] = ()
    ) -> None:
        self._resources, self._workers, self._most, self._types = resources, workers, most, types
        self._held, self._ask_at = 1, 0.0

    def __call__(self) -> int:
        """Asked many times a second, so the cluster isn't asked each time."""
        if (now := time.monotonic()) >= self._ask_at:
            self._ask_at = now + ASK_SECONDS
            held = room(cluster_nodes(self._types), self._resources.cpus, self._resources.gpus) // self._workers
            self._held = max(1, min(held, self._most or held))
        return self._held


class _Halt(tune.Stopper):
    """Ends all trials once it is told to."""

    def __init__(self, halted: Callable[[], bool]) -> None:
        self._halted = halted

    def __getstate__(self) -> dict[str, Any]:
        return {}  # see _Forward

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._halted()


class _Forward(tune.Callback):
    """Ray Tune's callback: what happens is told to the watcher in the sweep's own words."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles all that it is given, for a restoration of its own, which is never asked for.
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._watcher.started(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        self._watcher.reported(trial.config["number"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._watcher.ended(trial.config["number"], trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._watcher.broke(trial.config["number"], trial.get_error())
