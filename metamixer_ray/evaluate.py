"""Score a trained run again: ``python -m metamixer_ray.evaluate RUN [--data ...]``.

Gives the numbers that the training reported, or those on other data of the same classes.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from metamixer_ray.cli import run_command
from metamixer_ray.config import TrainConfig
from metamixer_ray.data import DataConfig, ImageSet, eval_batches, load_splits
from metamixer_ray.errors import ConfigError, DataError
from metamixer_ray.evaluation import ScoreSums, probabilities_of
from metamixer_ray.folder import RunFolder
from metamixer_ray.networks import StagedNetwork
from metamixer_ray.precision import resolve_precision
from metamixer_ray.preparation import build_peers
from metamixer_ray.reporting import peer_names
from metamixer_ray.restoring import load_trained
from metamixer_ray.runs import RUN, read_config, storage_of
from metamixer_ray.tracking.summary import score_table
from metamixer_ray.worker import EVALUATION_BATCH


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Score a trained run's peers and their ensemble: on its own test split, or on other data of the same classes."""

    run: Annotated[str, tyro.conf.Positional]
    """The run: its folder or URI, or its name in the default storage."""
    data: str | None = None
    """Other data, named like --data in training: its test part, or all of it where no part is named so. Default: the
    run's."""
    image_column: str | None = None
    """Parquet column with the images; found by its type when there is only one."""
    label_column: str | None = None
    """Parquet column with the integer labels; found by its type when there is only one."""
    data_root: str | None = None
    """Folder that already holds a named torchvision set."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    json: bool = False
    """Print JSON instead of a table."""

    def dataset(self, image_size: int) -> DataConfig | None:
        """The other data, brought to the size that the networks were trained on; None for the run's own."""
        if self.data is None:
            return None
        return DataConfig(
            data=self.data,
            image_column=self.image_column,
            label_column=self.label_column,
            data_root=self.data_root,
            image_size=image_size,
        )


def evaluate_run(
    folder: RunFolder, options: EvaluateOptions | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Scores of a run's peers and ensemble: ``{"peers": [...], "ensemble": ..., "agreement": ...}`` as in summary.json.

    Args:
        options: which data, if not the run's own test split. Images are normalised as in training.

    Raises:
        UserError: no such run, no checkpoint, or data that doesn't fit.
    """
    config, facts = read_config(folder), folder.read_json(RUN)
    if config is None or facts is None:
        raise ConfigError(
            f"there is no run in {folder}: give a run's folder, or its name in {storage_of(TrainConfig())}"
        )
    other = options.dataset(facts["image_size"]) if options else None
    splits = load_splits(other or config.dataset, scored_only=other is not None)
    if other is None and splits.fingerprint != facts["data_fingerprint"]:
        raise DataError(
            f"--data: the images of the run have changed since it was trained ({config.dataset.data}), so its scores "
            "would be others; give --data explicitly to score those that are there now"
        )
    if list(splits.classes) != facts["classes"]:
        raise DataError(
            f"--data {other and other.data}: its classes are {', '.join(splits.classes)[:200]}; the run was trained on "
            f"{', '.join(facts['classes'])[:200]}: give data with the same classes in the same order"
        )
    networks = build_peers(config, classes=len(facts["classes"]), image_size=facts["image_size"])
    load_trained(networks, folder, None)
    # What a sweep's trial must not see is not shown here either.
    images = splits.test if other else splits.watched(tested=config.test)
    return _score(config, networks, images, tuple(facts["mean"]), tuple(facts["std"]), torch.device(device))


@torch.inference_mode()
def _score(
    config: TrainConfig,
    networks: Sequence[StagedNetwork],
    scored: ImageSet,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
) -> dict[str, Any]:
    precision = resolve_precision(config.precision, device)
    sums = [ScoreSums(device) for _ in networks]
    together = ScoreSums(device)
    agreed = images = 0
    for network in networks:
        network.to(device).eval()
    for batch in eval_batches(scored, batch_size=EVALUATION_BATCH, replica=0, replicas=1):
        labels, pixels = batch.labels.to(device), batch.images.to(device)
        each = torch.stack([probabilities_of(n, pixels, mean, std, precision) for n in networks])
        for peer_sums, probabilities in zip(sums, each, strict=True):
            peer_sums.add(probabilities, labels)
        together.add(each.mean(dim=0), labels)
        predictions = each.argmax(dim=2)
        agreed += int((predictions == predictions[0]).all(dim=0).sum())
        images += len(labels)
    several = len(networks) > 1
    return {
        "images": images,
        "peers": [
            {"name": name, **asdict(peer_sums.scores())}
            for name, peer_sums in zip(peer_names(config.peers), sums, strict=True)
        ],
        "ensemble": asdict(together.scores()) if several else None,
        "agreement": agreed / images if several else None,
    }


def find_run(text: str) -> RunFolder:
    """The folder that ``text`` means: a path or URI, else a name in the default storage."""
    if "://" in text or Path(text).expanduser().exists():
        return RunFolder(text)
    return storage_of(TrainConfig()).inside(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m metamixer_ray.evaluate``; returns its exit status."""

    def body(words: Sequence[str]) -> None:
        options: EvaluateOptions = tyro.cli(EvaluateOptions, prog="python -m metamixer_ray.evaluate", args=list(words))
        device = options.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        scores = evaluate_run(find_run(options.run), options, device)
        print(json.dumps(scores, indent=2) if options.json else as_table(scores))

    return run_command(body, argv)


def as_table(scores: dict[str, Any]) -> str:
    """The scores as aligned columns."""
    header, lines = score_table({**scores, "epoch": 0})
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    table = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in [header, *lines]
    ]
    tail = f"{scores['images']} images"
    if scores["agreement"] is not None:
        tail += f"; the peers agree on {100 * scores['agreement']:.2f} %"
    return "\n".join([*table, tail])


if __name__ == "__main__":
    sys.exit(main())
