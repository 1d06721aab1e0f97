"""Who proposes what: the defaults first, then what was learnt; and after a kill the very same as without one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hyperopt import hp
from ray.tune.search import Searcher

from metamixer_ray.config import TrainConfig, from_settings, plain_settings
from metamixer_ray.errors import ConfigError
from metamixer_ray.folder import RunFolder
from metamixer_ray.sweeps.ledger import Ledger
from metamixer_ray.sweeps.proposing import Limits, Proposer, Tpe

SAMPLES = 14
DEFAULTS = plain_settings(TrainConfig())


def space() -> dict[str, Any]:
    return {
        "pairing": hp.choice("pairing", ["cross-class", "within-class"]),
        "coins": hp.choice(
            "coins",
            [
                {"mix_together": True, "local_probability": hp.uniform("both", 0, 1)},
                {"mix_together": False, "off_epochs": hp.choice("off", [0, 99])},
            ],
        ),
    }


def value(settings: dict[str, Any]) -> float:
    return (settings.get("pairing") == "within-class") - abs(settings.get("local_probability", 1.0) - 0.3)


def limits(samples: int = SAMPLES, most: int = 99, places: int = 2) -> Limits:
    """Room for one trial of two peers, unless said else."""

    def placeable(workers: int) -> None:
        if workers > 4:
            raise ConfigError(f"{workers} workers are more than the cluster can hold")

    def workers(settings: dict[str, Any]) -> int:
        config = from_settings(settings)
        config.check()
        return config.workers

    return Limits(samples=samples, most=most, places=lambda: places, workers=workers, placeable=placeable)


def proposer(folder: Path, allowed: Limits | None = None, **more: Any) -> Proposer:
    tpe = Tpe(space(), seed=0, random_first=6, defaults=DEFAULTS)
    points = [({}, "defaults"), ({"local_alpha": 0.5}, "first")]
    return Proposer(Ledger(RunFolder(str(folder))), points, tpe, allowed or limits(), **more)


def play(search: Proposer, until: int | None = None) -> list[dict[str, Any]]:
    """Run trials one after the other, as Tune would; of the last only the proposal when it is cut short."""
    seen: list[dict[str, Any]] = []
    while (config := search.suggest(f"id{len(seen)}")) != Searcher.FINISHED:
        assert isinstance(config, dict)
        seen.append(config["settings"])
        if until is not None and config["number"] + 1 >= until:
            return seen
        score = value(config["settings"])
        search._ledger.update(config["number"], status="finished", objective=score, score=score, epochs=3)
        search.on_trial_complete(f"id{len(seen) - 1}", {"score": score})
    return seen


def test_a_killed_search_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = play(proposer(tmp_path / "whole"))
    assert len(whole) == SAMPLES
    assert whole[:2] == [{}, {"local_alpha": 0.5}]
    assert play(proposer(tmp_path / "killed"), until=9) == whole[:9]
    # The ninth was running when the driver died: it is proposed again, and everything after it is the same.
    again = proposer(tmp_path / "killed")
    assert play(again) == whole[8:]
    statuses = [trial.status for trial in Ledger(RunFolder(str(tmp_path / "killed"))).trials()]
    assert statuses == ["finished"] * SAMPLES


def test_what_was_seen_decides(tmp_path: Path) -> None:
    later = [value(settings) for settings in play(proposer(tmp_path))[-5:]]
    assert sum(later) / 5 > 0.3  # a random point is worth about 0 on average


def test_settings_that_cannot_work_are_not_proposed(tmp_path: Path) -> None:
    seen = play(proposer(tmp_path))
    assert [settings for settings in seen if settings.get("off_epochs", 0) > 0] == []


@pytest.mark.parametrize("allowed", [limits(places=4), limits(places=99, most=2)], ids=["places", "most"])
def test_no_more_at_once_than_there_is_room_for(tmp_path: Path, allowed: Limits) -> None:
    search = proposer(tmp_path, allowed)
    assert isinstance(search.suggest("a"), dict)
    assert isinstance(search.suggest("b"), dict)
    assert search.suggest("c") is None
    search.on_trial_complete("a", {"score": 0.5})
    assert isinstance(search.suggest("c"), dict)


def test_one_trial_is_begun_though_there_is_no_room_now(tmp_path: Path) -> None:
    """Nodes may come for it; those of a static cluster that are gone for a while come again."""
    search = proposer(tmp_path, limits(places=0))
    assert isinstance(search.suggest("a"), dict)
    assert search.suggest("b") is None


def test_a_larger_trial_waits_for_its_room_and_is_the_next(tmp_path: Path) -> None:
    points = [({}, "grid"), ({"peers": ["resnet8"] * 3}, "grid"), ({"lr": 0.2}, "grid")]
    search = Proposer(Ledger(RunFolder(str(tmp_path))), points, None, limits(samples=3, places=4))
    assert search.suggest("a") == {"number": 0, "settings": {}}
    assert search.suggest("b") is None
    assert search.suggest("b") is None
    search.on_trial_complete("a", {"score": 0.5})
    assert search.suggest("b") == {"number": 1, "settings": {"peers": ["resnet8"] * 3}}


def test_what_can_never_be_placed_is_recorded_with_the_reason(tmp_path: Path) -> None:
    never: list[tuple[int, str]] = []
    points = [({}, "grid"), ({"peers": ["resnet8"] * 5}, "grid"), ({"lr": 0.2}, "grid")]
    ledger = Ledger(RunFolder(str(tmp_path)))
    search = Proposer(ledger, points, None, limits(samples=3), never=lambda number, why: never.append((number, why)))
    assert [search.suggest("a"), search.suggest("b")] == [{"number": 0, "settings": {}}, None]
    search.on_trial_complete("a", {"score": 0.5})
    assert search.suggest("b") == {"number": 2, "settings": {"lr": 0.2}}
    assert never == [(1, "5 workers are more than the cluster can hold")]


def test_a_space_of_which_nothing_can_be_placed_ends(tmp_path: Path) -> None:
    told: list[str] = []
    tpe = Tpe(
        {"peers": hp.choice("peers", [["resnet8"] * 5, ["resnet8"] * 6])}, seed=0, random_first=2, defaults=DEFAULTS
    )
    search = Proposer(
        Ledger(RunFolder(str(tmp_path))), [({}, "defaults")], tpe, limits(samples=9), left_out=told.append
    )
    assert isinstance(search.suggest("a"), dict)
    search.on_trial_complete("a", {"score": 0.5})
    assert search.suggest("b") == Searcher.FINISHED
    *reasons, end = told
    assert sorted(reasons) == [f"{n} workers are more than the cluster can hold" for n in (5, 6)]
    assert end.startswith("50 proposals in a row")


def test_points_are_tried_once_whatever_else_is_asked_for_later(tmp_path: Path) -> None:
    ledger = Ledger(RunFolder(str(tmp_path)))
    for settings in ({}, {"local_alpha": 0.5}, {"local_alpha": 0.7}):
        ledger.add(settings, "grid")
    ledger.update(1, status="finished", objective=0.5, score=0.5)
    ledger.update(2, status="failed", reason="too much")
    points = [
        ({}, "defaults"),
        ({"local_alpha": 2.0}, "first"),
        *(({"local_alpha": a}, "grid") for a in (0.5, 0.7, 0.9)),
    ]
    search = Proposer(ledger, points, None, limits(samples=5))
    assert play(search) == [{}, {"local_alpha": 2.0}, {"local_alpha": 0.9}]


def test_nothing_is_begun_once_it_is_halted(tmp_path: Path) -> None:
    search = Proposer(
        Ledger(RunFolder(str(tmp_path))), [({}, "defaults")], None, limits(samples=1), halted=lambda: True
    )
    assert search.suggest("a") == Searcher.FINISHED


def test_points_with_conditions_can_be_told() -> None:
    tpe = Tpe(space(), seed=1, random_first=2, defaults=DEFAULTS)
    for number in range(12):
        settings, labels = tpe.propose(number)
        assert ("both" in labels) == settings["mix_together"]
        tpe.tell(labels, None if number % 4 == 0 else value(settings))


def test_points_of_others_are_told_where_the_space_holds_them() -> None:
    tpe = Tpe(space(), seed=1, random_first=2, defaults=DEFAULTS)
    assert tpe.locate({}) == {"pairing": 0, "coins": 1, "off": 0}
    within = {"pairing": "within-class", "mix_together": True, "local_probability": 0.3}
    assert tpe.locate(within) == {"pairing": 1, "coins": 0, "both": 0.3}
    for outside in ({"pairing": "free"}, {"lr": 0.5}, {"local_probability": 0.3}, {"off_epochs": 1}):
        assert tpe.locate(outside) == {}


def test_what_others_proposed_is_learnt_from_too(tmp_path: Path) -> None:
    """Of the same draws those differ that come after the random ones, when a point is known to be good."""

    def later(score: float, folder: Path) -> list[dict[str, Any]]:
        search = proposer(folder)
        seen: list[dict[str, Any]] = []
        for number in range(SAMPLES):
            config = search.suggest(str(number))
            assert isinstance(config, dict)
            seen.append(config["settings"])
            search.on_trial_complete(str(number), {"score": value(seen[-1]) if number else score})
        return seen

    bad, good = later(-9.0, tmp_path / "bad"), later(9.0, tmp_path / "good")
    assert bad[:8] == good[:8]  # the two given points, and six at random
    assert bad[8:] != good[8:]


def test_a_record_that_is_none_is_named(tmp_path: Path) -> None:
    ledger = Ledger(RunFolder(str(tmp_path)))
    ledger.add({}, "defaults")
    shutil.copytree(tmp_path / "0000", tmp_path / "0001")
    with pytest.raises(ConfigError, match=r"0001/trial.json is the record of trial 0000.* remove its folder"):
        Ledger(RunFolder(str(tmp_path)))
    (tmp_path / "0000" / "trial.json").write_text('{"number"')
    with pytest.raises(ConfigError, match=r"0000/trial.json is not the record of a trial"):
        Ledger(RunFolder(str(tmp_path)))
