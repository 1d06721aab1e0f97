"""Places with keys in them: files keep them masked, and what was masked must be given again."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from metamixer_ray.config import TrainConfig, flatten, from_settings, identity, read_yaml, to_yaml
from metamixer_ray.data import load_splits
from metamixer_ray.errors import ConfigError, DataError, TrainingFailed
from metamixer_ray.masking import is_masked, masked, masked_uri
from metamixer_ray.runs import create_run, default_name, open_run
from metamixer_ray.sweeps.config import SweepConfig
from metamixer_ray.sweeps.opening import SWEEP, create_sweep, facts_of, open_sweep
from metamixer_ray.sweeps.opening import default_name as sweep_name

PLACES = {
    "data": "s3://KEY:HIDDEN@bucket/set?region=eu",
    "test_data": "s3://bucket/test.parquet?access_key=KEY&secret_key=HIDDEN",
    "storage": "s3://KEY:HIDDEN@bucket",
    "tracking_uri": "postgresql://someone:HIDDEN@host/db",
}


def placed(**settings: object) -> TrainConfig:
    return from_settings({**PLACES, **settings})


def test_a_file_of_settings_holds_no_key_and_asks_for_it() -> None:
    text = to_yaml(placed())
    assert "HIDDEN" not in text
    assert "KEY" not in text
    kept = from_settings(yaml.safe_load(text))
    given: dict[str, str] = {}
    for name in ("data", "test_data", "storage", "tracking_uri"):
        with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')} \S*\*\*\*\S* comes from a file"):
            from_settings({**flatten(kept), **given}).check()
        given[name] = PLACES[name]
    from_settings({**flatten(kept), **given}).check()


@pytest.mark.parametrize(
    "text",
    [
        "https://someone@corp.example:HIDDEN@mlflow.example/x",
        "https://someone@corp.example:1234@HIDDEN@mlflow.example/x",
        "postgresql://admin@server:HIDDEN@server.example/db",
        "mysql+pymysql://u:HIDDEN@h/db and postgres://u:HID@DEN@h",
        "oracle://u/HIDDEN@h",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3DHIDDEN&x=1",
        "redis://:HIDDEN@h",
        "https://HIDDEN@h/x",
        "http://h/?auth=HIDDEN",
        "http://h/?x=1&pass=HIDDEN",
        "s3://KEY:HID DEN@bucket/x",
        "--tracking-uri https://u:HID DEN@h/x is refused, see 'http://c:5000/a'",
        "https://u:HID@ss DEN@h",
        "https://someone@corp.example:HID DEN@h",
        "postgresql+psycopg://mlflow:2024 HIDDEN@db/mlflow",
        "postgresql://mlflow:it's HIDDEN@db/mlflow",
    ],
)
def test_no_form_of_a_place_shows_its_secret(text: str) -> None:
    shown = masked(text)
    assert "HID" not in shown
    assert "DEN" not in shown
    assert is_masked(shown)
    assert masked(shown) == shown


@given(
    st.sampled_from(["https", "s3", "postgresql+psycopg"]),
    st.from_regex(r"[a-z]{1,4}(@[a-z]{1,4}(\.[a-z]{1,3})?)?", fullmatch=True),
    st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=8),
)
def test_no_user_and_password_are_kept(scheme: str, user: str, password: str) -> None:
    place = f"{scheme}://{user}:#{password}#@host/x"
    assert masked_uri(place) == f"{scheme}://***@host/x"
    assert masked_uri(f"{scheme}://{user}:{password}@host/x") == f"{scheme}://***@host/x"
    # In prose what follows the last @ is all that is sure to be there still.
    assert masked(f"it is {place}, which is away") == f"it is {scheme}://***@host/x, which is away"


@pytest.mark.parametrize("unit", ["://", "://a:b ", "?token", "://a:b@", "--token-", "&key;"])
def test_long_texts_of_any_kind_are_masked_at_once(unit: str) -> None:
    text = unit * (20_000 // len(unit))
    assert len(masked(text)) <= len(text) + 30_000


@pytest.mark.parametrize(
    "text",
    [
        "MLflow at http://mlflow:5000: 503 (see http://wiki/x), ask ops@corp.example",
        "http://mlflow:5000, reported by bob@corp.example",
        "hdfs://someone@host:8020/runs is away; ask a@b.example",
    ],
)
def test_what_is_no_secret_is_left_in_a_message(text: str) -> None:
    assert masked(text) == text


def test_places_without_keys_are_kept_as_they_are() -> None:
    places = {
        "data": "abfs://container@account.dfs.core.windows.net/set",
        "test_data": "gs://anonymous@bucket/test?retry_limit_seconds=60",
        "storage": "hdfs://someone@host:8020/runs",
        "tracking_uri": "http://host:5000?author=me",
    }
    kept = from_settings(yaml.safe_load(to_yaml(from_settings(places))))
    assert {name: flatten(kept)[name] for name in places} == places
    kept.check()


def test_other_keys_to_the_same_place_are_the_same_data() -> None:
    assert identity(placed()) == identity(placed(data=PLACES["data"].replace("HIDDEN", "ANOTHER")))
    assert identity(placed()) != identity(placed(data=PLACES["data"].replace("bucket", "other")))


def test_a_run_is_resumed_with_the_keys_given_again(tmp_path: Path) -> None:
    config = placed(storage=str(tmp_path), name="one")
    create_run(open_run(config), config, load_splits(TrainConfig().dataset))
    assert "HIDDEN" not in "".join(path.read_text() for path in (tmp_path / "one").iterdir())
    again = placed(storage=str(tmp_path), name="one", resume=True, data=PLACES["data"].replace("HIDDEN", "ANOTHER"))
    assert not open_run(again).new
    with pytest.raises(ConfigError, match=r"--data .* comes from a file"):
        read_yaml(tmp_path / "one" / "config.yaml").check()


def test_a_sweep_keeps_no_key(tmp_path: Path) -> None:
    config = placed(storage=str(tmp_path), name="one")
    facts = facts_of(SweepConfig(training=config), "images")
    create_sweep(open_sweep(SWEEP, config, facts, "x"), facts)
    assert "HIDDEN" not in (tmp_path / "one" / "sweep.yaml").read_text()


def test_names_and_errors_hold_no_key() -> None:
    config = placed(data="s3://KEY:HIDDEN@bucket")
    for text in (
        default_name(config),
        sweep_name(SWEEP, config, "x"),
        *(
            str(kind(f"--data {PLACES['data']}: cannot be reached"))
            for kind in (ConfigError, DataError, TrainingFailed)
        ),
    ):
        assert "HIDDEN" not in text
