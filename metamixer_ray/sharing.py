"""What the machines of a cluster must share: the run folders and the MLflow store.

A file in the home folder of one machine looks the same on all of them, and is another on each.
"""

import os
import re
from collections.abc import Sequence

import ray

from metamixer_ray.config import TrainConfig
from metamixer_ray.errors import ConfigError
from metamixer_ray.growth import startable
from metamixer_ray.keeping import tracking_store
from metamixer_ray.masking import masked_uri
from metamixer_ray.runs import STORAGE_VARIABLE, storage_of


def check_shared(config: TrainConfig) -> None:
    """Refuse what only one machine has, where the connected cluster has several machines or may start some.

    Raises:
        ConfigError: says what to name instead.
    """
    machines = sorted({node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]})
    if (where := several(machines, grows=bool(startable(config.placement.grows_to).types))) is not None:
        refuse_private(config, where)


def several(machines: Sequence[str], *, grows: bool) -> str | None:
    """That there are several machines, in words; None where there is only one, and there will be no other."""
    if len(machines) > 1:
        named = ", ".join([*machines[:2], *["..."] * (len(machines) > 2)])
        return f"this cluster has {len(machines)} machines ({named})"
    return "this cluster's autoscaler may start other machines" if grows else None


def refuse_private(config: TrainConfig, where: str) -> None:
    """Refuse a store in a file, and run folders in a place that nobody named.

    A folder that somebody did name may well be one that all machines mount.

    Args:
        where: see :func:`several`.

    Raises:
        ConfigError: says what to name instead.
    """
    uri, _ = tracking_store(config.run.tracking_uri)
    if is_file(uri):
        raise ConfigError(
            f"--tracking-uri {masked_uri(uri)} is a file of one machine, and {where}: start an MLflow server that all "
            "can reach, 'mlflow server --host 0.0.0.0 --allowed-hosts HEAD:5000 --artifacts-destination s3://BUCKET/mlflow'"
            ", and name it by --tracking-uri or $MLFLOW_TRACKING_URI, such as http://HEAD:5000"
        )
    if config.run.storage is None and not os.environ.get(STORAGE_VARIABLE):
        raise ConfigError(
            f"the run folders would be in {storage_of(config)}, which is a folder of one machine, and {where}: name a "
            f"place that all can reach by --storage or ${STORAGE_VARIABLE}, such as s3://BUCKET/runs, gs://BUCKET/runs "
            "or a folder on NFS"
        )


def is_file(tracking_uri: str) -> bool:
    """Whether an MLflow store is a SQLite file or a folder."""
    scheme = re.match(r"([\w+-]+):", tracking_uri)
    return tracking_uri != "databricks" if scheme is None else scheme[1].partition("+")[0] in ("sqlite", "file")
