"""What ``ray job submit`` sends from a source tree: the program, and none of what lies beside it."""

import zipfile
from pathlib import Path

import yaml
from ray._private.runtime_env.packaging import create_package
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[2]
ENVIRONMENT = yaml.safe_load((ROOT / "cluster" / "runtime-env.yaml").read_text())


def sent(tree: Path, target: Path) -> set[str]:
    create_package(str(tree), target, excludes=ENVIRONMENT["excludes"], include_gitignore=True)
    with zipfile.ZipFile(target) as package:
        return {name for name in package.namelist() if not name.endswith("/")}


def test_ray_takes_it() -> None:
    assert RuntimeEnv(**ENVIRONMENT, working_dir="https://host/tree.zip").to_dict()["env_vars"]


def test_all_of_the_program_is_sent(tmp_path: Path) -> None:
    expected = {
        str(path.relative_to(ROOT))
        for folder in ("metamixer_ray", "tune_spaces")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= sent(ROOT, tmp_path / "package.zip")


def test_what_lies_beside_it_is_not(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in (
        "metamixer_ray/data/kept.py",
        "mine.py",
        ".git/objects/ab",
        ".venv/bin/python",
        "venv/bin/python",
        "data/train.parquet",
        "elsewhere/train.parquet",
        "runs/one/checkpoint-epoch0001/peer0.pt",
        "elsewhere/checkpoint-epoch0001/peer0.json",
        "mlruns/0/meta.yaml",
        "mlartifacts/1/model",
        "mlflow.db",
        "tests/test_one.py",
        "metamixer_ray/__pycache__/train.pyc",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    assert sent(tree, tmp_path / "package.zip") == {"metamixer_ray/data/kept.py", "mine.py"}


def test_a_job_knows_where_runs_go_and_has_no_secret() -> None:
    variables = ENVIRONMENT["env_vars"]
    assert {"MLFLOW_TRACKING_URI", "METAMIXER_STORAGE"} <= variables.keys()
    assert not [name for name in variables if any(word in name for word in ("SECRET", "PASSWORD", "KEY", "TOKEN"))]
