"""The command line: what overrides what, and what a person reads."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import tyro

from metamixer_ray.cli import EXIT_FAILED, EXIT_USAGE, parse, run_command
from metamixer_ray.config import TrainConfig, flag, sections
from metamixer_ray.errors import ConfigError, TrainingFailed


def parsed(*words: str) -> TrainConfig:
    return parse(words, program="python -m metamixer_ray.train", description="Train.")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text("epochs: 7\nmixing:\n  pairing: free\nlr: [0.1, 0.2]\nname: from-file\n")
    return str(path)


def test_no_words_give_the_defaults() -> None:
    assert parsed() == TrainConfig()


def test_flags_are_flat_and_typed() -> None:
    words = "--peers wrn-16-2 resnet20 vgg8 --lr 0.1 0.2 0.3 --mix-stages 0 2 --mix-together --no-nesterov"
    config = parsed(*words.split(), "--gpus-per-worker", "0.5", "--train-limit", "None")
    assert config.peers == ("wrn-16-2", "resnet20", "vgg8")
    assert config.optimisation.lr == (0.1, 0.2, 0.3)
    assert config.mixing.mix_stages == (0, 2)
    assert (config.mixing.mix_together, config.optimisation.nesterov) == (True, False)
    assert config.placement.gpus_per_worker == 0.5
    assert config.dataset.train_limit is None


@pytest.mark.parametrize("order", ["file first", "file last", "joined"])
def test_flags_override_the_file_wherever_they_stand(file: str, order: str) -> None:
    given = {"joined": [f"--config={file}"]}.get(order, ["--config", file])
    flags = ["--epochs", "9"]
    config = parsed(*([*flags, *given] if order == "file last" else [*given, *flags]))
    assert config.epochs == 9
    assert config.mixing.pairing == "free"
    assert config.optimisation.lr == (0.1, 0.2)
    assert config.run.name == "from-file"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for words in (["--config", str(tmp_path / "x.yaml")], ["--config"]):
        with pytest.raises(ConfigError, match="--config"):
            parsed(*words)


def test_an_impossible_combination_is_refused() -> None:
    with pytest.raises(ConfigError, match="--distiller"):
        parsed("--peers", "resnet8")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--batchsize", "3"], "--batch-size"),
        (["--epochs", "many"], "--epochs"),
        (["--mixer", "metamixr"], "metamixer"),
    ],
)
def test_a_wrong_word_exits_with_2_and_tells_what_is_near(
    words: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(*words)
    captured = capsys.readouterr()
    assert caught.value.code == EXIT_USAGE
    assert told in captured.err + captured.out


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("--help")
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert caught.value.code == 0
    assert "--config FILE" in text
    unmentioned = [name for name in sections() if not re.search(rf"{flag(name)}\b", text)]
    assert unmentioned == []


def test_every_field_is_documented() -> None:
    rooms = [TrainConfig, *(type(getattr(TrainConfig(), s)) for s in set(sections().values()) if s)]
    undocumented = [
        f"{room.__name__}.{f.name}"
        for room in rooms
        for f in dataclasses.fields(room)
        if not dataclasses.is_dataclass(getattr(room(), f.name))
        and not (tyro._docstrings.get_field_docstring(room, f.name, ()) or "").strip()
    ]
    assert len(rooms) == 8
    assert undocumented == []


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("mend it"), EXIT_USAGE), (TrainingFailed("mend it"), EXIT_FAILED), (None, 0)]
)
def test_what_a_person_can_mend_is_told_without_a_traceback(
    error: Exception | None, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(words: Sequence[str]) -> None:
        assert words == ["--seed", "1"]
        if error is not None:
            raise error

    assert run_command(body, ["--seed", "1"]) == status
    assert capsys.readouterr().err == ("" if error is None else "error: mend it\n")


def test_what_nobody_expected_keeps_its_traceback() -> None:
    def body(words: Sequence[str]) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_command(body, [])
