"""Many trainings on one cluster: as many at once as it holds, each to its end or until the scheduler stops it.

Ray Tune runs them; what is proposed, what is recorded and what is shown are given. A sweep searches with it, and a
comparison runs its grid with it.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import TrialScheduler

from metamixer_ray.capacity import WorkerResources, room
from metamixer_ray.config import TrainConfig
from metamixer_ray.errors import ConfigError
from metamixer_ray.growth import Growth, startable
from metamixer_ray.placement import cluster_nodes, worker_resources
from metamixer_ray.sweeps.proposing import Proposer
from metamixer_ray.sweeps.trial import PeersTrial, SweepPlan
from metamixer_ray.sweeps.watching import Watcher

# A trial's own process reserves so much of the driver's node: nothing that a worker could want.
_SLIVER = 1e-3
# Of this node's free memory for the trials' own processes, and what one takes with its controller.
MEMORY_SHARE, TRIAL_BYTES = 0.8, 0.75e9
# What Tune hands on of the driver's environment, for S3.
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
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
    # A trial says now and then that it is still there, and nothing else.
    quiet["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    # Tune would hand keys on in a way that Ray's log files tell of. A trial has them from its plan.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(KEYS)
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
                callbacks=[_Forward(watcher, proposer.done)],
                stop=_Halt(options.halted),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=options.failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()


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
    """How many workers the cluster holds at its autoscaling maximum.

    Args:
        resources: what each worker reserves.
        growth: what the autoscaler may start.
    """

    def __init__(self, resources: WorkerResources, growth: Growth) -> None:
        self._resources, self._growth = resources, growth
        self._places = self._most = self._ask_at = 0.0

    def places(self) -> int:
        """As it is now. Asked many times a second, so the cluster isn't asked each time."""
        if (now := time.monotonic()) >= self._ask_at:
            self._ask_at = now + ASK_SECONDS
            self._places = room(cluster_nodes(self._growth), self._resources.cpus, self._resources.gpus)
            self._most = max(self._most, self._places)
        return int(self._places)

    def check(self, workers: int) -> None:
        """Refuse more workers than there has ever been room for; nodes that are gone for a while may come again.

        Raises:
            ConfigError: says how many there can be.
        """
        self.places()
        if workers > self._most:
            raise ConfigError(
                f"--peers: {workers} workers with {self._resources} are more than the cluster can hold ({self._most:g})"
            )


def most_at_once(asked: int | None) -> int:
    """How many trials may run at once: what the options say, else as many as this node has memory for beside it."""
    return asked or max(1, int(psutil.virtual_memory().available * MEMORY_SHARE / TRIAL_BYTES))


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
    """Ray Tune's callback: what happens is told to the watcher in the sweep's own words.

    Args:
        done: whether no more trials will come.
    """

    def __init__(self, watcher: Watcher, done: Callable[[], bool]) -> None:
        self._watcher, self._done = watcher, done
        self._begun: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles all that it is given, for a restoration of its own, which is never asked for.
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._begun.add(trial.config["number"])
        self._watcher.started(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        self._watcher.reported(trial.config["number"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._watcher.ended(trial.config["number"], trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._begun.discard(trial.config["number"])
        self._watcher.broke(trial.config["number"])

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Once the last trial is stopped, Tune kills in 5 seconds what hasn't ended; a training may need longer."""
        if self._begun and self._done() and all(trial.is_finished() for trial in trials):
            self._watcher.await_ends(self._begun)
            self._begun.clear()
