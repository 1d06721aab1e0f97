"""What all trainings of a sweep, or of a comparison, have in common, and how the whole of them stands in MLflow."""

import os
from collections.abc import Mapping
from typing import Any

from metamixer_ray.capacity import WorkerResources
from metamixer_ray.config import TrainConfig, plain_settings
from metamixer_ray.data import Splits
from metamixer_ray.keeping import TrackingPlan, tracking_store
from metamixer_ray.runs import data_facts
from metamixer_ray.sweeps.config import ObjectiveName
from metamixer_ray.sweeps.opening import TRIALS, Sweep
from metamixer_ray.sweeps.trial import SweepPlan
from metamixer_ray.tracking.provenance import environment_tags, repeat_command, source_tags
from metamixer_ray.tracking.summary import repeated_by

# Variables of the driver's that trials are given: how MLflow and storage are reached.
HANDED_ON = ("MLFLOW_", "AWS_")


def plan_trials(
    training: TrainConfig,
    sweep: Sweep,
    parent: TrackingPlan,
    resources: WorkerResources,
    splits: Splits,
    parent_run_id: str | None,
    objective: ObjectiveName = "mean",
) -> SweepPlan:
    """The plan of trials that differ from ``training`` in their settings alone."""
    return SweepPlan(
        name=sweep.name,
        key=sweep.key,
        folder=sweep.folder.inside(TRIALS).uri,
        training=plain_settings(training),
        objective=objective,
        split="test" if splits.validation is None else "validation",
        resources=resources,
        facts=data_facts(splits),
        tracking_uri=parent.uri,
        artifact_location=parent.artifact_location,
        parent_run_id=parent_run_id,
        about=f"A training of the {sweep.kind.noun} {sweep.name} on {splits.description}",
        tags={**parent.tags, "data": training.dataset.data},
        environment={name: value for name, value in os.environ.items() if name.startswith(HANDED_ON)},
    )


def parent_plan(
    training: TrainConfig, sweep: Sweep, facts: Mapping[str, Any], *, module: str, subject: str, data: str
) -> TrackingPlan:
    """How the sweep itself is written to MLflow: the run that its trials are children of.

    Args:
        facts: its options that can't change when it is resumed.
        module: whose command line it was.
        subject, data: what it is about and on which images, in words.
    """
    uri, artifacts = tracking_store(training.run.tracking_uri)
    command = repeat_command(module)
    return TrackingPlan(
        uri=uri,
        experiment=training.run.experiment,
        run_name=sweep.name,
        key=sweep.key,
        parameters={name: value for name, value in facts.items() if name not in sweep.kind.free},
        tags={
            **environment_tags(),
            **source_tags(command),
            "sweep": sweep.name,
            "run_folder": str(sweep.folder),
            "mlflow.note.content": f"A {sweep.kind.noun} {subject}: {', '.join(training.peers)} on {data}; "
            f"{training.epochs} epochs. A child run per training; run folder: `{sweep.folder}`\n\n"
            f"{repeated_by(command)}",
        },
        artifact_location=artifacts,
    )
