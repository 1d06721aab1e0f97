"""Which images ``evaluate`` takes (``--data``: the test part, or all where no part is named so), and what it finds."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metamixer_ray.data import Splits, load_splits
from metamixer_ray.data.corruptions import common_corruptions
from metamixer_ray.evaluate import EvaluateOptions, as_table, evaluate_run, main
from metamixer_ray.folder import RunFolder
from metamixer_ray.networks import StagedNetwork
from metamixer_ray.tracking.figures import evaluation_figures
from tests.data.drawing import class_folders, drawn_set, encoded, picture, write_parquet
from tests.spine.run_folder import make_run


def images_of(data: Path | str, size: int = 8) -> int:
    dataset = EvaluateOptions(run="run", data=str(data)).dataset(size)
    assert dataset is not None
    return len(load_splits(dataset, scored_only=True).test)


def test_a_parquet_file_is_taken_whole(tmp_path: Path) -> None:
    folder = drawn_set(tmp_path / "set", train=30, test=12)
    assert images_of(folder / "train.parquet") == 30
    assert images_of(folder / "test.parquet") == 12


def test_of_several_files_those_of_the_test_part_are_taken(tmp_path: Path) -> None:
    folder = drawn_set(tmp_path / "set", train=30, test=12)
    assert images_of(folder) == images_of(folder / "*.parquet") == 12
    (folder / "train.parquet").unlink()
    assert images_of(folder) == images_of(folder / "*.parquet") == 12
    (folder / "test.parquet").rename(folder / "photos.parquet")
    assert images_of(folder) == 12


def test_trees_with_and_without_parts(tmp_path: Path) -> None:
    class_folders(tmp_path / "plain", 4)
    assert images_of(tmp_path / "plain") == 12
    class_folders(tmp_path / "parts" / "test", 5)
    assert images_of(tmp_path / "parts") == 15
    class_folders(tmp_path / "parts" / "train", 2)
    assert images_of(tmp_path / "parts") == 15


def test_named_sets_and_functions_have_their_own_test_part() -> None:
    assert images_of("digits", 16) == 359
    assert images_of("tests.e2e.own_parts:stripes", 16) > 0


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[StagedNetwork], Splits]:
    return make_run(tmp_path_factory.mktemp("runs") / "two", "resnet8", "tests.spine.networks:tiny")


def top1(network: torch.nn.Module, splits: Splits, images: Tensor) -> float:
    with torch.inference_mode():
        inputs = (images.float() / 255 - torch.tensor(splits.mean).view(3, 1, 1)) / torch.tensor(splits.std).view(
            3, 1, 1
        )
        return float((network(inputs).argmax(1) == splits.test.labels).double().mean())


def test_scores_and_drops_are_those_of_the_networks(two: tuple[RunFolder, list[StagedNetwork], Splits]) -> None:
    folder, networks, splits = two
    found = evaluate_run(folder, EvaluateOptions(run="two", corruptions=True))
    everything = torch.arange(len(splits.test))
    images = splits.test.take(everything)
    spoilt = {c.name: c.apply(images, everything) for c in common_corruptions(8)}
    assert list(found["corruptions"]) == ["blur", "noise", "contrast", "jpeg"]
    for peer, network in enumerate(networks):
        clean = top1(network, splits, images)
        assert found["peers"][peer]["top1"] == pytest.approx(clean, abs=0.003)
        for name, changed in spoilt.items():
            now = found["corruptions"][name]["peers"][peer]
            assert now["top1"] == pytest.approx(top1(network, splits, changed), abs=0.003)
            assert now["relative_drop"] == pytest.approx(1 - now["top1"] / found["peers"][peer]["top1"])
    assert sum(row["images"] for row in found["per_class"]) == found["images"] == len(splits.test)
    assert found["pairwise_agreement"][0][1] == found["agreement"]
    table = as_table(found)
    assert "ensemble" in table
    assert "severity 3 of CIFAR-10-C: blur" in table
    assert f"({-100 * found['corruptions']['blur']['peers'][0]['relative_drop']:+.1f} %)" in table


def test_a_report_has_everything_that_was_found(
    two: tuple[RunFolder, list[StagedNetwork], Splits], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "report" / "corruptions.png"
    stale.parent.mkdir()
    stale.touch()
    words = [str(two[0]), "--report", str(stale.parent), "--json", "--device", "cpu"]
    assert main(words) == 0
    assert stale.exists(), "only what an earlier report left is removed"
    capsys.readouterr()
    assert main(words) == 0
    assert not stale.exists()
    said = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text()) == said
    assert said["split"] == "digits, test split"
    assert {p.name for p in (tmp_path / "report").glob("*.png")} == {
        "agreement.png",
        "calibration.png",
        "per_class.png",
    }


def test_places_and_devices_that_are_none_get_one_error(
    two: tuple[RunFolder, list[StagedNetwork], Splits], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "report" / "evaluation.json").mkdir(parents=True)
    for words, problem in (
        (["--report", str(tmp_path / "file" / "report")], "--report"),
        (["--report", str(tmp_path / "report"), "--device", "cpu"], f"--report {tmp_path}/report can't be written"),
        (["--data-root", str(tmp_path)], "--data-root says how --data is to be read, and there is none"),
        (["--device", "nothing"], "--device nothing can't be used"),
        (["--device", "meta"], "--device meta can't be used"),
    ):
        assert main([str(two[0]), *words]) == 2
        assert problem in capsys.readouterr().err


@pytest.mark.parametrize("run", ["x" * 300, "a\0b", "~nobody-of-this-name/run", "a/b/c"])
def test_a_run_that_no_path_leads_to_gets_one_error(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([run]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ")


def test_images_of_one_class_can_be_scored(two: tuple[RunFolder, list[StagedNetwork], Splits], tmp_path: Path) -> None:
    names = two[2].classes
    photos = write_parquet(
        tmp_path / "photos.parquet", [encoded(picture(i, mode="L")) for i in range(4)], [3] * 4, names=names
    )
    found = evaluate_run(two[0], EvaluateOptions(run="two", data=str(photos), image_column="image"))
    assert (found["split"], found["images"]) == (str(photos), 4)
    assert [row["images"] for row in found["per_class"]] == [4 * (name == names[3]) for name in names]
    figure = evaluation_figures(found)["per_class"]
    low, high = figure.axes[0].get_xlim()
    assert high - low >= 5


def test_a_single_peer_has_neither_ensemble_nor_agreement(tmp_path: Path) -> None:
    folder, _, _ = make_run(tmp_path / "one", "tests.spine.networks:tiny")
    found = evaluate_run(folder, EvaluateOptions(run="one", corruptions=True))
    assert (found["ensemble"], found["agreement"], found["pairwise_agreement"]) == (None, None, [[1.0]])
    assert found["corruptions"]["jpeg"]["ensemble"] is None
    assert "ensemble" not in as_table(found)


def test_the_images_are_told_by_their_own_place(tmp_path: Path) -> None:
    for part in ("learned", "asked"):
        for number in range(64):
            path = tmp_path / part / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(path)
    settings = {"data": str(tmp_path / "learned"), "test_data": str(tmp_path / "asked"), "batch_size": 4}
    folder, _, _ = make_run(tmp_path / "run", "resnet8", "resnet8", **settings)
    assert evaluate_run(folder)["split"] == f"{tmp_path}/asked, test split"
