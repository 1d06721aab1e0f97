"""Methods by name, what is made of their trainings, and how it is told."""

import csv
import io
import json
import math
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from metamixer_ray.compare import compare
from metamixer_ray.comparison.config import CompareConfig
from metamixer_ray.comparison.methods import read_method, read_methods
from metamixer_ray.comparison.outcomes import Outcome, Standing, compare_outcomes, paired_gain, read_outcome
from metamixer_ray.comparison.table import as_csv, as_markdown, facts, metrics, trainings_csv
from metamixer_ray.config import TrainConfig, with_settings
from metamixer_ray.errors import ConfigError
from metamixer_ray.tracking.figures import comparison_sheet, figure_png
from metamixer_ray.tracking.figures.comparison_sheet import MethodBar
from metamixer_ray.tracking.naming import metric_values
from metamixer_ray.train import alone
from tests.e2e import tiny

TRAINING = TrainConfig(peers=("resnet8", "resnet8"))


def outcome(seed: int, *top1: float, nll: float = 1.0, step_seconds: float = 0.1, sent: float = 100.0) -> Outcome:
    nlls, eces = tuple(nll + peer for peer in range(len(top1))), (0.1,) * len(top1)
    return Outcome(
        seed=seed,
        top1=top1,
        ensemble=max(top1),
        nlls=nlls,
        eces=eces,
        step_seconds=step_seconds,
        bytes_per_step=sent,
    )


def test_a_method_sets_its_parts_and_nothing_of_the_others() -> None:
    method = read_method("cutmix+kd-weight=0.5+dml")
    assert method.name == "dml+cutmix+kd_weight=0.5"
    assert method.settings == {"distiller": "dml", "mixer": "cutmix", "kd_weight": 0.5}
    mixed = read_method("lr=1e-3+metamixer")
    assert mixed.name == "metamixer+lr=1e-3"
    assert with_settings(TRAINING, mixed.settings).optimisation.lr == (0.001,)
    assert read_method(mixed.name) == mixed
    staged = read_method("metamixer+mix_stages=[0, 1]+lr=[0.1,0.2]+kd_warmup_epochs=null")
    assert staged.name == "metamixer+kd_warmup_epochs=null+lr=[0.1,0.2]+mix_stages=[0,1]"
    assert read_method(staged.name) == staged
    assert with_settings(TRAINING, staged.settings).mixing.mix_stages == (0, 1)


def test_independent_is_what_a_baseline_trains() -> None:
    training = with_settings(TRAINING, {"distiller": "ensemble", "divergence": "dkd", "statistics_weight": 1.0})
    (reference,) = [m for m in read_methods(["ensemble"], training) if m.name == "independent"]
    config, baseline = with_settings(training, reference.settings), alone(training)
    assert config.mixing.mixer == baseline.mixing.mixer
    assert config.distillation == baseline.distillation


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dlm"], r"'dlm' in 'dlm' is neither a distiller .* did you mean 'dml'\?"),
        (["dml+kdcl-naive"], r"dml\+kdcl-naive has two distillers, dml and kdcl-naive"),
        (["dml+cutmix", "cutmix+dml"], r"dml\+cutmix is named twice"),
        (["dml+batch_size=8"], r"may not set batch_size: it is the same for all methods"),
        (["dml+kd_wieght=1"], r"unknown setting 'kd_wieght' .* did you mean 'kd_weight'\?"),
        (["dml+kd_weight=["], r"'\[' in 'dml\+kd_weight=\[' is not a value"),
        (["dml+mixer=cutmix"], r"dml\+mixer=cutmix: name the mixer without mixer=, as in dml\+metamixer"),
        ([], r"--methods: name at least one"),
        (["dml+kd_weight=-1"], r"dml\+kd_weight=-1: configuration: --kd-weight must be .* at least 0, not -1.0$"),
        (["okddip"], r"--methods: okddip: --distiller okddip needs at least three --peers"),
    ],
)
def test_a_method_that_cannot_be_is_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompareConfig(methods=tuple(words), training=TRAINING).check()


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="--seeds must be at least 1"):
        CompareConfig(seeds=0).check()
    with pytest.raises(ConfigError, match="--baseline is for single trainings"):
        CompareConfig(training=with_settings(TRAINING, {"baseline": True})).check()


def test_an_outcome_is_that_of_the_test_set_after_the_last_epoch() -> None:
    def row(epoch: int, speed: float) -> dict[str, object]:
        peers = [{"name": "a", "top1": 0.9, "nll": 9.0, "ece": 0.9}, {"name": "b", "top1": 0.9, "nll": 9.0, "ece": 0.9}]
        return {
            "epoch": epoch,
            "images_per_second": speed,
            "split": "validation",
            "peers": peers,
            "ensemble": {"top1": 0.95},
            "exchange": {"bytes_per_step": 100.0 * epoch},
        }

    tested = [{"name": "a", "top1": 0.5, "nll": 1.0, "ece": 0.1}, {"name": "b", "top1": 0.7, "nll": 2.0, "ece": 0.3}]
    last = {**row(3, 1.0), "test": {"peers": tested, "ensemble": {"top1": 0.8}, "agreement": 0.6}}
    found = read_outcome([row(1, 1000.0), row(2, 320.0), last], seed=4, batch_size=64)
    assert (found.seed, found.top1, found.ensemble) == (4, (0.5, 0.7), 0.8)
    assert (found.nll, found.ece) == (1.5, pytest.approx(0.2))
    assert (found.step_seconds, found.bytes_per_step) == (64 / 320, 200.0)
    tested[0] |= {"nll": None, "ece": None}  # type: ignore[dict-item]  # as a row has what isn't finite
    broken = read_outcome([last], 0, 64)
    assert (broken.nll, broken.ece) == (math.inf, math.inf)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6, unique=True))
def test_a_gain_is_students_paired_interval(pairs: list[tuple[float, float]]) -> None:
    over = [outcome(seed, before) for seed, (before, _) in enumerate(pairs)]
    of = [outcome(seed, after) for seed, (_, after) in enumerate(pairs)]
    gain = paired_gain([*of, outcome(99, 0.5)], over)  # a seed that only one has counts for neither
    assert gain is not None
    assert gain.half_width is not None
    assert gain.seeds == len(pairs)
    differences = np.array([after - before for before, after in pairs])
    assert gain.mean == pytest.approx(differences.mean(), abs=1e-12)
    if differences.std() > 1e-9:
        interval = stats.ttest_rel([a for _, a in pairs], [b for b, _ in pairs]).confidence_interval(0.95)
        assert gain.mean - gain.half_width == pytest.approx(interval.low, abs=1e-9)
        assert gain.mean + gain.half_width == pytest.approx(interval.high, abs=1e-9)


def standings() -> list[Standing]:
    methods = read_methods(["dml", "dml+metamixer", "mcl"], TRAINING)
    outcomes = {
        "independent": [outcome(1, 0.60, 0.64, sent=0.0), outcome(0, 0.50, 0.54, sent=0.0)],
        "dml": [outcome(0, 0.52, 0.54), outcome(1, 0.66, 0.68)],
        "dml+metamixer": [outcome(0, 0.54, 0.56, step_seconds=0.12, nll=math.inf)],
    }
    return compare_outcomes(methods, outcomes, {"mcl": ["seed 0: its loss has non-finite values"]})


def test_how_methods_stand() -> None:
    reference, dml, mixed, failed = standings()
    assert [o.seed for o in reference.outcomes] == [0, 1]
    assert reference.gain is None
    means = [fmean((0.52, 0.54)), fmean((0.66, 0.68))]
    found = dml.spread(lambda o: o.mean)
    assert found is not None
    assert (found.mean, found.deviation) == (pytest.approx(fmean(means)), pytest.approx(stdev(means)))
    assert dml.gain is not None
    assert dml.gain.mean == pytest.approx((0.01 + 0.05) / 2)
    assert (dml.step_ratio, dml.bytes_ratio) == (1.0, 1.0)
    assert mixed.gain is not None
    assert (mixed.gain.seeds, mixed.gain.half_width) == (1, None)
    assert (mixed.step_ratio, reference.bytes_ratio) == (pytest.approx(1.2), 0.0)
    assert (failed.outcomes, failed.gain, failed.spread(lambda o: o.mean)) == ((), None, None)


def test_the_table_says_all_of_it() -> None:
    text = as_markdown(standings())
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    header, _, independent, dml, mixed, failed = table
    half = stats.t.ppf(0.975, 1) * stdev([0.01, 0.05]) / math.sqrt(2)
    assert independent[:3] == ["independent", "2", "57.00 ± 7.07"]
    assert dml[header.index("gain")] == f"+3.00 ± {100 * half:.2f}"  # not bold: 0 is inside
    assert dml[header.index("best peer")] == f"61.00 ± {100 * stdev([0.54, 0.68]):.2f}"
    assert dml[header.index("worst peer")] == f"59.00 ± {100 * stdev([0.52, 0.66]):.2f}"
    assert mixed[header.index("gain")] == "+3.00"
    assert mixed[header.index("NLL")] == "inf"
    assert failed[:3] == ["mcl", "0", "-"]
    assert "Failed: mcl, seed 0: its loss has non-finite values" in text
    sure = compare_outcomes(
        read_methods(["dml"], TRAINING),
        {"independent": [outcome(0, 0.5), outcome(1, 0.6)], "dml": [outcome(0, 0.7), outcome(1, 0.801)]},
        {},
    )
    assert "| **+20.05 ± " in as_markdown(sure)


def test_the_numbers_for_programs_are_the_tables() -> None:
    shown = standings()
    lines = list(csv.DictReader(io.StringIO(as_csv(shown))))
    assert [line["method"] for line in lines] == ["independent", "dml", "dml+metamixer", "mcl"]
    assert float(lines[1]["mean"]) == pytest.approx(0.60)
    assert lines[3]["mean"] == lines[2]["mean_sd"] == ""
    each = list(csv.DictReader(io.StringIO(trainings_csv(shown))))
    assert len(each) == (2 + 2 + 1) * 2
    assert [float(line["nll"]) for line in each if line["method"] == "dml"] == [1.0, 2.0, 1.0, 2.0]
    assert float(lines[1]["nll"]) == 1.5
    assert fmean(float(line["top1"]) for line in each if line["method"] == "dml") == pytest.approx(0.60)
    summary = json.loads(json.dumps([facts(standing) for standing in shown], allow_nan=False))
    assert summary[2]["nll"] == {"mean": None, "deviation": None}
    assert summary[1]["gain"]["mean"] == pytest.approx(0.03)
    assert summary[3]["failed"] == ["seed 0: its loss has non-finite values"]
    logged = metrics(shown)
    assert logged["dml/mean"] == pytest.approx(0.60)
    assert "mcl/mean" not in logged
    assert metric_values({**logged, "peers": [], "epoch": 1}).keys() - {"epoch"} <= logged.keys()


def test_the_figure_shows_every_method() -> None:
    bars = [
        MethodBar(
            name="independent", means=[50.0, 52], ensembles=[51.0, 52], mean=(51, 1.4), ensemble=(51.5, 0.7), gain=None
        ),
        MethodBar(name="dml", means=[55.0], ensembles=[56.0], mean=(55, None), ensemble=(56, None), gain=(4, None)),
        MethodBar(name="mcl", means=[], ensembles=[], mean=None, ensemble=None, gain=None),
    ]
    figure = comparison_sheet(bars, title="two peers", confidence=0.95)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["independent", "dml", "mcl"]
    assert "95%" in right.get_xlabel()
    assert Image.open(io.BytesIO(figure_png(figure))).width > 1000


def test_a_method_that_would_never_exchange_on_its_own_part_of_the_images_is_refused_first(tmp_path: Path) -> None:
    # Nine steps of all images have a sixth one; the steps of half of them have not.
    training = tiny.config(tmp_path, epochs=3, stale_steps=6, statistics="none")
    methods = ("codistillation", "codistillation+disjoint_data=true")
    with pytest.raises(ConfigError, match=r"--methods: codistillation\+disjoint_data=True: --stale-steps 6: in the"):
        compare(CompareConfig(methods=methods, seeds=1, training=training))
    assert not (tmp_path / "runs").exists()
