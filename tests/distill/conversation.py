"""What peers say to each other in tests: the cases that every rank runs, in groups of 2, 3 and 5 peers."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from metamixer_ray.distill import (
    Control,
    DistillConfig,
    Distiller,
    Exchange,
    Own,
    PeersDisagree,
    Reduce,
    attention_agreement,
    build_distiller,
    feature_statistics,
    learnt_by,
    statistics_loss,
    statistics_message,
)
from metamixer_ray.distill.config import DistillerName
from tests.distill import textbook

Textbook = Callable[[Sequence[Tensor], Tensor, int, float], tuple[Tensor, Tensor]]
TEXTBOOKS: dict[str, Textbook] = {
    "dml": lambda logits, targets, own, temperature: textbook.mutual_learning(logits, own, temperature),
    "ensemble": lambda logits, targets, own, temperature: textbook.ensemble_teaching(logits, own, temperature),
    "kdcl-naive": textbook.naive_teaching,
    "kdcl-linear": textbook.linear_teaching,
    "kdcl-minlogit": textbook.minlogit_teaching,
}
ALL: tuple[DistillerName, ...] = ("dml", "ensemble", "kdcl-naive", "kdcl-linear", "kdcl-minlogit")

LEARNING = {
    "ensemble-gated": DistillConfig(distiller="ensemble-gated", temperature=2.0),
    "okddip": DistillConfig(distiller="okddip", temperature=2.0, projection_dim=3),
    "mcl": DistillConfig(
        distiller="mcl",
        temperature=2.0,
        projection_dim=5,
        contrast_temperature=0.2,
        vcl_weight=0.5,
        icl_weight=0.25,
        soft_vcl_weight=2.0,
        soft_icl_weight=1.5,
    ),
}
"""Distillers with parameters of their own."""

GROUPS = (2, 3, 5)
TEMPERATURES = (1.0, 3.0, 4.0)
KINDS: tuple[Literal["attention", "similarity"], ...] = ("attention", "similarity")
GRID = 4
ROWS, CLASSES = 7, 11


def logits_of(peer: int) -> Tensor:
    return 3 * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(peer))


def targets_of_all() -> Tensor:
    """Label weights: some images of one class, some of two."""
    generator = torch.Generator().manual_seed(7)
    first, second = (F.one_hot(torch.randint(CLASSES, (ROWS,), generator=generator), CLASSES) for _ in range(2))
    kept = torch.tensor([1.0, 1.0, 0.9, 0.7, 0.6, 0.8, 1.0])[:, None]
    return kept * first + (1 - kept) * second


def embedding_of(peer: int) -> Tensor:
    """Of another width in each peer."""
    return torch.randn(ROWS, 4 + peer, generator=torch.Generator().manual_seed(50 + peer))


def learning_distiller(config: DistillConfig, peer: int, peers: int) -> Distiller:
    torch.manual_seed(peer)
    return build_distiller(config, width=embedding_of(peer).shape[1], leads=peer + 1 == peers)


def features_of(peer: int) -> list[Tensor]:
    """Two stages whose width and resolution differ between peers; one sample of peer 1 is dead."""
    generator = torch.Generator().manual_seed(100 + peer)
    sizes = ((4 + peer, 8), (8 + peer, 4 + 2 * (peer % 2)))
    stages = [torch.randn(ROWS, width, size, size, generator=generator) for width, size in sizes]
    if peer == 1:
        stages[0][2] = 0
    return stages


def own_tensor(peer: int) -> Tensor:
    return torch.arange(6.0).view(2, 3) + 10 * peer


def run_dml(exchange: Exchange, temperature: float, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return run_distiller(exchange, DistillConfig(temperature=temperature), dtype)


def run_distiller(exchange: Exchange, config: DistillConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    distiller = learning_distiller(config, exchange.own_index, exchange.peers)
    logits = logits_of(exchange.own_index).to(dtype).requires_grad_()
    embedding = embedding_of(exchange.own_index).requires_grad_()
    own = Own(logits=logits, targets=targets_of_all(), embedding=embedding)
    pending = exchange.start(distiller.say(own), reduce=distiller.reduce, control=Control(step=0))
    heard = pending.wait()
    loss = distiller.loss(own, heard)
    loss.backward()
    learnt = learnt_by(distiller)
    return {
        "loss": loss.detach(),
        "gradient": logits.grad,
        "embedding": embedding.grad,
        "parameters": {} if learnt is None else {name: p.grad for name, p in learnt.named_parameters()},
        "carries_gradient": any(t.requires_grad for t in (*heard.others.values(), *heard.each.values())),
        "same_again": pending.wait() is heard,
        "peers": heard.peers,
        "own_index": heard.own_index,
    }


def run_statistics(exchange: Exchange, kind: Literal["attention", "similarity"]) -> dict[str, Any]:
    features = [stage.requires_grad_() for stage in features_of(exchange.own_index)]
    own = feature_statistics(features, kind, grid=GRID)
    heard = exchange.start(statistics_message(own), control=Control(step=0)).wait()
    loss = statistics_loss(own, heard)
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": [stage.grad for stage in features],
        "agreement": attention_agreement(own, heard),
        "carries_gradient": any(t.requires_grad for t in heard.others.values()),
    }


def run_each(exchange: Exchange) -> dict[str, Any]:
    said = {"b": own_tensor(exchange.own_index), "a": torch.tensor(float(exchange.own_index))}
    control = Control(step=3, wish_stop=exchange.own_index == 0)
    heard = exchange.start(said, reduce="each", control=control).wait()
    return {"each": dict(heard.each), "others": dict(heard.others), "control": heard.control}


def run_lowest(exchange: Exchange) -> dict[str, Any]:
    index = exchange.own_index
    said = {"x": torch.tensor([float(index), -float(index), 3.0])}
    beside = {"m": torch.tensor([float(index)])}
    well = exchange.start(said, reduce="lowest", beside=beside, control=Control(step=3)).wait()
    # What only the minimum carries is as spoilt as what the sum does.
    said["x"][2] = float("nan") if index == 1 else 3.0
    spoilt = exchange.start(said, reduce="lowest", beside=beside, control=Control(step=4)).wait()
    gathered = exchange.start(said, reduce="each", beside=beside, control=Control(step=5)).wait()
    return {
        "lowest": dict(well.lowest),
        "others": dict(well.others),
        "spoilt": spoilt.control,
        "zeroed": spoilt.lowest["x"],
        "gathered": sorted(gathered.each),
    }


SPOILED = ("said", "beside", "loss", "word")


def run_nonfinite(exchange: Exchange, where: str) -> dict[str, Any]:
    """Peer 1 is spoiled in the tensor it says, in the statistics beside it, in its loss, or by its own word; the others
    are well."""
    spoiled = exchange.own_index == 1
    said = {"x": own_tensor(exchange.own_index) + 1, "y": torch.ones(3)}
    beside, loss = {"s": torch.ones(2)}, torch.tensor(1.0)
    if spoiled and where == "said":
        said["x"][1, 2] = float("nan")
    if spoiled and where == "beside":
        beside["s"][1] = float("inf")
    if spoiled and where == "loss":
        loss = torch.tensor(float("-inf"))
    control = Control(step=9, nonfinite=spoiled and where == "word", wish_checkpoint=spoiled)
    heard = exchange.start(said, beside=beside, control=control, also_finite=loss).wait()
    return {"others": dict(heard.others), "control": heard.control}


def run_two_spoiled(exchange: Exchange) -> dict[str, Any]:
    heard = exchange.start({}, control=Control(step=9, nonfinite=exchange.own_index < 2)).wait()
    return {"control": heard.control, "others": dict(heard.others)}


def error_of(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except PeersDisagree as error:
        return error
    return None


def run_drift(exchange: Exchange) -> dict[str, Any]:
    said = {"drift": torch.ones(4)}
    last = exchange.own_index == exchange.peers - 1
    exchange.start(said, control=Control(step=1022)).wait()
    pending = exchange.start(said, control=Control(step=1024 if last else 1023))
    later = error_of(pending.wait)
    again = error_of(exchange.start(said, control=Control(step=1025)).wait)
    # Different shapes at different steps: a collective of these would kill the processes.
    shifted = torch.ones(5 + exchange.own_index)
    first = error_of(lambda: exchange.start({"shifted": shifted}, control=Control(step=160 + last)))
    shapes = error_of(lambda: exchange.start({"shifted": shifted}, control=Control(step=160)))
    return {"later": later, "again": again, "first": first, "shapes": shapes}


def run_cost(exchange: Exchange) -> dict[str, Any]:
    said = {"p": torch.ones(128, 100), "h": torch.ones(128)}
    reduces: tuple[Reduce, ...] = ("mean", "each", "lowest")
    for _ in range(2):
        for reduce in reduces:
            exchange.start(said, control=Control(step=0), reduce=reduce).wait()
    exchange.reset_cost()
    costs: dict[str, Any] = {}
    for reduce in reduces:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for step in range(3):
                exchange.start(said, control=Control(step=step), reduce=reduce).wait()
        events = {event.key: event.count for event in profile.key_averages()}
        costs[reduce] = exchange.cost()
        costs[f"{reduce} collectives"] = {k: n for k, n in events.items() if k.startswith("gloo:")}
        exchange.reset_cost()
    return costs


def run_kept(exchange: Exchange) -> bool:
    """What was heard at one step must outlive the next, and two exchanges may be under way together."""
    ours = torch.full((4,), float(exchange.own_index))
    first = exchange.start({"x": ours}, control=Control(step=0))
    second = exchange.start({"x": ours + 100}, control=Control(step=1))
    heard, later = first.wait().others["x"], second.wait().others["x"]
    kept = heard.clone()
    exchange.start({"x": ours - 100}, control=Control(step=2)).wait()
    return torch.equal(heard, kept) and torch.allclose(later - heard, torch.tensor(100.0))


def in_bfloat16(group: dist.ProcessGroup) -> dict[str, Any]:
    """An exchange that sends bfloat16: what it hears and costs beside one that sends float32, and drift in it."""
    exchange, exact = Exchange(group, "cpu", torch.bfloat16), Exchange(group, "cpu")
    dml, textbook_dml = run_dml(exchange, 3.0), run_dml(exact, 3.0)
    bytes_sent = [each.cost().bytes_per_step for each in (exchange, exact)]
    said = {"x": own_tensor(exchange.own_index)}
    each = exchange.start(said, reduce="each", control=Control(step=0)).wait()
    spoiled = exchange.start(said, control=Control(step=5, nonfinite=exchange.own_index == 1)).wait()
    last = exchange.own_index == exchange.peers - 1
    drift = error_of(exchange.start(said, control=Control(step=1023 + last)).wait)
    return {
        "dml": dml,
        "exact": textbook_dml,
        "bytes": bytes_sent,
        "each": dict(each.each),
        "control": spoiled.control,
        "drift": drift,
    }


def converse(rank: int) -> dict[int, dict[str, Any]]:
    results: dict[int, dict[str, Any]] = {}
    for peers in GROUPS:
        group = dist.new_group(list(range(peers)))
        if rank >= peers:
            continue
        exchange = Exchange(group, "cpu")
        results[peers] = {
            "distillers": {
                name: {
                    temperature: run_distiller(exchange, DistillConfig(distiller=name, temperature=temperature))
                    for temperature in TEMPERATURES
                }
                for name in ALL
            },
            "learning": {name: run_distiller(exchange, config) for name, config in LEARNING.items()},
            "decoupled": run_distiller(
                exchange, DistillConfig(distiller="ensemble", divergence="dkd", dkd_alpha=0.7, dkd_beta=3.0)
            ),
            "bfloat16": run_dml(exchange, 3.0, torch.bfloat16),
            "in bfloat16": in_bfloat16(group),
            "statistics": {kind: run_statistics(exchange, kind) for kind in KINDS},
            "each": run_each(exchange),
            "lowest": run_lowest(exchange),
            "nonfinite": {where: run_nonfinite(exchange, where) for where in SPOILED},
            "two spoiled": run_two_spoiled(exchange),
            "cost": run_cost(exchange),
            "kept": run_kept(exchange),
            "drift": run_drift(exchange),
        }
    return results
