"""The exchange over real gloo groups of 2, 3 and 5 peers.

Five processes run every case once in groups of the first 2, 3 and 5 ranks; the tests then look at what each
heard.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from metamixer_ray.distill import (
    Control,
    DistillConfig,
    Exchange,
    Heard,
    PeersDisagree,
    PeersDrifted,
    Reduce,
    attention_agreement,
    build_distiller,
    feature_statistics,
    statistics_loss,
    statistics_message,
)
from metamixer_ray.distill.config import DistillerName
from metamixer_ray.distill.control import CONTROL_FLOATS
from tests.distill import textbook
from tests.distill.processes import run_ranks

Textbook = Callable[[Sequence[Tensor], Tensor, int, float], tuple[Tensor, Tensor]]
TEXTBOOKS: dict[str, Textbook] = {
    "dml": lambda logits, targets, own, temperature: textbook.mutual_learning(logits, own, temperature),
    "ensemble": lambda logits, targets, own, temperature: textbook.ensemble_teaching(logits, own, temperature),
    "kdcl-naive": textbook.naive_teaching,
    "kdcl-linear": textbook.linear_teaching,
    "kdcl-minlogit": textbook.minlogit_teaching,
}
ALL: tuple[DistillerName, ...] = ("dml", "ensemble", "kdcl-naive", "kdcl-linear", "kdcl-minlogit")

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
    distiller = build_distiller(config)
    logits = logits_of(exchange.own_index).to(dtype).requires_grad_()
    targets = targets_of_all()
    pending = exchange.start(distiller.say(logits, targets), reduce=distiller.reduce, control=Control(step=0))
    heard = pending.wait()
    loss = distiller.loss(logits, targets, heard)
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradient": logits.grad,
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


def run_nonfinite(exchange: Exchange, where: str) -> dict[str, Any]:
    """Peer 1 is spoiled in the tensor it says, in its loss, or by its own word; the others are well."""
    spoiled = exchange.own_index == 1
    said = {"x": own_tensor(exchange.own_index) + 1, "y": torch.ones(3)}
    loss = torch.tensor(1.0)
    if spoiled and where == "said":
        said["x"][1, 2] = float("nan")
    if spoiled and where == "loss":
        loss = torch.tensor(float("-inf"))
    control = Control(step=9, nonfinite=spoiled and where == "word", wish_checkpoint=spoiled)
    heard = exchange.start(said, control=control, also_finite=loss).wait()
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
            "decoupled": run_distiller(
                exchange, DistillConfig(distiller="ensemble", divergence="dkd", dkd_alpha=0.7, dkd_beta=3.0)
            ),
            "bfloat16": run_dml(exchange, 3.0, torch.bfloat16),
            "in bfloat16": in_bfloat16(group),
            "statistics": {kind: run_statistics(exchange, kind) for kind in KINDS},
            "each": run_each(exchange),
            "lowest": run_lowest(exchange),
            "nonfinite": {where: run_nonfinite(exchange, where) for where in ("said", "loss", "word")},
            "two spoiled": run_two_spoiled(exchange),
            "cost": run_cost(exchange),
            "kept": run_kept(exchange),
            "drift": run_drift(exchange),
        }
    return results


@pytest.fixture(scope="module")
def conversation(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, dict[str, Any]]]:
    """By rank, then by number of peers, then by case."""
    return run_ranks(converse, max(GROUPS), tmp_path_factory.mktemp("ranks"))


each_group = pytest.mark.parametrize("peers", GROUPS)


@each_group
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ALL)
def test_the_collective_loss_is_the_textbook_loss(
    conversation: Any, peers: int, temperature: float, name: DistillerName
) -> None:
    logits, targets = [logits_of(peer) for peer in range(peers)], targets_of_all()
    # The best shares are found by different means, each only so well.
    slack = 2000 if name == "kdcl-linear" else 1
    for rank in range(peers):
        got = conversation[rank][peers]["distillers"][name][temperature]
        loss, gradient = TEXTBOOKS[name](logits, targets, rank, temperature)
        torch.testing.assert_close(got["loss"].double(), loss, rtol=slack * 2e-6, atol=slack * 1e-6)
        torch.testing.assert_close(got["gradient"].double(), gradient, rtol=slack * 1e-5, atol=slack * 2e-7)


@each_group
def test_the_collective_decoupled_loss_is_the_textbook_loss(conversation: Any, peers: int) -> None:
    logits, targets = [logits_of(peer) for peer in range(peers)], targets_of_all()
    for rank in range(peers):
        got = conversation[rank][peers]["decoupled"]
        teacher = torch.stack(logits).double().mean(0)
        loss, gradient = textbook.decoupled(logits[rank], teacher, targets, 3.0, alpha=0.7, beta=3.0)
        torch.testing.assert_close(got["loss"].double(), loss, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(got["gradient"].double(), gradient, rtol=1e-5, atol=2e-7)


@each_group
@pytest.mark.parametrize("kind", KINDS)
def test_collective_statistics_are_the_pairwise_loss(conversation: Any, peers: int, kind: str) -> None:
    features = [features_of(peer) for peer in range(peers)]
    for rank in range(peers):
        got = conversation[rank][peers]["statistics"][kind]
        loss, gradients = textbook.statistics(kind, features, rank, GRID)
        torch.testing.assert_close(got["loss"].double(), loss, rtol=2e-6, atol=1e-6)
        for mine, theirs in zip(got["gradients"], gradients, strict=True):
            # The dead sample's direction is undefined: the textbook has nan or a huge number there.
            alive = torch.ones(ROWS, dtype=torch.bool)
            alive[2] = rank != 1
            torch.testing.assert_close(mine[alive].double(), theirs[alive], rtol=1e-5, atol=1e-7)
            assert torch.isfinite(mine).all()
        assert got["agreement"].shape == (2,)
        assert ((got["agreement"] > -1) & (got["agreement"] < 1)).all()


@each_group
def test_nothing_heard_carries_gradient(conversation: Any, peers: int) -> None:
    for rank in range(peers):
        results = conversation[rank][peers]
        for name in ALL:
            assert not any(results["distillers"][name][t]["carries_gradient"] for t in TEMPERATURES)
        assert not any(results["statistics"][kind]["carries_gradient"] for kind in KINDS)


@each_group
def test_each_peer_knows_itself_and_is_heard_in_order(conversation: Any, peers: int) -> None:
    for rank in range(peers):
        results = conversation[rank][peers]
        told = results["distillers"]["dml"][1.0]
        assert told["own_index"] == rank
        assert told["peers"] == peers
        assert told["same_again"]
        torch.testing.assert_close(
            results["each"]["each"]["b"], torch.stack([own_tensor(peer) for peer in range(peers)])
        )
        torch.testing.assert_close(results["each"]["each"]["a"], torch.arange(float(peers)))
        others = torch.stack([own_tensor(peer) for peer in range(peers) if peer != rank]).mean(0)
        torch.testing.assert_close(results["each"]["others"]["b"], others)
        assert results["each"]["control"].wish_stop == 1
        assert results["each"]["control"].wish_checkpoint == 0


@each_group
def test_the_lowest_of_all_is_heard_beside_the_means(conversation: Any, peers: int) -> None:
    for rank in range(peers):
        got = conversation[rank][peers]["lowest"]
        torch.testing.assert_close(got["lowest"], {"x": torch.tensor([0.0, 1.0 - peers, 3.0])})
        others = [float(peer) for peer in range(peers) if peer != rank]
        torch.testing.assert_close(got["others"], {"m": torch.tensor([sum(others) / len(others)])})
        assert (got["spoilt"].nonfinite, got["spoilt"].culprit) == (1, 1)
        torch.testing.assert_close(
            got["zeroed"], torch.tensor([0.0, min(0.0, *(-p for p in range(peers) if p != 1)), 0.0])
        )
        assert got["gathered"] == ["m", "x"]


@each_group
def test_half_precision_logits_give_float32_losses(conversation: Any, peers: int) -> None:
    logits = [logits_of(peer).bfloat16() for peer in range(peers)]
    for rank in range(peers):
        got = conversation[rank][peers]["bfloat16"]
        loss, gradient = textbook.mutual_learning(logits, rank, 3.0)
        assert got["loss"].dtype == torch.float32
        assert got["gradient"].dtype == torch.bfloat16
        torch.testing.assert_close(got["loss"].double(), loss, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(got["gradient"].double(), gradient, rtol=1e-2, atol=1e-5)


@each_group
@pytest.mark.parametrize("where", ["said", "loss", "word"])
def test_a_spoiled_peer_sends_zeros_and_is_named(conversation: Any, peers: int, where: str) -> None:
    for rank in range(peers):
        got = conversation[rank][peers]["nonfinite"][where]
        assert got["control"].nonfinite == 1
        assert got["control"].culprit == 1
        assert got["control"].wish_checkpoint == 1  # its control still counts
        well = [peer for peer in range(peers) if peer not in (rank, 1)]
        expected = sum((own_tensor(peer) + 1 for peer in well), torch.zeros(2, 3)) / (peers - 1)
        torch.testing.assert_close(got["others"]["x"], expected)
        torch.testing.assert_close(got["others"]["y"], torch.full((3,), len(well) / (peers - 1)))


@each_group
def test_several_spoiled_peers_are_counted(conversation: Any, peers: int) -> None:
    for rank in range(peers):
        got = conversation[rank][peers]["two spoiled"]
        assert got["control"].nonfinite == 2
        assert got["control"].culprit is None
        assert got["others"] == {}


@each_group
def test_drifted_peers_are_found_out_by_all(conversation: Any, peers: int) -> None:
    for rank in range(peers):
        drift = conversation[rank][peers]["drift"]
        assert isinstance(drift["later"], PeersDrifted)
        assert "different steps" in str(drift["later"])
        assert drift["again"] is None  # back in step
        assert isinstance(drift["first"], PeersDrifted)
        assert "from step 160 to step 161" in str(drift["first"])
        assert isinstance(drift["shapes"], PeersDisagree)
        assert not isinstance(drift["shapes"], PeersDrifted)
        assert f"shifted [{5 + rank}]" in str(drift["shapes"])


@each_group
def test_a_step_is_one_collective_and_its_bytes_are_flat(conversation: Any, peers: int) -> None:
    buffer_bytes = 4 * (128 * 100 + 128 + CONTROL_FLOATS)
    for rank in range(peers):
        cost = conversation[rank][peers]["cost"]
        assert cost["mean collectives"] == {"gloo:all_reduce": 3}
        assert cost["each collectives"] == {"gloo:all_gather": 3}
        assert cost["lowest collectives"] == {"gloo:all_reduce": 6}
        assert cost["mean"].bytes_per_step == cost["lowest"].bytes_per_step == buffer_bytes
        assert cost["each"].bytes_per_step == buffer_bytes * (peers - 1)
        assert cost["mean"].steps == 3
        assert 0 < cost["mean"].wait_seconds <= 3 * cost["mean"].seconds_per_step


@each_group
def test_what_was_heard_stays(conversation: Any, peers: int) -> None:
    assert all(conversation[rank][peers]["kept"] for rank in range(peers))


@pytest.mark.parametrize("reduce", ["mean", "each", "lowest"])
def test_a_lone_peer_hears_only_its_control(reduce: Reduce) -> None:
    exchange = Exchange(None, torch.device("cpu"))
    control = Control(step=5000, wish_checkpoint=True)
    heard: Heard = exchange.start({"x": torch.ones(3)}, control=control, reduce=reduce).wait()
    assert (heard.peers, heard.own_index, dict(heard.others), dict(heard.each)) == (1, 0, {}, {})
    assert heard.lowest == {}
    assert (heard.control.peers, heard.control.wish_checkpoint, heard.control.wish_stop) == (1, 1, 0)
    assert heard.control.culprit is None
    assert exchange.cost().bytes_per_step == 0
    assert exchange.cost().steps == 1


def test_a_lone_peer_sees_its_own_spoiled_step() -> None:
    exchange = Exchange(None, "cpu")
    heard = exchange.start({"x": torch.tensor([1.0, float("inf")])}, control=Control(step=0)).wait()
    assert heard.control.nonfinite == 1
    assert heard.control.culprit == 0


def test_what_is_said_is_left_alone() -> None:
    said = {"x": torch.tensor([float("nan"), 2.0], requires_grad=True)}
    Exchange(None, "cpu").start(said, control=Control(step=0)).wait()
    assert said["x"].isnan().tolist() == [True, False]
    assert said["x"].requires_grad


def test_cost_starts_anew() -> None:
    exchange = Exchange(None, "cpu")
    exchange.start({}, control=Control(step=0)).wait()
    exchange.reset_cost()
    cost = exchange.cost()
    assert (cost.steps, cost.bytes_per_step, cost.seconds_per_step, cost.wait_seconds) == (0, 0, 0, 0)


@each_group
def test_bfloat16_halves_the_bytes_and_rounds_what_is_heard(conversation: Any, peers: int) -> None:
    for rank in range(peers):
        got = conversation[rank][peers]["in bfloat16"]
        half, whole = got["bytes"]
        assert half * 2 == whole > 0
        # Sums of up to five probabilities, rounded to 8 bits of a number below 5.
        error = (got["dml"]["gradient"] - got["exact"]["gradient"]).abs().max()
        assert 0 < error < 2**-7 * 3.0 / ROWS * 2
        assert torch.equal(got["each"]["x"], torch.stack([own_tensor(peer) for peer in range(peers)]))
        assert (got["control"].nonfinite, got["control"].culprit) == (1, 1)
        assert isinstance(got["drift"], PeersDrifted)
