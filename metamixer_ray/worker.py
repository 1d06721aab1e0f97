"""What one worker runs: one peer network (or one replica of it) learning together with the others.

Reads top to bottom as the algorithm. Nothing here knows Ray: a :class:`Session` says where to start from and takes
what is to be reported.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from metamixer_ray.checkpoint import Progress, take_snapshot
from metamixer_ray.config import TrainConfig
from metamixer_ray.data import Batch, ImageSet, eval_batches, load_splits, normalise, train_batches
from metamixer_ray.distill import (
    Control,
    ControlSum,
    ErrorProducts,
    GeneralTeacher,
    Own,
    PeersDrifted,
    StaleCopies,
    attention_agreement,
    exchanges_statistics,
    feature_statistics,
    flat_state,
    kd_ramp,
    mean_over_places,
    statistics_loss,
    statistics_message,
    takes_embedding,
    tells_weights,
)
from metamixer_ray.evaluation import Evaluation, evaluate
from metamixer_ray.flags import MAX_SKIPPED_IN_A_ROW, agree_on_images, diverged, share_flags
from metamixer_ray.folder import checkpoint_name
from metamixer_ray.mesh import PeerMesh, share_buffers
from metamixer_ray.meters import Clock, Meters, gather_stages
from metamixer_ray.mixing import draw_plan, mix_images, mix_tap, mix_targets
from metamixer_ray.networks import join_taps, keep_features
from metamixer_ray.optimisation import average_gradients, learning_rate
from metamixer_ray.peer import Peer, set_up
from metamixer_ray.precision import autocast
from metamixer_ray.preparation import READ_AS, part_of
from metamixer_ray.randomness import seed_torch, torch_seed
from metamixer_ray.restoring import Checkpoints, checkpoint_identity, restore
from metamixer_ray.stepping import overflow

EVALUATION_BATCH = 500
# Who has to leave during an evaluation is heard after it, which may be too late if that is long: little more than
# LOST_SECONDS of training are lost then.
SHORT_EVALUATION, LOST_SECONDS = 5.0, 10.0

WriteCheckpoint = Callable[[Path], None]


class Session(Checkpoints, Protocol):
    """What surrounds a worker: the checkpoints that it starts from, whom it tells, and how patient it is."""

    def report(self, metrics: dict[str, Any], write: WriteCheckpoint | None, name: str | None) -> None:
        """Hand over metrics and, where ``write`` is given, have it write this rank's files of checkpoint ``name``.

        Every rank calls this equally often.
        """

    def stepped(self, epoch: int, step: int, steps: int) -> None:
        """``step`` of the ``steps`` of ``epoch`` (from 1) are done. Called after every step: it must cost nothing."""

    def told_to_stop(self) -> bool:
        """Whether this rank was asked to end, with a checkpoint, or has to leave its place. Called before every step:
        it must cost nothing."""


def train_peer(
    config: TrainConfig, mesh: PeerMesh, device: torch.device, session: Session, images: str | None = None
) -> None:
    """Train this rank's peer from where ``session`` says to the last epoch, or until a rank is told to stop.

    Args:
        images: the fingerprint of those that the training was started on; None takes any.

    Raises:
        UserError: bad data, a checkpoint that doesn't fit, a network that can't be built.
        Diverged: values stay non-finite; names the peer.
        PeersDrifted: peers are at different steps.
        StorageFailed: the images or the checkpoints can't be read for longer than ``session`` is patient.
    """
    splits = session.persist(lambda: load_splits(config.dataset), "the images")
    agree_on_images(splits.fingerprint, config.workers, images)
    peer = set_up(config, mesh, device, part_of(config, splits, mesh.peer))
    restored = restore(peer, session)
    progress = restored.progress
    if restored.name is not None or restored.warnings:
        # Whoever keeps the rows may have died between taking checkpoints and writing their rows. A row that is there
        # already is not written twice. The file is the first replica's, so each says again who it is.
        reports = [json.loads(report) | {"replica": mesh.replica} for report in progress.reports]
        told = {"event": "restored", "reports": reports, "warnings": restored.warnings}
        session.report(told, None, restored.name)
    stopping = False
    while progress.epoch < config.epochs and not stopping:
        stopping = train_epoch(peer, progress, session)


def train_epoch(peer: Peer, progress: Progress, session: Session) -> bool:
    """Train through the rest of an epoch, evaluate, and report. Returns whether all ranks were told to stop, and
    did so before the evaluation."""
    config, mesh, epoch = peer.config, peer.mesh, progress.epoch
    meters = Meters(progress.sums)
    clock = Clock(already=progress.epoch_seconds)
    steps, last_step = 0, peer.order.steps_per_epoch
    peer.exchange.reset_cost()
    peer.forward.train()
    for batch in train_batches(
        peer.splits.train,
        peer.order,
        config.dataset,
        seed=config.seed,
        epoch=epoch,
        replica=mesh.replica,
        first_step=progress.step,
        pin_memory=peer.device.type == "cuda",
    ):
        before_evaluation = batch.step + 1 == last_step and evaluates(peer, epoch)
        seconds = config.run.checkpoint_seconds
        if before_evaluation and progress.evaluation_seconds > SHORT_EVALUATION:
            seconds = min(seconds, LOST_SECONDS)
        due = 0 < seconds <= clock.since_checkpoint()
        wish = Control(step=progress.total_steps, wish_checkpoint=due, wish_stop=session.told_to_stop())
        flags = learn(peer, batch, epoch, meters, wish)
        progress.step, progress.total_steps = batch.step + 1, progress.total_steps + 1
        steps += 1
        session.stepped(epoch + 1, progress.step, last_step)
        progress.skipped_steps += bool(flags.nonfinite)
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if flags.nonfinite else 0
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            skipped = progress.skipped_in_a_row
            raise diverged(skipped, progress.total_steps - skipped, flags.culprit, config.peers)
        # After an epoch's last step the next checkpoint is near, unless an evaluation comes first.
        if flags.wish_stop or (flags.wish_checkpoint and (progress.step < last_step or before_evaluation)):
            progress.sums, progress.epoch_seconds = meters.shared(mesh.replica_group, peer.device), clock.seconds()
            name = checkpoint_name(epoch, progress.step)
            told = {"event": "checkpoint", "skipped_in_a_row": progress.skipped_in_a_row}
            session.report(told, checkpoint_writer(peer, progress), name)
            clock.checkpointed()
            if flags.wish_stop:
                return True

    if progress.step != last_step:
        # Others would wait in the exchange for a rank that waits in the evaluation.
        raise PeersDrifted(
            f"peer {mesh.peer} ({config.peers[mesh.peer]}), replica {mesh.replica}, ran out of batches after step "
            f"{progress.step} of {last_step} of epoch {epoch + 1}"
        )
    train_seconds, all_train_seconds = clock.since_start(), clock.seconds()
    scores, test = evaluate_epoch(peer, epoch)
    if evaluates(peer, epoch):
        progress.evaluation_seconds = clock.since_start() - train_seconds
    progress.elapsed += clock.seconds()
    cost = peer.exchange.cost()
    report = {
        "event": "epoch",
        "epoch": epoch + 1,
        "step": progress.total_steps,
        "peer": mesh.peer,
        "replica": mesh.replica,
        "seconds": clock.seconds(),
        "elapsed": progress.elapsed,
        # Of the whole epoch: one that was resumed after its last step has none left to measure.
        "images_per_second": peer.order.images_per_epoch / all_train_seconds,
        "split": "test" if peer.splits.validation is None else "validation",
        "train": gather_stages(meters.means(mesh.replica_group, peer.device), "attention_agreement")
        | {"lr": peer.optimizer.param_groups[0]["lr"]},
        "scores": asdict(scores) if scores else None,
        "test": asdict(test) if test else None,
        "exchange": {
            "bytes_per_step": cost.sent_bytes / max(1, steps),
            "seconds_per_step": cost.seconds / max(1, steps),
            "wait_fraction": cost.wait_seconds / train_seconds,
        },
        "skipped_steps": progress.skipped_steps,
        "skipped_in_a_row": progress.skipped_in_a_row,
    }
    progress.epoch, progress.step, progress.sums, progress.epoch_seconds = epoch + 1, 0, {}, 0.0
    progress.reports.append(json.dumps(report))
    session.report(report, checkpoint_writer(peer, progress), checkpoint_name(epoch + 1))
    return False


def learn(peer: Peer, batch: Batch, epoch: int, meters: Meters, wish: Control) -> ControlSum:
    """One step: mix, look, say, hear, learn. Returns the flags that all peers and replicas share."""
    config, mesh, device = peer.config, peer.mesh, peer.device
    exchange = peer.exchange if batch.step % config.distillation.exchange_every == 0 else peer.silence
    now = epoch + batch.step / peer.order.steps_per_epoch

    # The same images and the same mix on all peers: drawn, not sent.
    plan = draw_plan(
        peer.mixer,
        config.mixing,
        seed=config.seed,
        epoch=epoch,
        step=batch.step,
        replica=mesh.replica,
        rows=len(batch.labels),
        height=batch.images.shape[-2],
        width=batch.images.shape[-1],
        epochs=config.epochs,
        available_stages=peer.stages_to_mix,
    ).to(device)
    clean = normalise(batch.images.to(device, non_blocking=True), peer.splits.mean, peer.splits.std)
    images = mix_images(clean.contiguous(memory_format=torch.channels_last), plan)
    labels = F.one_hot(batch.labels.to(device, non_blocking=True), len(peer.splits.classes)).float()
    targets = mix_targets(labels, plan)

    # How much it is to learn from the others, and with copies of them, how they have become.
    kd_weight = config.distillation.kd_weight * kd_ramp(config.distillation, now, config.epochs)
    if peer.stale is not None and tells_weights(config.distillation, wish.step, kd_weight):
        refresh_copies(peer, peer.stale, wish.step)

    # This peer's view of them.
    features: dict[int, Tensor] = {}
    watch = exchange.peers > 1 and exchanges_statistics(config.distillation, batch.step)
    compared = list(peer.stages_to_compare) if watch else []
    embedded = [len(peer.network.stage_names)] if takes_embedding(config.distillation) else []
    taps = join_taps(mix_tap(plan), keep_features(features, compared + embedded))
    seed_torch(torch_seed(config.seed, "network", mesh.peer, mesh.replica, epoch, batch.step), device)
    before = [buffer.clone() for buffer in peer.buffers]
    with autocast(peer.precision, device):
        logits = peer.forward(images, taps)
    cross_entropy = F.cross_entropy(logits.float(), targets)
    layouts = {stage: READ_AS[peer.network.layouts[stage - 1]] for stage in features}
    own = Own(logits=logits, targets=targets)
    for stage in embedded:
        own = replace(own, embedding=mean_over_places(features[stage], layouts[stage]))
    if peer.stale is not None and peer.stale.told is not None:
        with autocast(peer.precision, device):
            own = replace(own, stale=peer.stale.look(images, mix_tap(plan)))
    with torch.set_grad_enabled(config.distillation.statistics_weight > 0):
        statistics = feature_statistics(
            [features[stage] for stage in compared],
            config.distillation.statistics,
            grid=config.distillation.statistics_grid,
            layout=[layouts[stage] for stage in compared],
        )

    # What the others say of them: one collective, under way while this peer prepares to learn.
    pending = exchange.start(
        peer.distiller.say(own),
        reduce=peer.distiller.reduce,
        beside=statistics_message(statistics),
        # What not all would hear, nobody may act on.
        control=wish if exchange is peer.exchange else Control(step=wish.step),
        also_finite=cross_entropy.detach() + peer.stepper.broken + overflow(peer.running),
    )
    hits = targets.gather(1, logits.argmax(dim=1, keepdim=True)).mean()
    for group in peer.optimizer.param_groups:
        group["lr"] = learning_rate(config.optimisation, mesh.peer, now, config.epochs)
    peer.optimizer.zero_grad(set_to_none=True)
    heard = pending.wait()

    # What it learns.
    kd = peer.distiller.loss(own, heard)
    unlikeness = statistics_loss(statistics, heard)
    loss = cross_entropy + kd_weight * kd
    if config.distillation.statistics_weight > 0:
        loss = loss + config.distillation.statistics_weight * unlikeness
    peer.stepper.backward(loss)

    # Read only now: a GPU has long heard of the others, so this doesn't hold it up.
    flags = share_flags(heard.control, mesh, device)
    if flags.nonfinite:
        # All peers skip together, so that they stay in step and nobody learns from a broken one. The running
        # statistics of BatchNorm have already seen it, and would never forget a NaN.
        for buffer, old in zip(peer.buffers, before, strict=True):
            buffer.copy_(old)
        peer.stepper.skip()
        return flags
    if peer.learnt is not None:
        average_gradients(peer.learnt, mesh.replica_group)
    peer.stepper.step()

    meters.add(loss=loss, cross_entropy=cross_entropy, train_top1=hits)
    if exchange is peer.exchange or len(own.stale):
        meters.add(kd=kd)
    if statistics:
        agreement = attention_agreement(statistics, heard)
        stages = {f"attention_agreement/{i}": value for i, value in enumerate(agreement, start=1)}
        meters.add(statistics=unlikeness, **stages)
    return flags


def refresh_copies(peer: Peer, stale: StaleCopies, step: int) -> None:
    """Tell the other peers how this one's network has become, and hear it of theirs."""
    share_buffers(peer.network, peer.mesh)
    order = peer.mesh.peers_by_rank
    told = peer.exchange.spread(flat_state(peer.network), [stale.sizes[each] for each in order], step=step)
    stale.refresh(dict(zip(order, told, strict=True)))


def checkpoint_writer(peer: Peer, progress: Progress) -> WriteCheckpoint | None:
    """The function that writes this peer's files as they should be now, whenever it is called; the first replica
    writes for all of its peer."""
    if peer.mesh.replica > 0:
        return None

    return take_snapshot(
        peer.mesh.peer,
        peer.network.network,
        peer.optimizer,
        progress,
        checkpoint_identity(peer.config, peer.splits),
        peer.learnt,
        None if peer.stale is None else peer.stale.told,
        peer.stepper,
    ).write


def watched(config: TrainConfig, epoch: int) -> bool:
    """Whether scores are due after ``epoch``, from 0."""
    return epoch + 1 == config.epochs or (epoch + 1) % config.evaluate_every == 0


def evaluates(peer: Peer, epoch: int) -> bool:
    """Whether images are looked at after ``epoch``, from 0: for scores, or to share out a teacher."""
    return watched(peer.config, epoch) or isinstance(peer.distiller, GeneralTeacher)


def evaluate_epoch(peer: Peer, epoch: int) -> tuple[Evaluation | None, Evaluation | None]:
    """Scores on the split that is watched, when due, and on the test set, after the last epoch."""

    def score(images: ImageSet, listen: Callable[[Tensor, Tensor], None] | None = None) -> Evaluation:
        return evaluate(
            peer.network,
            eval_batches(images, batch_size=EVALUATION_BATCH, replica=peer.mesh.replica, replicas=peer.mesh.replicas),
            mesh=peer.mesh,
            mean=peer.splits.mean,
            std=peer.splits.std,
            device=peer.device,
            precision=peer.precision,
            listen=listen,
        )

    mesh, teacher = peer.mesh, peer.distiller
    last, due = epoch + 1 == peer.config.epochs, watched(peer.config, epoch)
    if not evaluates(peer, epoch):
        return None, None
    share_buffers(peer.network, mesh)
    if peer.splits.validation is None:
        scores = score(peer.splits.test)
        return scores, scores if last else None
    if isinstance(teacher, GeneralTeacher) and mesh.peer_group is not None:
        errors = ErrorProducts(mesh.peer_group, mesh.peers_by_rank, peer.device)
        scores = score(peer.splits.validation, errors.add)
        teacher.share.fill_(errors.shares(mesh.replica_group)[mesh.peer])
    else:
        scores = score(peer.splits.validation)
    return scores if due else None, score(peer.splits.test) if last and peer.config.test else None
