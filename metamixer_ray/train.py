"""The main job: ``python -m metamixer_ray.train``. Peers learn together; what they gained is told, drawn and kept."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from metamixer_ray.capacity import WorkerResources
from metamixer_ray.cli import parse, run_command
from metamixer_ray.config import TrainConfig, flatten
from metamixer_ray.data import NAMED_SOURCES, Splits, load_splits, wants_quadruples
from metamixer_ray.fitting import fit
from metamixer_ray.interruption import stoppable
from metamixer_ray.keeping import Keeper, plan_tracking
from metamixer_ray.mixing import build_mixer
from metamixer_ray.networks import StagedNetwork
from metamixer_ray.placement import connect, worker_resources
from metamixer_ray.preparation import batch_order, build_peers, part_of
from metamixer_ray.results import summarise, tested_row
from metamixer_ray.runs import (
    CONFIG,
    SUMMARY,
    TRACKED,
    Run,
    check_images,
    create_run,
    journal_of,
    open_run,
    storage_of,
)
from metamixer_ray.sharing import check_shared
from metamixer_ray.tracking import Console, PeerSummary, RunSummary
from metamixer_ray.tracking.provenance import repeat_command

BASELINE = "baseline"


def train(config: TrainConfig, console: Console | None = None, *, parent_run_id: str | None = None) -> dict[str, Any]:
    """Train the peers of ``config`` together and return the content of ``summary.json``.

    Joins the Ray cluster at hand or starts a local one, and leaves it running.

    Args:
        console: tells how it goes; by default it prints.
        parent_run_id: of the MLflow run that this one is to be a child of.

    Raises:
        UserError: what a person must mend: an option, the data, a checkpoint of another configuration.
        TrainingFailed: the training ended early; it can be resumed.
        Stopped: by Ctrl-C or SIGTERM; it can be resumed.
    """
    began = time.perf_counter()
    console = console or Console(config.run.verbose)
    config = with_absolute_paths(config)
    config.check()
    splits = load_splits(config.dataset, processes=os.cpu_count() or 1)
    networks = build_peers(config, classes=len(splits.classes), image_size=splits.train.image_size)
    part = part_of(config, splits, peer=0)
    steps = batch_order(config, part).steps_per_epoch
    with storage_of(config).to_be_read():
        run = open_run(config)
        finished = run.folder.read_json(SUMMARY)
    if config.run.resume_or_start and run.new:
        console.note(f"there is nothing to resume: run {run.name!r} starts anew")
    if finished is not None and config.baseline and "baseline" not in finished:
        finished = None  # the baseline is still to be trained
    if finished is not None and run.folder.exists(TRACKED):
        console.note(f"run {run.name!r} is finished already: {run.folder}/{SUMMARY}")
        return finished
    if not run.new:
        with run.folder.to_be_read():
            check_images(run.folder, splits.fingerprint)

    connect(config.placement, verbose=config.run.verbose)
    check_shared(config)
    resources = worker_resources(config)
    if run.new:
        create_run(run, config, splits)
    announced = announce(config, run, part, networks, steps, resources)
    console.opening(announced)
    tracking = plan_tracking(config, run, announced, parent_run_id)
    if finished is not None:
        console.note("this run is finished already; MLflow gets what it missed")
        with stoppable() as first, Keeper(config, run, tracking, announced, console) as keeper:
            first.append(keeper.mark_killed)
            keeper.load(splits, networks)
            keeper.send(splits, networks, journal_of(run.folder).rows(), finished)
            if "baseline" in finished:
                with keeper.alone(flatten(alone(config))) as (_, writer):
                    writer.offer(journal_of(run.folder.inside(BASELINE)).rows())
        return finished
    with stoppable() as first, Keeper(config, run, tracking, announced, console) as keeper:
        first.append(keeper.mark_killed)
        rows = fit(config, resources, run.folder, tracking.key, splits.fingerprint, keeper.writer(), console)
        alone_rows = None
        if config.baseline:
            console.note("now the same networks alone: same weights, same batches, no mixing, no exchange")
            single = alone(config)
            folder = run.folder.inside(BASELINE)
            with keeper.alone(flatten(single)) as (key, writer):
                alone_rows = fit(single, resources, folder, key, splits.fingerprint, writer, console)
        summary = summarise(
            config,
            rows,
            [peer.parameters for peer in announced.peers],
            wall_seconds=time.perf_counter() - began,
            alone=alone_rows[-1] if alone_rows else None,
        )
        places = keeper.keep(splits, networks, rows, alone_rows, summary)
    before = summary["baseline"]["peers"] if alone_rows else ()
    console.closing(tested_row(rows[-1]), places, [peer["top1"] for peer in before] or None)
    return summary


def alone(config: TrainConfig) -> TrainConfig:
    """The same networks without mixing and without exchange: same initial weights, same batches."""
    quadruples = wants_quadruples(config.dataset, organised=build_mixer(config.mixing).organised)
    return replace(
        config,
        baseline=False,
        dataset=replace(config.dataset, sampler="quadruple" if quadruples else "shuffle"),
        mixing=replace(config.mixing, mixer="none"),
        distillation=replace(
            config.distillation, distiller="none", divergence="kl", statistics="none", statistics_weight=0.0
        ),
    )


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers run in folders of their own, so paths are made absolute before anything is sent to them."""

    def absolute(text: str | None) -> str | None:
        if text is None or "://" in text or text in NAMED_SOURCES:
            return text
        path = Path(os.path.expanduser(text))
        return str(path.absolute()) if os.path.exists(path) or set("/*?[") & set(text) else text

    def folder(text: str | None) -> str | None:
        return text if text is None else str(Path(os.path.expanduser(text)).absolute())

    data = config.dataset
    return replace(
        config,
        dataset=replace(
            data,
            data=absolute(data.data) or data.data,
            test_data=absolute(data.test_data),
            data_root=folder(data.data_root),
            cache_dir=folder(data.cache_dir),
        ),
    )


def announce(
    config: TrainConfig,
    run: Run,
    splits: Splits,
    networks: Sequence[StagedNetwork],
    steps: int,
    resources: WorkerResources,
) -> RunSummary:
    """What the person is told before the first step."""
    mixing, distillation = config.mixing, config.distillation
    mixer = mixing.mixer + (f" ({mixing.pairing})" if mixing.mixer == "metamixer" else "")
    distiller: str = distillation.distiller
    if distiller != "none":
        distiller += f", weight {distillation.kd_weight:g}, T={distillation.temperature:g}"
    workers = f"{config.workers} worker{'s' * (config.workers > 1)}"
    if config.placement.replicas > 1:
        workers += f" ({len(config.peers)} peers x {config.placement.replicas} replicas)"
    return RunSummary(
        name=run.name,
        peers=tuple(
            PeerSummary(name=name, parameters=sum(p.numel() for p in network.parameters()))
            for name, network in zip(config.peers, networks, strict=True)
        ),
        data=splits.description,
        mixer=mixer,
        distiller=distiller,
        placement=f"{workers}, {resources}",
        epochs=config.epochs,
        batch_size=config.batch_size,
        steps_per_epoch=steps,
        run_folder=str(run.folder),
        command=repeat_command("metamixer_ray.train", instead=("--config", f"{run.folder}/{CONFIG}")),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m metamixer_ray.train``; returns its exit status."""

    def body(words: Sequence[str]) -> None:
        train(parse(words, program="python -m metamixer_ray.train", description=TrainConfig.__doc__ or ""))

    return run_command(body, argv)


class _CallableModule(ModuleType):
    """``from metamixer_ray import train`` finds this module once it is imported; it can be called all the same."""

    def __call__(self, config: TrainConfig, console: Console | None = None) -> dict[str, Any]:
        return train(config, console)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
