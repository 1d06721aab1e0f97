"""One training on Ray Train, from its first step or from its last checkpoint to its last epoch."""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray.exceptions
import ray.train
from ray.train.torch import TorchConfig

from metamixer_ray.capacity import WorkerResources
from metamixer_ray.config import TrainConfig, to_settings
from metamixer_ray.deaths import GONE
from metamixer_ray.departure import HearSigterm
from metamixer_ray.errors import StorageFailed, TrainingDiverged, TrainingFailed, UserError
from metamixer_ray.flags import Diverged
from metamixer_ray.folder import RunFolder, checkpoint_names
from metamixer_ray.interruption import aside
from metamixer_ray.patience import insist
from metamixer_ray.placement import missing_now, scaling
from metamixer_ray.reporting import HOPELESS_DEATHS, STOP, EpochReporter, first_line, tell
from metamixer_ray.runs import journal_of
from metamixer_ray.session import ray_worker
from metamixer_ray.starting import PeersTrainer, SafeStarts, give_back
from metamixer_ray.stopping import StopWhenTold
from metamixer_ray.ticker import Ticker
from metamixer_ray.tracking import MlflowWriter
from metamixer_ray.troubles import Troubles
from metamixer_ray.waiting import Waiting

# A collective that waits longer than this has lost somebody.
COLLECTIVE_TIMEOUT_SECONDS = 300
LOOK_SECONDS = 0.2
# Once told to stop, workers have so long to end with a checkpoint, and then to end.
CHECKPOINT_SECONDS, STOP_SECONDS = 20.0, 15.0


class Listener(Protocol):
    """Whom a training tells how it goes: a :class:`~metamixer_ray.tracking.Console`, or the trial of a sweep."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch was recorded."""

    def step(self, epoch: int, step: int, steps: int) -> None:
        """``step`` of the ``steps`` of ``epoch`` (from 1) are done."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something that asks for attention."""

    def close(self) -> None:
        """There will be no more."""


def fit(
    config: TrainConfig,
    resources: WorkerResources,
    folder: RunFolder,
    key: str,
    images: str,
    writer: MlflowWriter,
    console: Listener,
    stop: threading.Event | None = None,
) -> list[dict[str, Any]]:
    """Train until the last epoch is in the folder's ``metrics.jsonl``, and return all its rows.

    A folder that holds checkpoints is continued from the last one; restarted workers do the same.

    Args:
        key: of the run; no other may have it.
        images: their fingerprint. Workers may look for theirs hours later.
        writer: gets every row.
        stop: once it is set, the training is ended and gives back at once what it reserved.

    Raises:
        UserError: what a worker met that a person must mend.
        TrainingDiverged: values stayed non-finite; names the peer.
        TrainingFailed: it ended early; says how to go on.
    """
    rows = insist(lambda: _open(folder), f"{folder} can't be used", config.run.storage_patience, console.warn)
    writer.offer(rows)
    if any(row["epoch"] == config.epochs for row in rows):
        return rows
    waiting = Waiting(lambda: missing_now(config, resources), console.note)
    waiting.begin()
    waiting.look()
    with tempfile.TemporaryDirectory(prefix="metamixer_ray-") as scratch:
        live = Path(scratch) / "live.jsonl"
        live.touch()
        trainer = PeersTrainer(
            ray_worker,
            train_loop_config={
                "config": to_settings(config),
                "threads": resources.threads,
                "folder": folder.uri,
                "key": key,
                "images": images,
            },
            torch_config=TorchConfig(backend=resources.backend, timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
            scaling_config=scaling(config, resources),
            run_config=ray.train.RunConfig(
                name=folder.name,
                storage_path=folder.root.rpartition("/")[0],
                storage_filesystem=folder.filesystem,
                failure_config=ray.train.FailureConfig(max_failures=config.placement.max_failures),
                logging_config=ray.train.LoggingConfig(log_level="INFO" if config.run.verbose else "ERROR"),
                callbacks=[
                    EpochReporter(
                        folder.uri,
                        config.peers,
                        str(live),
                        config.run.keep_checkpoints,
                        config.epochs,
                        Troubles(key),
                        config.run.storage_patience,
                    ),
                    HearSigterm(),
                    SafeStarts(str(live), folder.uri, config.placement.max_failures),
                    StopWhenTold(str(live.with_name(STOP))),
                ],
            ),
        )
        ticker, troubles = Ticker(key), Troubles(key)
        # An earlier attempt may have been killed before it could.
        ticker.forget()
        troubles.forget()
        with follow(live, ticker, troubles, writer, console, waiting, stop or threading.Event()):
            over = threading.Event()

            def train() -> None:
                try:
                    outlive_controllers(trainer, folder, live, config.run.storage_patience, console.warn)
                finally:
                    over.set()

            try:
                aside(train)
            except KeyboardInterrupt:
                end(ticker, live, over, console)
                raise
            except StorageFailed as error:
                raise StorageFailed(f"{error}\n{_go_on(folder)}") from None
            except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
                raise _told(error, folder) from error
            finally:
                console.close()
    what = f"metrics.jsonl in {folder} can't be read"
    rows = insist(lambda: journal_of(folder).rows(), what, config.run.storage_patience, console.warn)
    writer.offer(rows)
    if not rows or rows[-1]["epoch"] != config.epochs:
        done = rows[-1]["epoch"] if rows else 0
        raise TrainingFailed(
            f"stopped after epoch {done} of {config.epochs}; "
            f"the same command with --name {folder.name} --resume goes on"
        )
    return rows


def _open(folder: RunFolder) -> list[dict[str, Any]]:
    """Make a run's folder ready for workers; its rows."""
    folder.create()
    give_back(folder)
    # Ray's own record of checkpoints, in folders of earlier versions; it would miss those that are gone since.
    folder.remove("checkpoint_manager_snapshot.json")
    return journal_of(folder).rows()


def outlive_controllers(
    trainer: PeersTrainer, folder: RunFolder, live: Path, patience: float, warn: Callable[[str], None]
) -> None:
    """Run ``trainer`` to its end, again from the last checkpoint where its controller died, which Ray Train leaves to
    us. It gives up after ``HOPELESS_DEATHS`` deaths in a row without a checkpoint in between.

    Args:
        patience: seconds for which ``folder`` may fail. A controller can't start before it is over.
    """

    def over(seconds: float) -> bool:
        """Whether nobody wants this training any more, or within so many seconds."""
        until = time.monotonic() + seconds
        while live.exists() and not live.with_name(STOP).exists():
            if time.monotonic() >= until:
                return False
            time.sleep(LOOK_SECONDS)
        return True

    def newest_now() -> list[str]:
        return insist(lambda: checkpoint_names(folder)[:1], f"{folder} can't be read", patience, warn, over)

    deaths, newest = 0, newest_now()
    while True:
        try:
            trainer.fit()
            return
        except GONE as error:
            if over(0):
                raise
            why = f" ({first_line(error)})" if isinstance(error, ray.exceptions.OutOfMemoryError) else ""
            tell(live, {"event": "failure", "message": f"the training's controller died{why}"})
            before, newest = newest, newest_now()
            deaths = deaths + 1 if newest == before else 1
            if deaths >= HOPELESS_DEATHS:
                raise
            insist(lambda: give_back(folder), f"{folder} can't be used", patience, warn, over)
            if over(0):
                raise


def end(ticker: Ticker, live: Path, over: threading.Event, console: Listener) -> None:
    """End a training that is under way, with a checkpoint where there is something to keep, and wait until ``over``."""
    try:
        if ticker.ask_to_stop():
            console.note("stopping with a checkpoint; once more ends it at once")
            over.wait(CHECKPOINT_SECONDS)
    finally:
        # A notebook lives on, and nothing of the training should.
        live.with_name(STOP).touch()
        over.wait(STOP_SECONDS)


def _told(error: Exception, folder: RunFolder) -> Exception:
    """What a person should read of Ray's error."""
    failure = getattr(error, "controller_failure", None)
    if isinstance(failure, UserError):
        return failure
    if isinstance(failure, Diverged):
        reason, _, last = str(failure).partition("\n")
        return TrainingDiverged(f"{reason}; that is another run. What was trained is in {folder}: {last}")
    reason = first_line(failure if failure is not None else error)
    return TrainingFailed(f"{reason}\n{_go_on(folder)}")


def _go_on(folder: RunFolder) -> str:
    return f"what was trained is in {folder}; the same command with --name {folder.name} --resume goes on"


@contextmanager
def follow(
    live: Path,
    ticker: Ticker,
    troubles: Troubles,
    writer: MlflowWriter,
    console: Listener,
    waiting: Waiting,
    stop: threading.Event,
) -> Iterator[None]:
    """Tell what the controller writes to ``live``, the steps in between and ``troubles`` while the body runs; pass
    ``stop`` on."""
    done = threading.Event()

    def watch() -> None:
        with live.open() as file:
            unfinished = ""
            while True:
                last_look = done.is_set()
                *lines, unfinished = (unfinished + file.read()).split("\n")
                for line in lines:
                    event = json.loads(line)
                    if event["event"] == "epoch":
                        writer.offer([event["row"]])
                    elif event["event"] in ("failure", "left"):
                        ticker.rest()
                    show(event, console, waiting)
                troubles.look(console.warn, console.note)
                if last_look:
                    return
                if (at := ticker.look()) is not None:
                    console.step(*at)
                if stop.is_set():
                    live.with_name(STOP).touch()
                done.wait(LOOK_SECONDS)

    watcher = threading.Thread(target=watch, name="console", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        ticker.forget()
        troubles.forget()


def show(event: dict[str, Any], console: Listener, waiting: Waiting) -> None:
    """One event, told."""
    if event["event"] == "epoch":
        console.epoch(event["row"])
    elif event["event"] == "failure":
        console.warn(f"{event['message']}; going on from the last checkpoint")
        waiting.begin()
    elif event["event"] == "left":
        console.warn("a machine is being taken away; what was trained is kept, and goes on elsewhere")
        waiting.begin()
    elif event["event"] == "waiting":
        waiting.look(in_vain=True)
    elif event["event"] == "placed":
        waiting.end()
    else:
        console.warn(event["message"])
