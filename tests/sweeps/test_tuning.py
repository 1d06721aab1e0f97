"""What is fixed before a sweep begins, and how its schedulers decide."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.tune.schedulers import TrialScheduler

from metamixer_ray.config import RunConfig, TrainConfig, from_settings, to_yaml, with_settings
from metamixer_ray.errors import ConfigError, DataError
from metamixer_ray.sweeps.config import SchedulerName, SweepConfig
from metamixer_ray.sweeps.ledger import Trial
from metamixer_ray.sweeps.opening import IMAGES, SWEEP, Sweep, create_sweep, facts_of, for_trials, open_sweep
from metamixer_ray.sweeps.schedulers import build_scheduler
from metamixer_ray.tune import best_config, fixed_points, for_testing, read_point
from tests.sweeps.test_spaces import conditional


def test_trials_see_a_validation_split_and_nothing_else() -> None:
    training = for_trials(SweepConfig()).training
    assert training.dataset.validation_fraction == 0.1
    assert not training.test
    training.check()


def test_a_point_of_ones_own_changes_only_what_trials_may_differ_in(tmp_path: Path) -> None:
    whole, part = tmp_path / "config.yaml", tmp_path / "part.yaml"
    whole.write_text(to_yaml(TrainConfig(epochs=3, seed=7)))
    point = read_point(str(whole))
    assert point["batch_size"] == 128
    assert not {"epochs", "seed", "test", "validation_fraction", "experiment", "data"} & point.keys()
    part.write_text(yaml.safe_dump({"mixing": {"local_alpha": 0.3}}))
    assert read_point(str(part)) == {"local_alpha": 0.3}
    part.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"--first .*part.yaml must hold settings"):
        read_point(str(part))


def test_the_defaults_come_first_and_what_cannot_work_is_left_out() -> None:
    config = SweepConfig(search="grid", training=TrainConfig(peers=("resnet8",) * 2))
    points, samples = fixed_points(config, conditional())
    assert points[0] == ({}, "defaults")
    assert samples == len(points) == 19
    config = SweepConfig(search="random", samples=8)
    points, samples = fixed_points(config, conditional())
    assert (samples, [origin for _, origin in points]) == (8, ["defaults"] + ["random"] * 7)
    assert fixed_points(config, conditional())[0] == points  # drawn from the seed


def test_the_best_settings_can_be_trained_and_tested_whatever_the_trials_did() -> None:
    asked = TrainConfig(test=False, run=RunConfig(name="sweep", resume=True))
    best = best_config(asked, Trial(number=3, settings={"local_alpha": 0.3, "lr": 0.2}, origin="tpe"))
    best.check()
    assert (best.test, best.run.name, best.run.resume) == (True, None, False)
    assert (best.mixing.local_alpha, best.optimisation.lr) == (0.3, (0.2,))


def test_a_sweep_from_before_an_option_is_resumed(tmp_path: Path) -> None:
    config = SweepConfig(training=from_settings({"name": "old", "storage": str(tmp_path)}))
    facts = facts_of(config, "images")
    sweep = open_sweep(SWEEP, config.training, facts, "anything")
    create_sweep(sweep, {name: value for name, value in facts.items() if name not in ("stale_steps", IMAGES)})

    def resumed(images: str = "images", **settings: object) -> Sweep:
        again = with_settings(config.training, {"resume": True, **settings})
        return open_sweep(SWEEP, again, facts_of(SweepConfig(training=again), images), "anything")

    assert resumed().key == sweep.key
    with pytest.raises(ConfigError, match=r"--stale-steps is 7 but sweep 'old' has 50"):
        resumed(stale_steps=7)
    assert resumed("others").key == sweep.key
    create_sweep(sweep, facts)
    assert resumed().key == sweep.key
    with pytest.raises(DataError, match=r"--data: the images have changed since sweep 'old' was started"):
        resumed("others")


@pytest.mark.parametrize("asked", [0.0, 0.2])
def test_what_needs_a_validation_split_keeps_one_in_the_end(asked: float) -> None:
    training = from_settings({"validation_fraction": asked})
    general: dict[str, object] = {"distiller": "kdcl-general"}
    best = best_config(training, Trial(number=1, settings=general, origin="tpe"))
    best.check()
    assert best.dataset.validation_fraction == (asked or 0.1)
    # What it is compared with learns from the same images.
    both = for_testing(training, [{}, general])
    assert [config.dataset.validation_fraction for config in both] == [asked or 0.1] * 2
    whole = for_testing(training, [{}, {"distiller": "none"}])
    assert [config.dataset.validation_fraction for config in whole] == [0.0] * 2
    assert all(config.test for config in both + whole)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"samples": 0}, "--samples must be at least 1"),
        ({"grace_epochs": 99}, "--grace-epochs must lie between 1 and the 20 --epochs"),
        ({"reduction_factor": 1.0}, "--reduction-factor must be above 1"),
        ({"max_concurrent": 0}, "--max-concurrent must be at least 1"),
        ({"space": ()}, "--space needs at least one module"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SweepConfig(**options).check()  # type: ignore[arg-type]


class Running:
    """As much of one of Ray Tune's trials as a scheduler looks at; it is kept in sets."""

    def __init__(self, number: int) -> None:
        self.config, self.trial_id, self.status = {"number": number}, f"id{number}", "RUNNING"

    def is_finished(self) -> bool:
        return False

    def set_status(self, status: str) -> None:
        self.status = status


def curve(number: int, epochs: int) -> dict[int, float]:
    return {epoch: 0.1 * number + 0.01 * epoch for epoch in range(1, epochs + 1)}


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_what_an_earlier_attempt_saw_decides(scheduler: SchedulerName) -> None:
    config = SweepConfig(training=TrainConfig(epochs=9), grace_epochs=1, scheduler=scheduler)
    seen = {f"{n:04d}": curve(n, 3) for n in range(9)}
    controller = SimpleNamespace(get_live_trials=set)
    for curves, decision in (({}, TrialScheduler.CONTINUE), (seen, TrialScheduler.STOP)):
        built, weak = build_scheduler(config, curves), Running(9)
        built.on_trial_add(controller, weak)
        assert built.on_trial_result(controller, weak, {"epoch": 1, "score": 0.05}) == decision


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_trial_that_goes_on_is_compared_as_if_it_had_never_been_away(scheduler: SchedulerName) -> None:
    """The decisions on all that comes are those of a sweep that was never interrupted."""
    config = SweepConfig(training=TrainConfig(epochs=27), grace_epochs=1, scheduler=scheduler)
    controller = SimpleNamespace(get_live_trials=set)

    def decisions(killed: bool) -> list[tuple[int, int, str]]:
        trials = [Running(n) for n in range(8)]
        built = build_scheduler(config, {})
        for trial in trials:
            built.on_trial_add(controller, trial)
        for epoch in range(1, 13):
            for trial in trials:
                score = curve(trial.config["number"], epoch)[epoch]
                built.on_trial_result(controller, trial, {"epoch": epoch, "score": score})
        if killed:
            built = build_scheduler(config, {f"{n:04d}": curve(n, 12) for n in range(8)})
            trials = [Running(n) for n in range(8)]
            for trial in trials:
                trial.trial_id = f"another{trial.trial_id}"
                built.on_trial_add(controller, trial)
        made = []
        for trial in [*trials, *(Running(n) for n in range(8, 20))]:
            if trial not in trials:
                built.on_trial_add(controller, trial)
            for epoch in range(13 if trial in trials else 1, 28):
                score = curve(trial.config["number"] % 10, epoch)[epoch]
                made.append(
                    (
                        trial.config["number"],
                        epoch,
                        str(built.on_trial_result(controller, trial, {"epoch": epoch, "score": score})),
                    )
                )
                if made[-1][2] == TrialScheduler.STOP:
                    break
        return made

    whole = decisions(killed=False)
    assert decisions(killed=True) == whole
    assert {decision for _, _, decision in whole} == {TrialScheduler.CONTINUE, TrialScheduler.STOP}


def test_median_never_pauses() -> None:
    config = SweepConfig(scheduler="median", training=TrainConfig(epochs=9))
    median = build_scheduler(config, {})

    trials = [Running(n) for n in range(3)]
    for trial in trials:
        trial.status = "PENDING"
    controller = SimpleNamespace(get_trials=lambda: trials, get_live_trials=lambda: set(trials))
    result = {"epoch": 2, "score": 0.5, "time_total_s": 9.0}
    assert median.on_trial_result(controller, trials[0], result) == TrialScheduler.CONTINUE
