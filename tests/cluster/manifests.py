"""cluster/kubernetes as Kustomize renders it, and ways to look into it."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tyro
from ray.autoscaler._private.kuberay.utils import parse_quantity

from metamixer_ray.cli import take_starting_point
from metamixer_ray.sweeps.config import SweepConfig
from tests.cluster.kustomize import Object, build

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kubernetes"
CLOUDS = ("gke", "eks")
JOBS = ("train", "sweep")
LOGIN = "mlflow-login"
"""The secret with the login at the tracking server."""
# What kubectl apply -k takes.
LEAVES = ("raycluster", *JOBS, "mlflow")


def rendered(leaf: str, cloud: str = "gke", *, queued: bool = False) -> list[Object]:
    return build(FOLDER / leaf, swap={"../gke": f"../{cloud}"}, also=["../kueue"] if queued else [])


every = pytest.mark.parametrize(
    ("leaf", "cloud", "queued"),
    [(leaf, cloud, False) for leaf in LEAVES for cloud in CLOUDS] + [(job, "gke", True) for job in JOBS],
)


def one(objects: Sequence[Object], kind: str, name: str | None = None) -> Object:
    (found,) = [each for each in objects if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    return found


def settings() -> dict[str, str]:
    return one(rendered("mlflow"), "ConfigMap")["data"]


def pods_of(each: Object) -> list[Object]:
    """The specifications of all pods that come of an object."""
    spec = each.get("spec", {})
    if each["kind"] in ("Deployment", "StatefulSet"):
        return [spec["template"]["spec"]]
    if each["kind"] == "RayJob":
        return [spec["submitterPodTemplate"]["spec"], *(pod for _, pod, _ in ray_nodes(spec["rayClusterSpec"]))]
    return [pod for _, pod, _ in ray_nodes(spec)] if each["kind"] == "RayCluster" else []


def ray_nodes(cluster: Object) -> Iterator[tuple[Object, Object, Object]]:
    """Of the head and of all worker groups: the group, its pods, their container."""
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        yield group, pod, container


def containers_of(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def variables(container: Object) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}


def mounted(pod: Object, container: Object, path: str) -> Object:
    """The empty folder that is mounted there."""
    (mount,) = [each for each in container["volumeMounts"] if each["mountPath"] == path]
    (volume,) = [each for each in pod["volumes"] if each["name"] == mount["name"]]
    return volume["emptyDir"]


def amount(quantity: str) -> float:
    return float(parse_quantity(quantity))


def command(job: str) -> tuple[str, list[str]]:
    """Module and words of the entrypoint's ``python -m``, as they come out of all the shells on their way."""
    text = one(rendered(job), "RayJob")["spec"]["entrypoint"]
    # KubeRay writes it as it is into a bash command, and `ray job submit` quotes once more what it gets of that.
    assert not set(text) & set("\n$`\\!\"'|;&"), "would mean something to a shell"
    python, option, module, *words = shlex.split(text)
    assert (python, option) == ("python", "-m")
    return module, words


def read_sweep(words: Sequence[str]) -> SweepConfig:
    """A sweep's options, as metamixer_ray.tune reads them."""
    training, rest = take_starting_point(words)
    config = tyro.cli(
        SweepConfig,
        default=SweepConfig(training=training),
        args=rest,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    config.check()
    return config
