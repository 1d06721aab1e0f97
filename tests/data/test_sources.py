import os
import struct
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metamixer_ray.data import NAMED_SOURCES, Splits
from metamixer_ray.data.sources.torchvision_sets import unpack
from metamixer_ray.errors import ConfigError, DataError, Unreachable, UserError
from tests.data.drawing import CLASSES, class_folders, picture, pixels

Load = Callable[..., Splits]


def test_digits_need_nothing(load: Load) -> None:
    splits = load("digits")
    assert (len(splits.train), len(splits.test)) == (1438, 359)
    assert splits.train.images.shape[1:] == (3, 16, 16)
    assert splits.classes == tuple("0123456789")
    assert np.bincount(splits.test.labels).min() >= 34, "the split is stratified"
    native = load("digits", image_size=8)
    assert native.train.images.shape[1:] == (3, 8, 8)
    assert native.train.images.max() == 255
    assert torch.equal(native.train.images[:, 0], native.train.images[:, 2])
    from sklearn.datasets import load_digits

    parts = torch.cat([native.train.images, native.test.images])[:, 0].flatten(1).tolist()
    assert sorted(parts) == sorted(np.rint(load_digits().data * 255 / 16).astype(int).tolist())


def test_digits_split_is_fixed(load: Load) -> None:
    assert load("digits", split_seed=0).fingerprint != load("digits", split_seed=1).fingerprint
    assert torch.equal(load("digits").test.labels, load("digits", split_seed=5).test.labels)
    assert load("digits").train.labels[:12].tolist() == [1, 3, 5, 7, 8, 9, 0, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("data", "hint"),
    [("cifar-10", "Did you mean cifar10"), ("digit", "Did you mean digits"), ("svnh", "Did you mean svhn")],
)
def test_an_unknown_name_suggests_the_nearest(load: Load, data: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as caught:
        load(data)
    assert all(name in str(caught.value) for name in NAMED_SOURCES)


def test_a_path_that_is_not_there(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"--data /no/such/place: no such data set, file or folder\. Names"):
        load("/no/such/place")


def test_options_that_do_not_belong_together(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--test-data"):
        load("digits", test_data=str(tmp_path))
    with pytest.raises(ConfigError, match="--data-root belongs to the named sets"):
        load(tmp_path, data_root=str(tmp_path))


# --- torchvision
# ---------------------------------------------------------------------------------------------------


def write_fashion_mnist(root: Path) -> None:
    """A tiny set in the files that torchvision reads for Fashion-MNIST."""
    raw = root / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 40), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


def test_a_torchvision_set_from_data_root(load: Load, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "root")
    splits = load("fashion-mnist", data_root=str(tmp_path / "root"))
    expected = np.random.default_rng(40).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    assert splits.train.images.shape == (40, 3, 28, 28)
    assert np.array_equal(splits.train.images[:, 1].numpy(), expected)
    assert splits.test.labels.tolist() == [i % 10 for i in range(20)]
    assert splits.classes[:2] == ("T-shirt/top", "Trouser")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "svhn", "stl10"])
def test_a_data_root_without_the_set(load: Load, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"--data-root .*: {name} is not there; expected"):
        load(name, data_root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "file"),
    [("cifar10", "cifar-10-batches-py/data_batch_1"), ("svhn", "train_32x32.mat"), ("stl10", "stl10_binary/x.bin")],
)
def test_a_data_root_with_a_damaged_set(load: Load, tmp_path: Path, name: str, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"half")
    with pytest.raises(DataError, match=r"incomplete or damaged"):
        load(name, data_root=str(tmp_path))


def damage(name: str, kind: str, raw: Path) -> None:
    """Of Fashion-MNIST, whose files torchvision doesn't check."""
    images, labels = raw / f"{name}-images-idx3-ubyte", raw / f"{name}-labels-idx1-ubyte"
    if kind == "empty":
        images.write_bytes(b"")
    elif kind == "wrong magic number":
        images.write_bytes(b"\xff" + images.read_bytes()[1:])
    elif kind == "half":
        images.write_bytes(images.read_bytes()[:-100])
    elif kind == "flat images":
        images.write_bytes(struct.pack(">III", 2050, 2, 28) + bytes(56))
    elif kind == "fewer labels":
        labels.write_bytes(struct.pack(">II", 2049, 7) + bytes(7))
    elif kind == "more labels":
        labels.write_bytes(struct.pack(">II", 2049, 99) + bytes(99))


DAMAGES = ["empty", "wrong magic number", "half", "flat images", "fewer labels", "more labels"]


@pytest.mark.parametrize("name", ["train", "t10k"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files_that_nothing_checks(load: Load, tmp_path: Path, name: str, kind: str) -> None:
    write_fashion_mnist(tmp_path / "root")
    damage(name, kind, tmp_path / "root/FashionMNIST/raw")
    with pytest.raises(DataError, match=r"^--data-root \S+/root: .* incomplete or damaged .*unpack it again"):
        load("fashion-mnist", data_root=str(tmp_path / "root"))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_download_damaged_since_says_what_to_remove(load: Load, tmp_path: Path, kind: str) -> None:
    write_fashion_mnist(tmp_path / "cache/downloads")
    damage("train", kind, tmp_path / "cache/downloads/FashionMNIST/raw")
    with pytest.raises(DataError, match=r"or read .*; if there is, remove \S+/downloads/FashionMNIST/raw, and it"):
        load("fashion-mnist")


@pytest.mark.parametrize(
    "there", ["a\0b", "x" * 5000, "/" + "/".join(["y" * 200] * 30), "~nobody-of-that-name/x", "loop"]
)
def test_a_data_root_that_is_no_folders_name(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"^--data-root .*: the folder can't be looked into \(.*give one") as caught:
        load("fashion-mnist", data_root=there)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_data_root_that_may_not_be_read(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", denied)  # root may read all
    with pytest.raises(Unreachable, match=r"^--data-root .*\(Permission denied\); give one that can be read"):
        load("fashion-mnist", data_root=str(tmp_path))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "svhn", "stl10"])
def test_a_failed_download_says_so(load: Load, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # urllib keeps its first opener, proxies and all, for the rest of the process.
    monkeypatch.setattr(urllib.request, "_opener", None)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(DataError, match=rf"{name} could not be downloaded .*no network.*--data-root"):
        load(name)


def test_torchvisions_kinds_of_sets_are_told_apart() -> None:
    last = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    images, labels, classes = unpack(SimpleNamespace(data=last, targets=[1, 0], classes=["x", "y"]))
    assert np.array_equal(images, last)
    assert (labels, classes) == ([1, 0], ("x", "y"))
    images, labels, classes = unpack(SimpleNamespace(data=last.transpose(0, 3, 1, 2), labels=np.array([2, 0])))
    assert np.array_equal(images, last)
    assert (labels, classes) == ([2, 0], ("0", "1", "2"))
    with pytest.raises(ValueError, match="2 images and 1 labels"):
        unpack(SimpleNamespace(data=last, targets=[1]))


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["test", "val", "valid", "validation"])
def test_class_folders(load: Load, tmp_path: Path, part: str) -> None:
    class_folders(tmp_path / "set/train", 5)
    class_folders(tmp_path / "set" / part, 2, first=1000)
    (tmp_path / "set/train/ant/notes.txt").write_text("not an image")
    splits = load(tmp_path / "set")
    assert splits.classes == CLASSES
    assert splits.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert np.array_equal(splits.train.images[6].numpy(), pixels(11))
    assert np.array_equal(splits.test.images[2].numpy(), pixels(1010))


def test_nested_class_folders_and_test_data(load: Load, tmp_path: Path) -> None:
    class_folders(tmp_path / "a", 3)
    (tmp_path / "a/bee/images").mkdir()
    (tmp_path / "a/bee/000.png").rename(tmp_path / "a/bee/images/000.png")
    class_folders(tmp_path / "b", 2)
    splits = load(tmp_path / "a", test_data=str(tmp_path / "b"))
    assert (len(splits.train), len(splits.test)) == (9, 6)


def test_a_flat_test_folder_gives_way_to_validation(load: Load, tmp_path: Path) -> None:
    class_folders(tmp_path / "train", 3)
    class_folders(tmp_path / "val", 2)
    (tmp_path / "test").mkdir()
    picture(0).save(tmp_path / "test/0.png")
    assert len(load(tmp_path).test) == 6


def test_folders_that_cannot_be_used(load: Load, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"neither Parquet files nor a train/ folder"):
        load(tmp_path / "empty")
    class_folders(tmp_path / "set/train", 3)
    with pytest.raises(ConfigError, match=r"no test part .*--test-data"):
        load(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"--test-data .*no such folder"):
        load(tmp_path / "set", test_data=str(tmp_path / "nowhere"))
    class_folders(tmp_path / "set/test", 2, names=("ant", "bee"))
    (tmp_path / "set/train/elk").mkdir()
    with pytest.raises(DataError, match=r"train/elk: the class folder holds no images"):
        load(tmp_path / "set")
    (tmp_path / "set/train/elk").rmdir()
    os.mkfifo(tmp_path / "set/train/bee/pipe.png")
    with pytest.raises(DataError, match=r"train/bee/pipe.png: this is no image but a pipe"):
        load(tmp_path / "set")
    (tmp_path / "set/train/bee/pipe.png").unlink()
    (tmp_path / "set/test/dog").mkdir()
    with pytest.raises(DataError, match="class folder dog is not among the 3 training classes"):
        load(tmp_path / "set")


def test_a_broken_image_in_a_folder_is_named(load: Load, tmp_path: Path) -> None:
    class_folders(tmp_path / "train", 3)
    class_folders(tmp_path / "test", 2)
    (tmp_path / "train/bee/001.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"train/bee/001\.png: the image cannot be decoded"):
        load(tmp_path)
    assert load(tmp_path, on_bad_image="skip").skipped == 1


# --- functions -----------------------------------------------------------------------------------------------------

MODULE = """
import numpy as np
from PIL import Image

def arrays():
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, {channels}), dtype=np.uint8)
    return images[:12], np.arange(12) % 3, images[12:], [i % 3 for i in range(8)]

def pictures():
    train, train_labels, test, test_labels = arrays()
    as_images = lambda part: [Image.fromarray(image.squeeze()) for image in part]
    return as_images(train), train_labels, as_images(test), test_labels

def three():
    return 1, 2, 3

def floats():
    train, train_labels, test, test_labels = arrays()
    return train / 255, train_labels, test, test_labels

def short():
    train, train_labels, test, test_labels = arrays()
    return train, train_labels[:-1], test, test_labels

def failing():
    raise KeyError("gone")

def negative():
    train, train_labels, test, test_labels = arrays()
    return train, train_labels - 1, test, test_labels

constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    monkeypatch.chdir(tmp_path)

    def write(channels: int) -> None:
        sys.modules.pop("my_own_data", None)
        sys.path_importer_cache.pop(str(tmp_path), None)
        (tmp_path / "my_own_data.py").write_text(MODULE.format(channels=channels))

    write(3)
    yield write
    sys.modules.pop("my_own_data", None)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("function", ["arrays", "pictures"])
def test_a_users_function(load: Load, module: Callable[[int], None], channels: int, function: str) -> None:
    module(channels)
    path = list(sys.path)
    splits = load(f"my_own_data:{function}")
    expected = np.random.default_rng(0).integers(0, 256, (20, 8, 8, channels), dtype=np.uint8)
    expected = np.broadcast_to(expected, (20, 8, 8, 3)).transpose(0, 3, 1, 2)
    assert np.array_equal(splits.train.images.numpy(), expected[:12])
    assert np.array_equal(splits.test.images.numpy(), expected[12:])
    assert splits.train.labels.tolist() == [0, 1, 2] * 4
    assert sys.path == path


@pytest.mark.parametrize(
    ("reference", "kind", "message"),
    [
        ("my_own_data:nothing", ConfigError, "has no function nothing"),
        ("my_own_data:constant", ConfigError, "has no function constant"),
        ("not_there:load", ConfigError, "there is no module not_there in"),
        ("my_own_data:three", DataError, "returned 3 values; it must return"),
        ("my_own_data:floats", DataError, r"the train images are float64 \[12, 8, 8, 3\]"),
        ("my_own_data:short", DataError, r"12 train images but labels of shape \[11\]"),
        ("my_own_data:failing", DataError, "failed with KeyError: 'gone'"),
        ("my_own_data:negative", DataError, r"my_own_data:negative \(train\), image 0: the label is -1"),
    ],
)
@pytest.mark.usefixtures("module")
def test_functions_that_cannot_be_used(load: Load, reference: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        load(reference)


@pytest.mark.usefixtures("module")
def test_a_module_that_cannot_be_imported(load: Load, tmp_path: Path) -> None:
    (tmp_path / "broken_data.py").write_text("import does_not_exist_anywhere")
    with pytest.raises(DataError, match=r"needs a module that is missing.*does_not_exist_anywhere"):
        load("broken_data:load")
