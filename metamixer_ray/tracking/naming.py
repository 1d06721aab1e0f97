"""What things are called in MLflow: rows become flat metrics, settings parameters, secrets ``***``."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metamixer_ray.masking import masked, masked_uri
from metamixer_ray.tracking.rows import Row, mean, number

PARAMETER_LENGTH = 6000
"""Characters that MLflow keeps of a parameter's value."""
TAG_LENGTH = 8000
"""Characters that MLflow keeps of a tag's value."""

_UNFIT_FOR_A_KEY = re.compile(r"[^\w\-. /:]")

PEER_MEANS = ("top1", "top5", "nll", "ece", "loss", "train_top1")
"""Values of the peers whose mean is logged as ``peers/<value>_mean``."""


def shortened(text: str, length: int) -> str:
    """``text``, cut to ``length`` characters with an ellipsis when it is longer."""
    return text if len(text) <= length else text[: length - 3] + "..."


def parameter_values(settings: Mapping[str, Any]) -> dict[str, str]:
    """Flat settings as MLflow parameters: texts as they are, all else as JSON (``true``, ``[0, 2]``).

    Secrets are masked and values longer than MLflow keeps are cut.
    """
    return {_key(name): shortened(masked_uri(_text(value)), PARAMETER_LENGTH) for name, value in settings.items()}


def tag_values(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as MLflow keeps them: masked and cut."""
    return {_key(name): shortened(masked(_text(value)), TAG_LENGTH) for name, value in tags.items()}


def metric_values(row: Row) -> dict[str, float]:
    """A row as flat metrics: ``peer0/top1``, ``peers/top1_mean``, ``exchange/seconds_per_step``, ...

    Numbers that are missing or not finite are left out, whole numbers are given as floats. ``epoch`` comes
    last: where it is there, all of that epoch is there.
    """
    metrics: dict[str, float] = {}
    for key, value in row.items():
        if key not in ("epoch", "time"):
            metrics.update(_numbers({key: value}, ""))
    for key in PEER_MEANS:
        if (average := mean([number(peer, key) for peer in row["peers"]])) is not None:
            metrics[f"peers/{key}_mean"] = average
    metrics["epoch"] = float(row["epoch"])
    return metrics


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "peers":
                for index, peer in enumerate(item):
                    yield from _numbers(peer, f"{name}/peer{index}".lstrip("/"))
            else:
                yield from _numbers(item, f"{name}/{key}".lstrip("/"))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for position, item in enumerate(value, start=1):
            yield from _numbers(item, f"{name}/{position}")
    elif (known := number({"": value}, "")) is not None:
        yield _key(name), known


def _key(name: str) -> str:
    return _UNFIT_FOR_A_KEY.sub("_", name)[:250]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def model_name(name: str) -> str:
    """A name that MLflow takes for a model; that of a person's own network, ``module:function``, it would not."""
    return re.sub(r"[/:.%\"']", "_", name)


def is_server(tracking_uri: str) -> bool:
    """Whether the store is an MLflow server, which has pages to look at."""
    return tracking_uri.startswith(("http://", "https://"))


# Else MLflow 3 shows the pages for language models, which have no runs of trainings.
TRAININGS = "?workflowType=machine_learning"


def run_place(tracking_uri: str, experiment: str, run_name: str, ids: tuple[str | None, str | None]) -> str:
    """Where a person finds the run: a link where the store is a server, else the names of experiment and run.

    Args:
        tracking_uri: the store.
        experiment, run_name: names.
        ids: the experiment's and the run's, as far as they are known.
    """
    if is_server(tracking_uri) and None not in ids:
        return f"{masked_uri(tracking_uri).rstrip('/')}/#/experiments/{ids[0]}/runs/{ids[1]}{TRAININGS}"
    return f"experiment {experiment}, run {run_name}"


def is_database(tracking_uri: str) -> bool:
    """Whether the store is a database, which has no pages of its own."""
    return re.match(r"(sqlite|postgresql|mysql|mssql)[+\w]*://", tracking_uri) is not None
