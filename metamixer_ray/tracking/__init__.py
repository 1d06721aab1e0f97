"""Tracking: the journal, MLflow, the console and the figures. Heavy modules are imported where they are used.

- `journal` keeps one row per epoch, see `rows`; the record of truth.
- `mlflow_writer` sends it to MLflow in the background; `models` exports networks, `provenance` says what
  ran where.
- `console` prints; `figures` draws.
"""

from metamixer_ray.tracking.console import Console
from metamixer_ray.tracking.journal import Journal
from metamixer_ray.tracking.mlflow_writer import MlflowWriter
from metamixer_ray.tracking.summary import PeerSummary, Places, RunSummary, run_description

__all__ = ["Console", "Journal", "MlflowWriter", "PeerSummary", "Places", "RunSummary", "run_description"]
