"""What stays of a training: its summary, figures and models, in the run folder and in MLflow."""

import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch

from metamixer_ray.claiming import claimed
from metamixer_ray.config import TrainConfig, flatten, home
from metamixer_ray.data import Splits
from metamixer_ray.errors import CheckpointError, ConfigError, StorageFailed
from metamixer_ray.masking import masked_uri
from metamixer_ray.networks import StagedNetwork
from metamixer_ray.patience import insist
from metamixer_ray.portraits import FIGURES, figure_makers
from metamixer_ray.reporting import first_line, peer_names
from metamixer_ray.restoring import checkpoint_identity, load_trained
from metamixer_ray.results import tested_row
from metamixer_ray.runs import CONFIG, SUMMARY, TRACKED, Run
from metamixer_ray.tracking import Console, MlflowWriter, Places, RunSummary, run_description
from metamixer_ray.tracking.figures import figure_png
from metamixer_ray.tracking.files import json_text
from metamixer_ray.tracking.models import ModelExportError, export_network
from metamixer_ray.tracking.naming import is_database, is_server, model_name, run_place
from metamixer_ray.tracking.provenance import environment_tags, source_tags

T = TypeVar("T")

FINISH_SECONDS = 60.0
FAILED_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class TrackingPlan:
    """What an MLflow writer of one training needs to know, as plain data."""

    uri: str
    experiment: str
    run_name: str
    key: str
    """Finds the same MLflow run again, whoever writes to it."""
    parameters: dict[str, Any]
    tags: dict[str, str]
    artifact_location: str | None = None
    parent_run_id: str | None = None

    def writer(
        self, warn: Callable[[str], None] | None = None, note: Callable[[str], None] | None = None
    ) -> MlflowWriter:
        """A writer of this run; where the run is there already, it goes on with it.

        Args:
            note: gets a line with the run's address as soon as a server has given it one.
        """

        def reached(experiment_id: str | None, run_id: str | None) -> None:
            if note is not None and is_server(self.uri):
                note(f"{'MLflow':<9} {self.place(experiment_id, run_id)}")

        return MlflowWriter(
            tracking_uri=self.uri,
            experiment=self.experiment,
            run_name=self.run_name,
            key=self.key,
            parameters=self.parameters,
            tags=self.tags,
            artifact_location=self.artifact_location,
            parent_run_id=self.parent_run_id,
            warn=warn,
            reached=reached,
        )

    def place(self, experiment_id: str | None, run_id: str | None) -> str:
        """Where a person finds the run; the ids are None where the store was never reached."""
        return run_place(self.uri, self.experiment, self.run_name, (experiment_id, run_id))


def tracking_store(named: str | None) -> tuple[str, str | None]:
    """MLflow's URI, and where a new experiment keeps its artifacts (None: the server decides).

    What ``--tracking-uri`` has ``named``, else $MLFLOW_TRACKING_URI, else SQLite in the project's home.
    """
    uri = named or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri, None
    return f"sqlite:///{home() / 'mlflow.db'}", (home() / "mlartifacts").as_uri()


def ui_command(uri: str) -> str | None:
    """The shell line that opens MLflow's pages on a store without a server; None where a server shows it."""
    if not is_database(uri):
        return None
    named = [] if uri == tracking_store(None)[0] else ["--tracking-uri", masked_uri(uri)]
    return shlex.join(["python", "-m", "metamixer_ray.ui", *named])


def plan_tracking(
    config: TrainConfig, run: Run, announced: RunSummary, parent_run_id: str | None = None
) -> TrackingPlan:
    """How this run is written to MLflow."""
    uri, artifacts = tracking_store(config.run.tracking_uri)
    tags = {
        **environment_tags(),
        **source_tags(announced.command),
        "mixer": config.mixing.mixer,
        "distiller": config.distillation.distiller,
        "data": config.dataset.data,
        "run_folder": announced.run_folder,
        "mlflow.note.content": run_description(announced),
    }
    parameters = {
        **tracked_parameters(flatten(config)),
        **{f"peer{i}": peer.name for i, peer in enumerate(announced.peers)},
        **{f"peer{i}_parameters": peer.parameters for i, peer in enumerate(announced.peers)},
    }
    return TrackingPlan(
        uri=uri,
        experiment=config.run.experiment,
        run_name=run.name,
        key=run.key,
        parameters=parameters,
        tags=tags,
        artifact_location=artifacts,
        parent_run_id=parent_run_id,
    )


def tracked_parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings as a run's MLflow parameters."""
    # These may differ between the attempts of one run, and MLflow's parameters may not.
    untracked = ("resume", "resume_or_start", "name", "address", "grows_to", "verbose")

    def single(value: Any) -> Any:
        # One learning rate for all peers is a number, which MLflow's charts can put on an axis.
        return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value

    return {name: single(value) for name, value in settings.items() if name not in untracked}


class Keeper:
    """Keeps what a training leaves, and other processes from the run meanwhile.

    Leaving the context closes the MLflow run with the status that fits.

    Raises:
        ConfigError: on entering, when another process trains this run.
    """

    def __init__(
        self, config: TrainConfig, run: Run, tracking: TrackingPlan, announced: RunSummary, console: Console
    ) -> None:
        self._config, self._run, self._tracking = config, run, tracking
        self._announced, self._console = announced, console
        self._writer: MlflowWriter | None = None
        self._alone: MlflowWriter | None = None
        self._whole = True
        self._claim = ExitStack()
        self._scratch = tempfile.TemporaryDirectory(prefix="metamixer_ray-")

    def __enter__(self) -> Self:
        self._claim.enter_context(claimed(self._run.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            # A store that was never reached is not waited for as long as a slow upload.
            seconds = FAILED_SECONDS if self.run_id() is None else FINISH_SECONDS
            if self.writer().finish("FINISHED", seconds) and self._whole:
                # Without, a resume sends it once more.
                with suppress(OSError):
                    self._run.folder.write(TRACKED, "")
        else:
            stopped = issubclass(kind, KeyboardInterrupt | SystemExit)
            if stopped:
                self._console.warn(
                    f"{error}; the same command with --name {self._run.name} --resume goes on from the last checkpoint"
                )
            self.writer().finish("KILLED" if stopped else "FAILED", FAILED_SECONDS)
        self._scratch.cleanup()
        self._claim.close()

    def writer(self) -> MlflowWriter:
        """The run's one writer; it is opened when it is first asked for."""
        if self._writer is None:
            self._writer = self._tracking.writer(self._console.warn, self._console.note)
        return self._writer

    def mark_killed(self) -> None:
        """Have MLflow show that the run was killed, from now on: this process may be before it can close it."""
        for writer in (self._writer, self._alone):
            if writer is not None:
                writer.mark("KILLED")

    def run_id(self) -> str | None:
        """The id of the MLflow run, or None while the store can't be reached."""
        writer = self.writer()
        writer.wait(FAILED_SECONDS)
        return writer.run_id

    @contextmanager
    def alone(self, parameters: Mapping[str, Any]) -> Iterator[tuple[str, MlflowWriter]]:
        """Key and writer of the baseline's run, a child of this one; closed with the status that fits."""
        tracking = replace(
            self._tracking,
            run_name=f"{self._run.name}-alone",
            key=f"{self._run.key}-alone",
            parameters=dict(parameters),
            tags={
                **self._tracking.tags,
                "mixer": str(parameters["mixer"]),
                "distiller": str(parameters["distiller"]),
                "mlflow.note.content": f"The networks of {self._run.name} alone, what its gain is over: same weights "
                "and batches, no mixing, no exchange.",
            },
            parent_run_id=self.writer().run_id,
        )
        self._alone = writer = tracking.writer(self._console.warn)
        try:
            yield tracking.key, writer
        except BaseException as error:
            writer.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED", FAILED_SECONDS)
            raise
        if (parent := self.run_id()) is not None:
            # Also when the store could not be reached when the baseline began.
            writer.set_tags({"mlflow.parentRunId": parent})
        sent = writer.finish("FINISHED", FAILED_SECONDS if parent is None else FINISH_SECONDS)
        self._whole &= sent and parent is not None

    def load(self, splits: Splits, networks: Sequence[StagedNetwork]) -> None:
        """Give ``networks`` the trained weights: those of the last checkpoint, for which it waits, since what is sent
        to MLflow is not sent again. Only what can't be read for longer than there is patience gives way to an older
        one, and a person is told.

        Raises:
            UserError: see :func:`load_trained`.
            StorageFailed: nothing can be read.
        """
        folder, identity = self._run.folder, checkpoint_identity(self._config, splits)
        try:
            what = f"the last checkpoint in {folder} can't be read"
            problems = self._insist(lambda: load_trained(networks, folder, identity, insisting=True), what)
        except StorageFailed as error:
            try:
                problems = load_trained(networks, folder, identity)
            except (OSError, CheckpointError):
                raise error from None
        for problem in problems:
            self._console.warn(problem)

    def keep(
        self,
        splits: Splits,
        networks: Sequence[StagedNetwork],
        rows: Sequence[Mapping[str, Any]],
        alone_rows: Sequence[Mapping[str, Any]] | None,
        summary: Mapping[str, Any],
    ) -> Places:
        """Write the figures and the summary (last, since it marks the run as finished), and send all to MLflow.

        ``networks`` get the trained weights.
        """
        self.load(splits, networks)
        for name, draw in figure_makers(self._config, splits, networks, rows, alone_rows).items():
            try:
                figure = draw()
                picture = None if figure is None else figure_png(figure)
            except Exception as error:
                # Nothing that was trained may be lost for a picture.
                self._console.warn(f"figure {name!r} could not be drawn: {error}")
                continue
            try:
                if picture is not None:
                    self._write(f"figures/{name}.png", picture)
            except (StorageFailed, ConfigError) as error:
                self._console.warn(f"figure {name!r} is missing: {first_line(error)}")
        self._write(SUMMARY, json_text(summary))
        return self.send(splits, networks, rows, summary)

    def _write(self, name: str, content: bytes | str) -> None:
        folder = self._run.folder
        self._insist(lambda: folder.write(name, content), f"{folder}/{name} can't be written")

    def _read(self, name: str) -> bytes | None:
        folder = self._run.folder
        return self._insist(lambda: folder.read(name), f"{folder}/{name} can't be read")

    def _insist(self, work: Callable[[], T], what: str) -> T:
        try:
            return insist(work, what, self._config.run.storage_patience, self._console.warn)
        except StorageFailed as error:
            raise StorageFailed(
                f"{error}\nall epochs are trained; the same command with --name {self._run.name} --resume does the rest"
            ) from None

    def send(
        self,
        splits: Splits,
        networks: Sequence[StagedNetwork],
        rows: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any],
    ) -> Places:
        """Send what the run folder holds to MLflow. ``networks`` have the trained weights."""
        writer = self.writer()
        writer.offer(rows)
        before = [peer["top1"] for peer in summary["baseline"]["peers"]] if "baseline" in summary else None
        if before:
            gains = {f"gain/peer{i}": peer["gain"] for i, peer in enumerate(summary["peers"])}
            writer.log_metrics(gains, self._config.epochs, rows[-1]["time"])
        writer.set_tags({"mlflow.note.content": run_description(self._announced, tested_row(rows[-1]), before)})
        for name in (CONFIG, SUMMARY, *(f"figures/{figure}.png" for figure in FIGURES)):
            if (content := self._read(name)) is not None:
                writer.log_artifact(content, name)
        if self._config.run.log_models:
            self._log_models(splits, networks)
        return self._places()

    def _log_models(self, splits: Splits, networks: Sequence[StagedNetwork]) -> None:
        watched = splits.watched(tested=self._config.test)
        example = watched.take(torch.arange(2)).permute(0, 2, 3, 1).numpy()
        for name, network in zip(peer_names(self._config.peers), networks, strict=True):
            try:
                model = export_network(
                    network.plain(),
                    Path(self._scratch.name) / name,
                    classes=splits.classes,
                    mean=splits.mean,
                    std=splits.std,
                    image_size=splits.test.image_size,
                    example=np.ascontiguousarray(example),
                )
            except ModelExportError as error:
                self._console.warn(f"{name} is not logged as a model: {error}")
            else:
                self.writer().log_model(model, model_name(name))

    def _places(self) -> Places:
        folder, tracking = self._run.folder, self._tracking
        run_id = self.run_id()
        return Places(
            run_folder=str(folder),
            figures=f"{folder}/figures",
            tracking=tracking.place(self.writer().experiment_id, run_id),
            ui_command=ui_command(tracking.uri),
        )
