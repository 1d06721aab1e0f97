"""What is fixed before a sweep begins, and how its schedulers decide."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.tune.schedulers import TrialScheduler

from metamixer_ray.config import TrainConfig, to_yaml
from metamixer_ray.errors import ConfigError
from metamixer_ray.sweeps.config import SweepConfig
from metamixer_ray.sweeps.engine import build_scheduler
from metamixer_ray.sweeps.opening import for_trials
from metamixer_ray.tune import fixed_points, read_point
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


def test_asha_knows_what_an_earlier_attempt_saw() -> None:
    config = SweepConfig(training=TrainConfig(epochs=9), grace_epochs=1, reduction_factor=3)
    seen = {f"{n:04d}": {epoch: 0.1 * n + 0.01 * epoch for epoch in range(1, 4)} for n in range(9)}
    for curves, decision in (({}, TrialScheduler.CONTINUE), (seen, TrialScheduler.STOP)):
        asha = build_scheduler(config, curves)
        weak = SimpleNamespace(trial_id="weak")
        asha._trial_info["weak"] = asha._brackets[0]
        assert asha.on_trial_result(None, weak, {"epoch": 1, "score": 0.05}) == decision


def test_median_never_pauses() -> None:
    config = SweepConfig(scheduler="median", training=TrainConfig(epochs=9))
    median = build_scheduler(config, {})

    class Waiting:
        """As much of a trial as the rule looks at; the rule keeps it in sets."""

        status, trial_id = "PENDING", "waiting"

        def is_finished(self) -> bool:
            return False

        def set_status(self, status: str) -> None:
            self.status = status

    trials = [Waiting() for _ in range(3)]
    controller = SimpleNamespace(get_trials=lambda: trials, get_live_trials=lambda: set(trials))
    result = {"epoch": 2, "score": 0.5, "time_total_s": 9.0}
    assert median.on_trial_result(controller, trials[0], result) == TrialScheduler.CONTINUE
