"""The Kubernetes files: what Kustomize makes of them fits KubeRay's and Kubernetes' schemas, and fits together."""

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster.kustomize import Object, build
from tests.cluster.manifests import CLOUDS, FOLDER, JOBS, ROOT, containers_of, every, one, pods_of, rendered

# KubeRay's own (Apache License 2.0), out of its custom resource definitions; they name all fields of pods too.
SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.33"


def strict(schema: Any) -> Any:
    """A custom resource's schema as Kubernetes applies it with strict validation: only fields that it names."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


@cache
def kuberay(kind: str) -> jsonschema.Draft202012Validator:
    schema = strict(json.loads((SCHEMAS / f"kuberay-{kind.lower()}-v1.json").read_text()))
    # A custom resource's schema leaves the metadata to Kubernetes.
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    schema["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        # KubeRay makes names of services and pods of it, and refuses a longer one.
        "properties": {"name": {"type": "string", "maxLength": 47}, "labels": texts, "annotations": texts},
    }
    return jsonschema.Draft202012Validator(schema)


def mappings(node: Any) -> Iterator[tuple[str, Object]]:
    """All mappings inside, each with the last name on its path."""
    for name, value in node.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                yield name, each
                yield from mappings(each)


@every
def test_all_objects_fit_their_schemas(leaf: str, cloud: str, queued: bool) -> None:
    objects = rendered(leaf, cloud, queued=queued)
    assert len(objects) >= 3
    for each in objects:
        if each["apiVersion"] == "ray.io/v1":
            kuberay(each["kind"]).validate(each)
        else:
            assert kubernetes_validate.validate(each, KUBERNETES, strict=True) == KUBERNETES


@pytest.mark.parametrize(("leaf", "kind"), [("raycluster", "RayCluster"), ("train", "RayJob")])
def test_a_misspelt_field_would_be_refused_wherever_it_stands(leaf: str, kind: str) -> None:
    """All mappings are closed but those whose keys are the person's own."""
    each = one(rendered(leaf), kind)
    validator, free = kuberay(kind), set()
    for name, mapping in [("", each), *mappings(each)]:
        mapping["misspelt"] = "1"
        if validator.is_valid(each):
            free.add(name)
        del mapping["misspelt"]
    assert validator.is_valid(each)
    assert free == {"labels", "rayStartParams", "nodeSelector", "limits", "requests"}


def test_a_misspelt_field_of_kubernetes_own_objects_would_be_refused() -> None:
    deployment = one(rendered("mlflow"), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["redinessProbe"] = {}
    with pytest.raises(jsonschema.ValidationError, match="redinessProbe"):
        kubernetes_validate.validate(deployment, KUBERNETES, strict=True)


def test_both_schemas_are_of_one_kuberay() -> None:
    cluster, job = (
        json.loads((SCHEMAS / f"kuberay-{kind}-v1.json").read_text())["properties"]["spec"]["properties"]
        for kind in ("raycluster", "rayjob")
    )
    assert job["rayClusterSpec"]["properties"] == cluster


def test_a_job_brings_the_cluster_of_the_cluster_file_and_starts_no_other() -> None:
    for cloud in CLOUDS:
        cluster = one(rendered("raycluster", cloud), "RayCluster")
        for job in JOBS:
            objects = rendered(job, cloud)
            assert one(objects, "RayJob")["spec"]["rayClusterSpec"] == cluster["spec"]
            assert {each["kind"] for each in objects} == {"RayJob", "ConfigMap", "ServiceAccount"}


def test_all_that_is_to_be_filled_in_stands_in_one_folder() -> None:
    placeholder = re.compile(r"\b(REGISTRY|BUCKET|PROJECT|ACCOUNT)\b")
    assert {path.parent.name for path in FOLDER.rglob("*.yaml") if placeholder.search(path.read_text())} == {"site"}


def test_groups_in_another_order_would_be_noticed(tmp_path: Path) -> None:
    """Patches tell groups by their place, so they look at the name that is there."""
    for path in FOLDER.rglob("*.yaml"):
        target = tmp_path / path.relative_to(FOLDER)
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text().replace("groupName: l4", "groupName: a100"))
    for cloud in CLOUDS:
        with pytest.raises(AssertionError, match="groupName"):
            build(tmp_path / "raycluster", swap={"../gke": f"../{cloud}"})


@every
def test_secrets_are_referred_to_and_never_there(leaf: str, cloud: str, queued: bool) -> None:
    objects = rendered(leaf, cloud, queued=queued)
    assert "Secret" not in {each["kind"] for each in objects}
    secret = re.compile(r"PASSWORD|SECRET|TOKEN|CREDENTIAL|ACCESS_KEY")
    assert not any(secret.search(name) for name in one(objects, "ConfigMap")["data"])
    for pod in (pod for each in objects for pod in pods_of(each)):
        for variable in (variable for container in containers_of(pod) for variable in container.get("env", ())):
            if secret.search(variable["name"]):
                assert variable.keys() == {"name", "valueFrom"}
                assert variable["valueFrom"].keys() == {"secretKeyRef"}


@every
def test_every_pod_runs_a_pinned_image_as_somebody_without_rights(leaf: str, cloud: str, queued: bool) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for pod in (pod for each in rendered(leaf, cloud, queued=queued) for pod in pods_of(each)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers_of(pod):
            image = "postgres:17" if container["name"] == "postgres" else f"REGISTRY/metamixer-ray:{version}"
            assert container["image"] == image
            unprivileged = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == unprivileged
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert limits["memory"] == requests["memory"]
            assert limits.get("nvidia.com/gpu") == requests.get("nvidia.com/gpu")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which brings Kustomize")
@every
def test_kustomize_itself_makes_the_same_of_the_files(leaf: str, cloud: str, queued: bool, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    edits = [("site", "- ../gke", f"- ../{cloud}")] + [(leaf, "# - ../kueue", "- ../kueue")] * queued
    for folder, before, after in edits:
        path = tmp_path / folder / "kustomization.yaml"
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
    made = subprocess.run(["kubectl", "kustomize", str(tmp_path / leaf)], capture_output=True, text=True, check=True)

    def named(objects: Iterable[Object]) -> dict[tuple[str, str], Object]:
        return {(each["kind"], each["metadata"]["name"]): each for each in objects}

    assert named(yaml.safe_load_all(made.stdout)) == named(rendered(leaf, cloud, queued=queued))
