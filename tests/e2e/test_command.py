"""The command as a person types it: what it prints, and how it refuses."""

import re
from pathlib import Path

import pytest

from metamixer_ray.train import main
from tests.e2e import tiny


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_log_is_calm_and_complete(ray_cluster: str, tmp_path: Path) -> None:
    words = tiny.flags(tmp_path, name="told", epochs=5, peers=["resnet8", "resnet14"])
    done = tiny.command(*words, "--address", ray_cluster, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) <= 25 + 5
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.stdout)
    for epoch in range(1, 6):
        assert sum(bool(re.match(rf"\s*{epoch}/5\s", line)) for line in lines) == 1
    for text in (
        "peer0-resnet8",
        "peer1-resnet14",
        "ensemble",
        "images/s",
        str(tmp_path / "runs" / "told"),
        "metamixer_ray.ui",
    ):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--peers", "resnet8", "resnet41"], "there is no network 'resnet41'. Did you mean resnet44"),
        (["--batch-size", "30"], "--batch-size 30"),
        (["--data", "nowhere/train.parquet"], "nowhere/train.parquet"),
        (["--mix-stages", "7"], "--mix-stages"),
        (["--peers", "resnet8"], "--distiller dml needs at least two --peers"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file"),
    ],
)
def test_bad_input_gets_one_clear_error(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--storage", str(tmp_path / "runs"), *words]) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    # Refused before anything was written.
    assert not (tmp_path / "runs").exists()
