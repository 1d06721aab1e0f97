"""Whatever is read: a right reading or one clear error. $FAULTS_EXAMPLES multiplies the few seconds that each takes."""

import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import fs

from metamixer_ray.config import TrainConfig, from_settings, plain_settings, sections, to_yaml
from metamixer_ray.data import Batch, BatchOrder, DataConfig, load_splits, train_batches
from metamixer_ray.errors import UserError
from metamixer_ray.folder import RunFolder
from metamixer_ray.recipes import read_recipe, recipe_names
from metamixer_ray.runs import read_facts
from metamixer_ray.settings_text import parse_settings
from metamixer_ray.tracking import Journal
from tests.data.drawing import drawn_set, pixels

TIMES = int(os.environ.get("FAULTS_EXAMPLES", "1"))


def examples(number: int) -> Any:
    """So many examples, times $FAULTS_EXAMPLES; found failures come again in every run."""
    fixture = HealthCheck.function_scoped_fixture
    return settings(max_examples=number * TIMES, deadline=None, suppress_health_check=[fixture, HealthCheck.too_slow])


def reading(read: Callable[[], Any]) -> tuple[Any, str]:
    """What was read and an empty text; or None and the message of its UserError."""
    try:
        return read(), ""
    except UserError as error:
        return None, str(error)


def checked(values: Any) -> None:
    """A configuration that can be written and read again, or a UserError."""

    def read() -> TrainConfig:
        config = from_settings(values)
        config.check()
        return config

    config, problem = reading(read)
    if problem:
        assert 10 < len(problem) < 5000
    else:
        assert from_settings(parse_settings(to_yaml(config), source="again")) == config


odd = st.sampled_from([10**400, float("nan"), float("inf"), 1e308, "../../x", "a:b", "\ud800", "", -1, 0, 1, 2, 0.5])
scalars = st.one_of(odd, st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates())
nested = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
ROOMS = sorted({section for section in sections().values() if section})
names = st.sampled_from([*sections(), *ROOMS]) | st.text(max_size=8) | st.integers() | st.none()


@examples(200)
@given(st.dictionaries(names, nested, max_size=4))
def test_any_mapping_as_configuration(values: dict[Any, Any]) -> None:
    checked(values)


def of_its_type(value: Any) -> st.SearchStrategy[Any]:
    match value:
        case bool():
            return st.booleans()
        case int():
            return st.integers() | odd
        case float():
            return st.floats() | odd
        case list():
            return st.lists(st.sampled_from(value or ["resnet8"]) | scalars, max_size=3)
        case str():
            return st.just(value) | st.text(max_size=8)
    return scalars


TYPED = {name: of_its_type(value) for name, value in plain_settings(TrainConfig()).items()}


@examples(100)
@given(
    st.sets(st.sampled_from(sorted(TYPED)), min_size=1, max_size=3).flatmap(
        lambda chosen: st.fixed_dictionaries({name: TYPED[name] for name in sorted(chosen)})
    )
)
def test_settings_of_the_right_type_and_any_value(values: dict[str, Any]) -> None:
    checked(values)


WORDS = (
    *("a: ", "&a ", "*a", "[", "]", "{", "}", "!!int ", "!!float ", "!!timestamp ", "!!binary ", "!!bool ", "!!set "),
    *("!!omap ", "<<: ", "2001-13-45", "0b2", "0x", "1:60:99", "'", '"\\uD800"', "\n", "  ", "- ", "? ", ": ", "lr"),
    *("epochs", "%YAML 9.9\n", "---", "...", "!x ", "!!python/object:os.system ", "\x00", "\u0085", "~"),
)


@examples(400)
@given(st.text(max_size=40) | st.binary(max_size=40) | st.lists(st.sampled_from(WORDS), max_size=14).map("".join))
def test_any_text_as_yaml(text: str | bytes) -> None:
    values, problem = reading(lambda: parse_settings(text, source="--config x"))
    if problem:
        assert problem.startswith("--config x")
    else:
        checked(values)


@examples(200)
@given(
    st.text(max_size=30) | st.sampled_from(recipe_names()).flatmap(lambda name: st.sampled_from([name, f"../{name}"]))
)
def test_any_word_as_a_recipe(name: str) -> None:
    _, problem = reading(lambda: read_recipe(name).check())
    assert ("--recipe list" in problem) == (name not in recipe_names())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FACTS = {
    "created": "now",
    "key": "k",
    "classes": ["a", "b"],
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "image_size": 8,
    "data_fingerprint": "f",
}


def torn(text: bytes) -> st.SearchStrategy[bytes]:
    """Cut, or with a few other bytes in it."""
    changed = st.lists(st.tuples(st.integers(0, len(text) - 1), st.integers(0, 255)), min_size=1, max_size=3)

    def apply(changes: list[tuple[int, int]]) -> bytes:
        content = bytearray(text)
        for place, byte in changes:
            content[place] = byte
        return bytes(content)

    return changed.map(apply) | st.integers(0, len(text)).map(lambda end: text[:end])


hostile_facts = st.dictionaries(st.sampled_from(sorted(FACTS)), json_values, max_size=2).map(
    lambda changes: json.dumps(FACTS | changes).encode()
)


@examples(300)
@given(
    st.binary(max_size=30)
    | json_values.map(json.dumps).map(str.encode)
    | hostile_facts
    | torn(json.dumps(FACTS).encode())
)
def test_any_bytes_as_run_json(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = RunFolder(str(tmp_path_factory.getbasetemp() / "run-facts"))
    folder.create()
    folder.write("run.json", content)
    facts, problem = reading(lambda: read_facts(folder))
    if problem:
        assert "run.json is torn or changed" in problem
        return
    assert facts is not None
    assert 4 <= facts.image_size <= 4096
    assert len(facts.mean) == len(facts.std) == 3
    assert np.isfinite([*facts.mean, *facts.std]).all()
    assert min(facts.std) > 0
    assert facts.classes


LINES = b"".join(json.dumps({"epoch": epoch, "x": 0.5, "ü": [1, None]}).encode() + b"\n" for epoch in (1, 2, 3))
rows = st.lists(
    json_values.map(lambda value: json.dumps({"epoch": 1, "x": value})) | json_values.map(json.dumps), max_size=3
)


@examples(300)
@given(st.binary(max_size=40) | torn(LINES) | rows.map("\n".join).map(str.encode))
def test_any_bytes_as_journal(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    path.write_bytes(content)
    journal, problem = reading(lambda: Journal(fs.LocalFileSystem(), str(path)))
    if problem:
        assert "metrics.jsonl, line " in problem
        assert path.read_bytes() == content, "what can't be read is left as it is"
        return
    recorded = journal.rows()
    assert len({row["epoch"] for row in recorded}) == len(recorded)
    journal.append({"epoch": 10**6})
    assert Journal(fs.LocalFileSystem(), str(path)).rows()[:-1] == recorded


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """A Parquet file with some bytes changed, most often in its footer, or cut, or with some bytes missing."""
    data = bytearray(whole)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    kind = rng.choice(["pages", "footer", "footer", "missing", "zeros", "cut"])
    at = rng.randrange(len(data))
    if kind == "missing":
        del data[at : at + rng.randint(1, 50)]
    elif kind == "zeros":
        data[at : at + 20] = bytes(len(data[at : at + 20]))
    elif kind == "cut":
        del data[at:]
    else:
        low, high = (0, footer) if kind == "pages" else (footer, len(whole))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(low, high)] = rng.randrange(256)
    return bytes(data)


def epoch(config: DataConfig) -> list[Batch]:
    """The batches of one."""
    images = load_splits(config).train
    order = BatchOrder(images.labels, batch_size=4, replicas=1, quadruples=False, seed=1, layout=images.layout)
    return list(train_batches(images, order, config, seed=1, epoch=0, replica=0))


@pytest.mark.parametrize("streaming", ["no", "yes"])
def test_any_change_of_a_parquet_file(tmp_path: Path, streaming: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    folder = drawn_set(tmp_path / "set", test=3)
    path = folder / "train.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=7, write_page_checksum=True)
    whole = path.read_bytes()
    shown = {pixels(i).tobytes(): i for i in range(30)}
    read = failed = 0
    for seed in range(100 * TIMES):
        path.write_bytes(mutated(whole, random.Random(seed)))
        config = DataConfig(
            data=str(folder),
            streaming=streaming,  # type: ignore[arg-type]
            image_size=8,
            augment="none",
            cache_dir=str(tmp_path / f"cache-{seed}"),
        )
        batches, problem = reading(lambda config=config: epoch(config))  # type: ignore[misc]
        if problem:
            assert str(tmp_path) in problem, seed
            failed += 1
            continue
        read += 1
        numbers = [shown[image.numpy().tobytes()] for batch in batches for image in batch.images]
        labels = torch.cat([batch.labels for batch in batches])
        assert sorted(numbers) == list(range(30)), seed
        assert labels.tolist() == [number % 3 for number in numbers], seed
    assert read > 0
    assert failed > 0
