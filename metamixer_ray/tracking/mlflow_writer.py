"""The run's one writer to MLflow. It works in the background and never holds the training up."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from metamixer_ray.masking import masked, masked_uri
from metamixer_ray.tracking.mlflow_run import MlflowRun, ModelUpload, RunIdentity
from metamixer_ray.tracking.naming import shortened
from metamixer_ray.tracking.rows import Row

Status = Literal["FINISHED", "FAILED", "KILLED"]

LONGEST_UPLOADS = 3600.0
"""Seconds that uploads may take in all after a run has ended."""

_logger = logging.getLogger(__name__)


class MlflowWriter:
    """Sends one training to one MLflow run, each epoch exactly once, whenever the server is there.

    All calls return at once; a daemon thread does the talking. While the server is away there is one
    warning, work is kept in memory, and it is tried again with growing pauses. The run is created when the
    server is first reached. To continue a run, give its ``run_id`` or the same ``key`` and `offer` all rows
    of the journal: what the store holds already is not sent again. When the run is gone from the store, a
    new one is made from the rows.

    Args:
        tracking_uri: store or server; the folder of a SQLite file is created.
        experiment: name of the experiment; created with ``artifact_location`` when it is new.
        run_name: name shown in the UI.
        run_id: the run to continue, if its id is known.
        parameters: flat settings, see `parameter_values`.
        tags: the run's tags; ``mlflow.note.content`` is its description in Markdown.
        parent_run_id: the run under which this one is shown, in a sweep.
        artifact_location: where a new experiment keeps its artifacts; None: beside a SQLite store, else the
            server decides.
        key: a name that only this training has, such as an identifier kept in its run folder. Finds the run
            again when its id was lost together with the process.
        warn: receives the one warning, and the one at the end if something could not be sent.
        reached: called once the run is there, with the ids of its experiment and its own.
        pauses: shortest and longest pause between tries, in seconds.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        run_name: str,
        run_id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        parent_run_id: str | None = None,
        *,
        artifact_location: str | None = None,
        key: str | None = None,
        warn: Callable[[str], None] | None = None,
        reached: Callable[[str | None, str | None], None] | None = None,
        pauses: tuple[float, float] = (2.0, 60.0),
    ) -> None:
        self.tracking_uri = tracking_uri
        self._run = MlflowRun(
            RunIdentity(
                tracking_uri=tracking_uri,
                experiment=experiment,
                run_name=run_name,
                key=key or uuid.uuid4().hex,
                run_id=run_id,
                parent_run_id=parent_run_id,
                artifact_location=artifact_location,
            )
        )
        self._parameters = dict(parameters or {})
        self._start_tags = dict(tags or {})
        self._warn = warn or _logger.warning
        self._reached = reached
        self._pauses = pauses

        self._changed = threading.Condition()  # guards all below
        self._rows: dict[int, Row] = {}
        self._sent: set[int] = set()
        self._tags: dict[str, Any] = {}
        self._metrics: list[tuple[float, int, dict[str, float]]] = []
        self._uploads: dict[str, Path | bytes | ModelUpload] = {}
        self._opened = False
        self._in_step = False  # whether `_sent` is what the store holds
        self._mark: Status | None = None
        self._status: Status | None = None
        self._terminated = False
        self._deadline = float("inf")
        self._failures = 0
        self._upload_failed = False  # of the uploads under way
        self._warned = False
        self._retry_at = 0.0
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The run's id, None until the store was reached (or the id that was given)."""
        return self._run.run_id

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id, None until the store was reached."""
        return self._run.experiment_id

    @property
    def pending(self) -> int:
        """How many epochs are waiting to be sent."""
        with self._changed:
            return len(self._rows)

    def offer(self, rows: Iterable[Row]) -> None:
        """Take rows to be sent; those offered before are ignored, so the whole journal may be given."""
        with self._changed:
            for row in rows:
                epoch = int(row["epoch"])
                if epoch not in self._sent and epoch not in self._rows:
                    self._rows[epoch] = {"time": time.time(), **row}
            self._changed.notify_all()

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set or replace tags of the run."""
        with self._changed:
            self._tags.update(tags)
            self._changed.notify_all()

    def log_metrics(self, metrics: Mapping[str, float], epoch: int, at: float | None = None) -> None:
        """Add metrics that belong to no row, such as what was gained over another training, at ``epoch``.

        Args:
            at: Unix seconds, None for now. Metrics that are sent again with the same time are there once.
        """
        with self._changed:
            self._metrics.append((time.time() if at is None else at, epoch, dict(metrics)))
            self._changed.notify_all()

    def log_figures(self, figures: Mapping[str, Any], folder: str = "figures") -> None:
        """Store figures (matplotlib Figures, or PNG bytes) as ``<folder>/<name>.png``."""
        from metamixer_ray.tracking.figures import figure_png

        for name, figure in figures.items():
            png = figure if isinstance(figure, bytes) else figure_png(figure)
            self._queue(f"{folder}/{name.removesuffix('.png')}.png", png)

    def log_artifact(self, source: Path | bytes, destination: str) -> None:
        """Store a local file, or bytes, at the run-relative path ``destination``; a later one replaces it."""
        self._queue(destination, source)

    def log_artifacts(self, folder: Path, destination: str) -> None:
        """Store a local folder at the run-relative path ``destination``; it must stay until `finish` ends."""
        self._queue(destination, folder)

    def log_model(self, folder: Path, name: str, *, step: int = 0, tags: Mapping[str, Any] | None = None) -> None:
        """Store a folder that `export_network` wrote as a model of this run: ``runs:/<run_id>/<name>``."""
        self._queue(f"model {name}", ModelUpload(folder=folder, name=name, step=step, tags=tags or {}))

    def wait(self, timeout: float) -> bool:
        """Wait until all that was offered is in the store; False when ``timeout`` seconds were not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: self._opened and not self._busy(), timeout)

    def mark(self, status: Status) -> None:
        """Have the store show this status from now on, ahead of all that is still to be sent: this process may be
        killed before `finish`."""
        with self._changed:
            self._mark = status
            self._changed.notify_all()

    def finish(self, status: Status = "FINISHED", timeout: float = 60.0) -> bool:
        """Send what was missed, close the run and stop; False when ``timeout`` seconds were not enough.

        Files and models on their way to a store that takes them are waited for beyond that.
        """
        began = time.monotonic()
        with self._changed:
            self._status = status
            self._deadline = began + timeout
            self._retry_at = 0.0
            self._changed.notify_all()
        self._thread.join(timeout + 0.5)
        while self._thread.is_alive() and self._uploading() and time.monotonic() < began + LONGEST_UPLOADS:
            with self._changed:
                self._deadline = time.monotonic() + 2.0
            self._thread.join(0.5)
        with self._changed:
            done = self._terminated and not self._busy()
            if not done:
                self._warn(
                    f"MLflow at {masked_uri(self.tracking_uri)} did not get everything: {len(self._rows)} epochs "
                    f"and {len(self._uploads)} files or models are missing there. The run folder has the "
                    "metrics; resuming the run sends them"
                )
        return done

    def _queue(self, destination: str, source: Path | bytes | ModelUpload) -> None:
        with self._changed:
            self._uploads[destination] = source
            self._changed.notify_all()

    def _uploading(self) -> bool:
        with self._changed:
            return self._opened and bool(self._uploads) and self._failures == 0 and not self._upload_failed

    def _busy(self) -> bool:
        return bool(self._rows or self._metrics or self._tags or self._uploads or self._mark)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._due():
                    pause = min(self._retry_at, self._deadline) - time.monotonic()
                    self._changed.wait(max(pause, 0.01) if self._failures else None)
                if self._status is not None and time.monotonic() > self._deadline:
                    return
            try:
                self._flush()
            except Exception as error:  # whatever goes wrong with tracking, the training goes on
                self._failed(error)
            else:
                with self._changed:
                    if self._failures > 1:
                        _logger.info("MLflow at %s is back and up to date", masked_uri(self.tracking_uri))
                    self._failures = 0
                    self._changed.notify_all()
                    if self._terminated and not self._busy():
                        return

    def _due(self) -> bool:
        now = time.monotonic()
        if self._status is not None and now > self._deadline:
            return True
        wanted = not self._opened or self._status is not None or self._busy()
        return wanted and (self._failures == 0 or now >= self._retry_at)

    def _failed(self, error: Exception) -> None:
        shortest, longest = self._pauses
        with self._changed:
            self._failures += 1
            self._in_step = False  # the request may have arrived although its answer did not
            # A single failure is often just an idle connection that the server closed: no warning yet.
            pause = min(0.5, shortest) if self._failures == 1 else shortest * 2 ** min(self._failures - 2, 16)
            self._retry_at = time.monotonic() + min(pause, 2.0 if self._status else longest)
            if self._failures == 2 and not self._warned:
                self._warned = True
                self._warn(
                    f"MLflow at {masked_uri(self.tracking_uri)} can't be written to: {_reason(error)}. The "
                    "training goes on; the run folder keeps its metrics, MLflow gets them as soon as it can"
                )
        _logger.debug("MLflow: %s", masked(str(error)))

    def _flush(self) -> None:
        if not self._opened:
            recorded = self._run.open(self._parameters, self._start_tags)
            if self._reached is not None:
                self._reached(self.experiment_id, self.run_id)
                self._reached = None
        else:
            recorded = self._sent if self._in_step else self._run.epochs()
        with self._changed:
            self._opened = self._in_step = True
            self._sent |= recorded
            for epoch in recorded & self._rows.keys():
                del self._rows[epoch]
            rows = [self._rows[epoch] for epoch in sorted(self._rows)]
            tags = dict(self._tags)
            status, mark = self._status, self._mark
        if mark is not None:
            self._run.mark(mark)
            with self._changed:
                self._mark = None
        for epochs in self._run.send(rows):
            with self._changed:
                self._sent.update(epochs)
                for epoch in epochs:
                    del self._rows[epoch]
        while self._metrics:
            self._run.send_metrics(*self._metrics[0])
            with self._changed:
                del self._metrics[0]
        if tags:
            self._run.set_tags(tags)
            with self._changed:
                self._tags = {name: value for name, value in self._tags.items() if tags.get(name) != value}
        try:
            self._flush_uploads()
        finally:
            if status is not None and not self._terminated:
                self._run.terminate(status)
                with self._changed:
                    self._terminated = True

    def _flush_uploads(self) -> None:
        with self._changed:
            uploads = dict(self._uploads)
            self._upload_failed = False
        problem: Exception | None = None
        for destination, source in uploads.items():
            try:
                if isinstance(source, ModelUpload):
                    self._run.upload_model(source)
                else:
                    self._run.upload(source, destination)
            except FileNotFoundError as error:
                self._warn(f"{destination} was not logged to MLflow: {error.filename or error} is gone")
            except Exception as error:  # one that fails must not hold back the others
                if getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE":
                    problem = error
                    with self._changed:
                        self._upload_failed = True
                    continue
                # The store will refuse it each time.
                self._warn(f"{destination} was not logged to MLflow: {_reason(error)}")
            with self._changed:
                if self._uploads.get(destination) is source:
                    del self._uploads[destination]
        if problem is not None:
            raise problem


def _reason(error: BaseException) -> str:
    deepest = error
    while deepest.__cause__ or deepest.__context__:
        deepest = deepest.__cause__ or deepest.__context__ or deepest
    text = " ".join((str(deepest) or type(deepest).__name__).split())
    if "error code 401" in text:
        return (
            "it asks for a user and a password: give them in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "in ~/.mlflow/credentials"
        )
    return shortened(masked(text), 200).rstrip(".")
