"""One MLflow run, spoken to synchronously through `MlflowClient`: no active run, no retries, no thread."""

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metamixer_ray.tracking.naming import metric_values, parameter_values, tag_values
from metamixer_ray.tracking.rows import Row

KEY_TAG = "metamixer.key"
"""Tag that tells whose run it is, so that a creation whose answer was lost is found instead of repeated."""
MODEL_FILE = "MLmodel"

ABOUT_EXPERIMENT = (
    "Small networks that learn together (online knowledge distillation), by metamixer_ray. A run is a training of "
    "peers: `peer0/top1` is a peer's score, `peers/top1_mean` the peers' mean, `ensemble/top1` their joint "
    "prediction's, `gain/peer0` what a peer gained over training alone (a child run, with `--baseline`). Sweeps and "
    "comparisons are runs with a child per training. The tags `mixer`, `distiller` and `data` say what was tried, the "
    "description how."
)
"""The description of a new experiment."""
_METRICS_PER_REQUEST = 1000
_PARAMETERS_PER_REQUEST = 100
_REQUEST_DEFAULTS = {
    # MLflow's own seven retries of 120 s each would hold one request for many minutes and log each attempt.
    # Retrying is the writer's task, so one attempt of bounded length is enough.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # The console has the run's address already, without the password that the server's URI may have.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def bound_requests() -> None:
    """Give MLflow's process-wide settings bounded and silent defaults; what the environment says stands."""
    for name, value in _REQUEST_DEFAULTS.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Which run, in which store."""

    tracking_uri: str
    experiment: str
    run_name: str
    key: str
    run_id: str | None = None
    parent_run_id: str | None = None
    artifact_location: str | None = None


@dataclass(kw_only=True)
class ModelUpload:
    """A folder in MLflow's format, to become a logged model; ``model_id`` is set by the first try."""

    folder: Path
    name: str
    step: int = 0
    tags: Mapping[str, Any] = field(default_factory=dict)
    model_id: str | None = None


class MlflowRun:
    """The run's conversation with its store. Every method may raise what MLflow raises, and be repeated."""

    def __init__(self, identity: RunIdentity) -> None:
        bound_requests()
        self.identity = identity
        self.run_id = identity.run_id
        self.experiment_id: str | None = None
        self._client: Any = None

    def open(self, parameters: Mapping[str, Any], tags: Mapping[str, Any]) -> set[int]:
        """Find the run or create it, send the parameters it lacks, and return the epochs that it holds."""
        client = self._connect()
        run = self._find() or self._create(tags)
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        if run.info.status != "RUNNING":
            client.update_run(self.run_id, status="RUNNING")
        self._send_parameters(parameter_values(parameters), run.data.params)
        self.set_tags(tags)
        return self.epochs()

    def epochs(self) -> set[int]:
        """The epochs whose metrics are all in the store."""
        return {metric.step for metric in self._client.get_metric_history(self.run_id, "epoch")}

    def send(self, rows: Iterable[Row]) -> Iterable[list[int]]:
        """Send rows in order, in as few requests as MLflow allows; yields the epochs of each request.

        Timestamps are those of the rows, so sending one twice stores it once.
        """
        from mlflow.entities import Metric

        metrics: list[Any] = []
        epochs: list[int] = []
        for row in rows:
            epoch, stamp = int(row["epoch"]), int(row["time"] * 1000)
            new = [Metric(key, value, stamp, epoch) for key, value in metric_values(row).items()]
            if metrics and len(metrics) + len(new) > _METRICS_PER_REQUEST:
                self._client.log_batch(self.run_id, metrics=metrics)
                yield epochs
                metrics, epochs = [], []
            while len(new) > _METRICS_PER_REQUEST:
                self._client.log_batch(self.run_id, metrics=new[:_METRICS_PER_REQUEST])
                new = new[_METRICS_PER_REQUEST:]
            metrics += new
            epochs.append(epoch)
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)
            yield epochs

    def send_metrics(self, stamp: float, step: int, metrics: Mapping[str, float]) -> None:
        """Send metrics of one moment (``stamp``, seconds since 1970); sending them twice stores them once."""
        from mlflow.entities import Metric

        moment = int(stamp * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(key, v, moment, step) for key, v in metrics.items()])

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set or replace tags."""
        from mlflow.entities import RunTag

        pairs = [RunTag(name, value) for name, value in tag_values(tags).items()]
        for start in range(0, len(pairs), _PARAMETERS_PER_REQUEST):
            self._client.log_batch(self.run_id, tags=pairs[start : start + _PARAMETERS_PER_REQUEST])

    def upload(self, source: Path | bytes, destination: str) -> None:
        """Put a file, a folder or bytes at the run-relative path ``destination``."""
        folder, _, name = destination.rpartition("/")
        if isinstance(source, Path) and source.is_dir():
            self._client.log_artifacts(self.run_id, str(source), destination)
        elif isinstance(source, Path) and source.name == name:
            self._client.log_artifact(self.run_id, str(source), folder or None)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                renamed = Path(scratch, name)
                if isinstance(source, bytes):
                    renamed.write_bytes(source)
                else:
                    shutil.copyfile(source, renamed)
                self._client.log_artifact(self.run_id, str(renamed), folder or None)

    def upload_model(self, model: ModelUpload) -> None:
        """Make a model folder a logged model and an output of this run: ``models:/<model_id>``."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        if not (model.folder / MODEL_FILE).is_file():
            raise FileNotFoundError(model.folder / MODEL_FILE)
        if model.model_id is None:
            # Another attempt may have begun it, or been through with it.
            mine = self._client.search_logged_models(
                [self.experiment_id], filter_string=f"source_run_id = '{self.run_id}'"
            )
            model.model_id = next((known.model_id for known in mine if known.name == model.name), None)
        if model.model_id is None:
            created = self._client.create_logged_model(
                self.experiment_id, name=model.name, source_run_id=self.run_id, tags=tag_values(model.tags)
            )
            model.model_id = created.model_id
        logged = self._client.get_logged_model(model.model_id)
        self._client.log_model_artifacts(model.model_id, str(model.folder))
        with tempfile.TemporaryDirectory() as scratch:
            stamped = Model.load(str(model.folder))
            stamped.run_id, stamped.model_id, stamped.model_uuid = self.run_id, model.model_id, model.model_id
            stamped.artifact_path = logged.artifact_location
            stamped.save(str(Path(scratch, MODEL_FILE)))
            self._client.log_model_artifacts(model.model_id, scratch)
        outputs = self._client.get_run(self.run_id).outputs
        if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=model.step)])
        self._client.finalize_logged_model(model.model_id, "READY")

    def mark(self, status: str) -> None:
        """Show a status, without closing the run."""
        self._client.update_run(self.run_id, status=status)

    def terminate(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED.

        A creation that took longer than was waited for was repeated, and makes a second run when it comes true after
        all: that one is deleted.
        """
        self._client.set_terminated(self.run_id, status)
        for run in self._runs_of_key():
            if run.info.run_id != self.run_id:
                self._client.delete_run(run.info.run_id)

    def _connect(self) -> Any:
        if self._client is None:
            # Creating a new SQLite store logs dozens of migration steps that tell the user nothing, and what goes
            # wrong with a database is logged with a stack trace each time; it is raised as well.
            logging.getLogger("alembic").setLevel(logging.WARNING)
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            if (file := sqlite_file(self.identity.tracking_uri)) is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
            from mlflow import MlflowClient

            self._client = MlflowClient(self.identity.tracking_uri)
        return self._client

    def _find(self) -> Any | None:
        from mlflow.exceptions import MlflowException

        if self.run_id is not None:
            try:
                run = self._client.get_run(self.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if run.info.lifecycle_stage == "active":
                    return run
        # The oldest, which any writer of this run finds.
        return min(self._runs_of_key(), key=lambda run: run.info.start_time, default=None)

    def _runs_of_key(self) -> list[Any]:
        query = f"tags.`{KEY_TAG}` = '{_quoted(self.identity.key)}'"
        return list(self._client.search_runs([self._experiment()], query))

    def _create(self, tags: Mapping[str, Any]) -> Any:
        own = {KEY_TAG: _quoted(self.identity.key)}
        if self.identity.parent_run_id is not None:
            own["mlflow.parentRunId"] = self.identity.parent_run_id
        return self._client.create_run(
            self._experiment(),
            start_time=int(time.time() * 1000),
            tags=tag_values({**tags, **own}),
            run_name=self.identity.run_name,
        )

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name, location = self.identity.experiment, self.identity.artifact_location
        file = sqlite_file(self.identity.tracking_uri)
        if location is None and file is not None:
            # MLflow's own default is a folder in the working directory, which may be a throw-away one.
            location = str(file.absolute().parent / "artifacts")
        known = self._client.get_experiment_by_name(name)
        if known is None:
            try:
                about = {"mlflow.note.content": ABOUT_EXPERIMENT}
                return str(self._client.create_experiment(name, location, about))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                known = self._client.get_experiment_by_name(name)
        if known.lifecycle_stage != "active":
            raise RuntimeError(
                f"experiment {name!r} is deleted; restore it with "
                f"'mlflow experiments restore --experiment-id {known.experiment_id}' or choose another name"
            )
        return str(known.experiment_id)

    def _send_parameters(self, wanted: Mapping[str, str], present: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        missing = [Param(name, value) for name, value in wanted.items() if name not in present]
        for start in range(0, len(missing), _PARAMETERS_PER_REQUEST):
            self._client.log_batch(self.run_id, params=missing[start : start + _PARAMETERS_PER_REQUEST])
        # MLflow's parameters can't be changed; a continuation may well have, say, more epochs.
        changed = [f"{n}: {present[n]} -> {v}" for n, v in wanted.items() if n in present and present[n] != v]
        if changed:
            self.set_tags({"changed_parameters": "; ".join(changed)})


def sqlite_file(tracking_uri: str) -> Path | None:
    """The file that a SQLite store is; None for other stores."""
    match = re.fullmatch(r"sqlite:///([^?]+).*", tracking_uri)
    return Path(match[1]) if match else None


def _quoted(key: str) -> str:
    return re.sub(r"[^\w.:/@+-]", "_", key)
