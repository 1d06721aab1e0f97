"""The package stands alone, and every process draws the same plan."""

import json
import subprocess
import sys
from pathlib import Path

from metamixer_ray.mixing import MixingConfig
from tests.mixing.plans import flat, plan_of

SCRIPT = """
import json, sys
import metamixer_ray.mixing
heavy = sorted({"ray", "mlflow", "torchvision", "pyarrow"} & {name.split(".")[0] for name in sys.modules})
from metamixer_ray.mixing import MixingConfig
from tests.mixing.plans import flat, plan_of
plan = plan_of(MixingConfig(local_probability=1, global_probability=1), seed=5, epoch=3, step=9, replica=1)
print(json.dumps({"heavy": heavy, "plan": flat(plan)}))
"""


def test_another_process_imports_neither_ray_nor_mlflow_and_draws_the_same_plan() -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=True)
    answer = json.loads(run.stdout)
    assert answer["heavy"] == []
    plan = plan_of(MixingConfig(local_probability=1, global_probability=1), seed=5, epoch=3, step=9, replica=1)
    assert answer["plan"] == flat(plan)
