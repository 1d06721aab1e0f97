"""What a finished training amounts to: ``summary.json``, a contract that other programs may rely on.

All scores are fractions of the last epoch on the test set (with ``--no-test`` on the validation split), never the best
epoch's.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from metamixer_ray.config import TrainConfig

Row = Mapping[str, Any]


def summarise(
    config: TrainConfig,
    rows: Sequence[Row],
    parameters: Sequence[int],
    *,
    wall_seconds: float,
    alone: Row | None = None,
) -> dict[str, Any]:
    """The content of ``summary.json``.

    Args:
        rows: all rows of ``metrics.jsonl``, by epoch; the last one holds the test scores.
        parameters: per peer.
        wall_seconds: from the command's start to here, Ray's start included.
        alone: the last row of the baseline, when there is one.
    """
    last = rows[-1]
    test = last.get("test", last)
    peers = [
        {**scores, "network": network, "parameters": count}
        for scores, network, count in zip(test["peers"], config.peers, parameters, strict=True)
    ]
    summary: dict[str, Any] = {
        "peers": peers,
        "ensemble": test["ensemble"],
        "agreement": test["agreement"],
        "images_per_second": median(row["images_per_second"] for row in rows),
        "exchange": {key: fmean(row["exchange"][key] for row in rows) for key in last["exchange"]},
        "mixer": config.mixing.mixer,
        "distiller": config.distillation.distiller,
        "split": "test" if "test" in last else last["split"],
        "seed": config.seed,
        "epochs": config.epochs,
        "steps": last["step"],
        "skipped_steps": last["skipped_steps"],
        "training_seconds": last["elapsed"],
        "wall_seconds": wall_seconds,
    }
    if alone is not None:
        before = alone.get("test", alone)
        for peer, single in zip(peers, before["peers"], strict=True):
            peer["gain"] = peer["top1"] - single["top1"]
        summary["baseline"] = {
            "peers": before["peers"],
            "ensemble": before["ensemble"],
            "agreement": before["agreement"],
        }
    return summary


def tested_row(row: Row) -> dict[str, Any]:
    """The last row with the test scores, where there are any, in place of those of the validation split."""
    if "test" not in row:
        return dict(row)
    test = row["test"]
    peers = [{**before, **scores} for before, scores in zip(row["peers"], test["peers"], strict=True)]
    return {**row, **test, "peers": peers, "split": "test"}
