from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from metamixer_ray.data import Splits
from metamixer_ray.data.sources.locations import split_of
from metamixer_ray.errors import ConfigError, DataError
from tests.data.drawing import CLASSES, drawn_set, encoded, hugging_face, picture, pixels, write_parquet

Load = Callable[..., Splits]


def check_drawn(splits: Splits, train: int = 30, test: int = 12) -> None:
    assert splits.train.labels.tolist() == [i % 3 for i in range(train)]
    assert splits.test.labels.tolist() == [i % 3 for i in range(test)]
    assert np.array_equal(splits.train.images.numpy(), np.stack([pixels(i) for i in range(train)]))
    assert np.array_equal(splits.test.images.numpy(), np.stack([pixels(1000 + i) for i in range(test)]))


def test_a_folder_with_train_and_test(tmp_path: Path, load: Load) -> None:
    splits = load(drawn_set(tmp_path / "set"))
    check_drawn(splits)
    assert splits.classes == CLASSES
    assert splits.validation is None
    assert splits.skipped == 0
    assert splits.train.images.dtype == torch.uint8
    assert splits.description == "set: 30 training, 12 test images of 8 x 8 pixels, 3 classes"


def test_shards_as_the_hub_names_them(tmp_path: Path, load: Load) -> None:
    for name, numbers in (
        ("train-00000-of-00002", range(20)),
        ("train-00001-of-00002", range(20, 30)),
        ("test-00000-of-00001", range(1000, 1012)),
        ("validation-00000-of-00001", range(2000, 2003)),
    ):
        images = [encoded(picture(i)) for i in numbers]
        write_parquet(tmp_path / "set/data" / f"{name}.parquet", images, [i % 1000 % 3 for i in numbers])
    check_drawn(load(tmp_path / "set"))


@pytest.mark.parametrize(
    ("inner", "split"),
    [
        ("train.parquet", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("plain_text/test-00000-of-00001.parquet", "test"),
        ("default/train/0000.parquet", "train"),
        ("validation-00000.parquet", "validation"),
        ("cifar-val.parquet", "validation"),
        ("cifar10_test.parquet", "test"),
        ("train/extra/test.parquet", "test"),
        ("contest.parquet", None),
        ("latest.parquet", None),
        ("images.parquet", None),
    ],
)
def test_parts_are_told_by_name(inner: str, split: str | None) -> None:
    assert split_of(inner) == split


def test_validation_files_serve_as_test_where_there_is_none(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set")
    (tmp_path / "set/test.parquet").rename(tmp_path / "set/validation.parquet")
    check_drawn(load(tmp_path / "set"))


def test_files_globs_uris_and_test_data(tmp_path: Path, load: Load) -> None:
    folder = drawn_set(tmp_path / "set")
    check_drawn(load(folder / "train.parquet", test_data=str(folder / "test.parquet")))
    check_drawn(load(folder / "*.parquet"))
    check_drawn(load(f"file://{folder}"))
    check_drawn(load(f"file://{folder}/t*.parquet"))
    (folder / "test.parquet").rename(tmp_path / "other.pq")
    check_drawn(load(folder, test_data=str(tmp_path / "other.pq")))


def test_relative_paths(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_set(tmp_path / "set")
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "beside")
    check_drawn(load("../set"))
    check_drawn(load("../set/*.parquet"))


def test_a_missing_test_part_names_the_option(tmp_path: Path, load: Load) -> None:
    folder = drawn_set(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"no test images.*--test-data"):
        load(folder / "train.parquet")
    (folder / "test.parquet").unlink()
    with pytest.raises(ConfigError, match=r"no test images.*train\.parquet.*--test-data"):
        load(folder)


def test_training_on_the_test_file_is_refused(tmp_path: Path, load: Load) -> None:
    folder = drawn_set(tmp_path / "set")
    with pytest.raises(ConfigError, match="among the training files"):
        load(folder / "train.parquet", test_data=str(folder / "train.parquet"))


def test_no_training_part(tmp_path: Path, load: Load) -> None:
    folder = drawn_set(tmp_path / "set")
    (folder / "train.parquet").unlink()
    with pytest.raises(ConfigError, match=r"no training images.*train\*"):
        load(folder)


def test_two_label_columns_must_be_chosen_from(tmp_path: Path, load: Load) -> None:
    fine = pa.array([i % 6 for i in range(30)], pa.int64())
    names = hugging_face(label="coarse_label") | {}
    for name in ("train", "test"):
        path = tmp_path / "set" / f"{name}.parquet"
        images = [encoded(picture(i)) for i in range(30)]
        write_parquet(
            path, images, [i % 3 for i in range(30)], label="coarse_label", names=None, more={"fine_label": fine}
        )
    with pytest.raises(ConfigError, match=r"coarse_label, fine_label.*--label-column"):
        load(tmp_path / "set")
    assert len(load(tmp_path / "set", label_column="fine_label").classes) == 6
    assert len(load(tmp_path / "set", label_column="coarse_label").classes) == 3
    for path in (tmp_path / "set").iterdir():
        pq.write_table(pq.read_table(path).replace_schema_metadata(names), path)
    assert load(tmp_path / "set").classes == CLASSES, "the only column marked as ClassLabel is taken"


def test_two_image_columns_must_be_chosen_from(tmp_path: Path, load: Load) -> None:
    other = pa.array([{"bytes": encoded(picture(i + 500)), "path": ""} for i in range(30)])
    images = [encoded(picture(i)) for i in range(30)]
    for name in ("train", "test"):
        write_parquet(tmp_path / f"set/{name}.parquet", images, [i % 3 for i in range(30)], more={"mask": other})
    with pytest.raises(ConfigError, match=r"image, mask.*--image-column"):
        load(tmp_path / "set")
    assert np.array_equal(load(tmp_path / "set", image_column="mask").train.images[0].numpy(), pixels(500))


def test_plain_binary_images_by_name(tmp_path: Path, load: Load) -> None:
    for name in ("train", "test"):
        table = pa.table({"jpg": [encoded(picture(i)) for i in range(6)], "cls": [0, 1, 0, 1, 0, 1]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    splits = load(tmp_path, image_column="jpg")
    assert np.array_equal(splits.train.images[5].numpy(), pixels(5))
    assert splits.classes == ("0", "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "img"}, r"train\.parquet has no column img; its columns are image .*--image-column"),
        ({"label_column": "class"}, r"train\.parquet has no column class; .*label \(int64\).*--label-column"),
        ({"label_column": "image"}, r"column image is struct<bytes, path>, but labels are integers"),
        ({"image_column": "label"}, r"column label is int64, but images are struct<bytes, path> or binary"),
    ],
)
def test_wrong_columns_list_those_there_are(tmp_path: Path, load: Load, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(drawn_set(tmp_path / "set"), **options)


def twice(folder: Path, name: str, kind: str) -> Path:
    """A drawn set whose training file has another column of the same name."""
    drawn_set(folder)
    table = pq.read_table(folder / "train.parquet")
    other = {"same": table.column(name), "text": pa.array(["a"] * len(table))}[kind]
    pq.write_table(table.append_column(name, other), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("streaming", ["no", "yes"])
@pytest.mark.parametrize("kind", ["same", "text"])
@pytest.mark.parametrize("name", ["image", "label"])
@pytest.mark.parametrize("named", [False, True])
def test_two_columns_of_one_name(tmp_path: Path, load: Load, streaming: str, kind: str, name: str, named: bool) -> None:
    options = {f"{name}_column": name} if named else {}
    with pytest.raises(DataError, match=rf"train\.parquet has two columns named {name}, .*write the file again"):
        load(twice(tmp_path / "set", name, kind), streaming=streaming, image_size=8, **options)


def test_two_columns_of_one_name_that_nobody_asks_for(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set")
    table = pq.read_table(tmp_path / "set/train.parquet")
    for _ in range(2):
        table = table.append_column("note", pa.array(["a"] * len(table)))
    pq.write_table(table, tmp_path / "set/train.parquet")
    check_drawn(load(tmp_path / "set"))


@pytest.mark.parametrize("streaming", ["no", "yes"])
def test_two_columns_of_one_name_beside_the_right_one(tmp_path: Path, load: Load, streaming: str) -> None:
    drawn_set(tmp_path / "set")
    for name in ("train", "test"):
        path = tmp_path / "set" / f"{name}.parquet"
        # Without what the Hub notes of them, integers are all alike.
        table = pq.read_table(path).replace_schema_metadata(None)
        for _ in range(2):
            table = table.append_column("id", pa.array(range(len(table))))
        pq.write_table(table, path)
    with pytest.raises(ConfigError, match=r"3 columns that could hold the labels.*like --label-column label"):
        load(tmp_path / "set", streaming=streaming, image_size=8)
    assert load(tmp_path / "set", label_column="label").train.labels[:4].tolist() == [0, 1, 2, 0]


def test_no_image_or_no_label_column(tmp_path: Path, load: Load) -> None:
    for name in ("train", "test"):
        pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"no image column.*text \(string\)"):
        load(tmp_path)


def test_class_names_without_the_hub_metadata(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set", names=None)
    assert load(tmp_path / "set").classes == ("0", "1", "2")
    for path in (tmp_path / "set").iterdir():
        pq.write_table(pq.read_table(path).replace_schema_metadata({"class_names": "x, y,z"}), path)
    assert load(tmp_path / "set").classes == ("x", "y", "z")


def test_parts_with_other_class_names_are_refused(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set")
    images = [encoded(picture(i)) for i in range(3)]
    write_parquet(tmp_path / "set/test.parquet", images, [0, 1, 2], names=("ant", "cow", "bee"))
    with pytest.raises(DataError, match="class 1 is cow instead of bee"):
        load(tmp_path / "set")


def test_shards_of_different_sets_are_refused(tmp_path: Path, load: Load) -> None:
    drawn_set(tmp_path / "set")
    images = [encoded(picture(i)) for i in range(3)]
    write_parquet(tmp_path / "set/train-2.parquet", images, [0, 1, 2], image="img")
    with pytest.raises(DataError, match=r"columns image and label differ from .* img and label"):
        load(tmp_path / "set")


def test_an_unreachable_uri(load: Load, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data file:///no/such/folder: there is no such file"):
        load("file:///no/such/folder")
    with pytest.raises(DataError, match=r"--data nope://bucket/set: cannot be reached .*credentials"):
        load("nope://bucket/set")
    address = "s3://key:secret@bucket/set?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1"
    with pytest.raises(DataError, match=r"cannot be reached .*network"):
        load(address)


def test_an_empty_folder_or_glob(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        load(tmp_path / "missing" / "*.parquet")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="no Parquet file"):
        load(tmp_path / "there" / "*.parquet")
    with pytest.raises(DataError, match="no Parquet file"):
        load(f"file://{tmp_path}/there")
