"""What ``kustomize build`` makes of a folder, for the little of Kustomize that cluster/kubernetes uses.

Everything else is refused, so that a misspelt field can't pass for a known one. In Kustomize's order: resources,
components, patches, images, replacements; then objects that are marked as local are dropped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
FIELDS = {"apiVersion", "kind", "resources", "components", "patches", "images", "replacements"}
VERSIONS = {"Kustomization": "kustomize.config.k8s.io/v1beta1", "Component": "kustomize.config.k8s.io/v1alpha1"}
LOCAL = "config.kubernetes.io/local-config"


def build(folder: Path, swap: Mapping[str, str] | None = None, also: Sequence[str] = ()) -> list[Object]:
    """The objects of a kustomization.

    Args:
        swap: components, and those that a person has put in their places, wherever they are asked for.
        also: components that a person has added to the folder's own.
    """
    return _build(folder, [], swap or {}, also, "Kustomization")


def load(path: Path) -> list[Object]:
    """The objects in a file. What YAML aliases say again is copied, as Kustomize does."""
    objects = [_copied(document) for document in yaml.safe_load_all(path.read_text())]
    assert all(objects), f"{path} has an empty document"
    return objects


def _build(
    folder: Path, objects: list[Object], swap: Mapping[str, str], also: Sequence[str], kind: str
) -> list[Object]:
    (file,) = load(folder / "kustomization.yaml")
    assert file.keys() <= FIELDS, f"{folder}: {file.keys() - FIELDS}"
    assert (file["kind"], file["apiVersion"]) == (kind, VERSIONS[kind]), folder
    objects = list(objects)
    for name in file.get("resources", ()):
        path = folder / name
        if path.is_dir():
            objects += _build(path, [], swap, (), "Kustomization")
        else:
            assert Path(name).name == name, f"{folder}: {name} lies outside, which Kustomize refuses"
            objects += load(path)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names)), f"{folder}: {names}"
    for name in [*file.get("components", ()), *also]:
        objects = _build(folder / swap.get(name, name), objects, swap, (), "Component")
    for patch in file.get("patches", ()):
        assert patch.keys() <= {"target", "patch", "path"}, patch
        content = yaml.safe_load(patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text())
        change = _json_patch if isinstance(content, list) else _merge
        for each in _selected(objects, patch["target"]):
            change(each, content)
    for image in file.get("images", ()):
        assert image.keys() == {"name", "newName", "newTag"}
        for each in objects:
            _rename(each, image)
    for replacement in file.get("replacements", ()):
        _replace(objects, replacement)
    return [each for each in objects if each["metadata"].get("annotations", {}).get(LOCAL) != "true"]


def _selected(objects: list[Object], target: Mapping[str, str]) -> list[Object]:
    assert target.keys() == {"kind"}, target
    return [each for each in objects if each["kind"] == target["kind"]]


def _json_patch(target: Object, operations: list[Object]) -> None:
    """RFC 6902: test, and add to a mapping or at a list's end."""
    for operation in operations:
        *parents, last = operation["path"].removeprefix("/").split("/")
        place: Any = target
        for part in parents:
            place = place[int(part) if isinstance(place, list) else part]
        if operation["op"] == "test":
            assert place[last] == operation["value"], operation
        elif isinstance(place, list):
            assert (operation["op"], last) == ("add", "-"), operation
            place.append(_copied(operation["value"]))
        else:
            assert operation["op"] == "add", operation
            assert last not in place, f"{operation} would take the place of what is there"
            place[last] = _copied(operation["value"])


def _merge(target: Object, patch: Object) -> None:
    """A strategic merge patch on a custom resource: mappings are merged, lists aren't. The patch's name is ignored."""
    assert patch["apiVersion"] == target["apiVersion"]
    assert patch["kind"] == target["kind"] == "RayJob", "Kubernetes' own kinds merge lists by keys"

    def merge(into: Object, what: Object) -> None:
        for key, value in what.items():
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                merge(into[key], value)
            else:
                into[key] = _copied(value)

    merge(target["spec"], patch["spec"])


def _rename(node: Any, image: Mapping[str, str]) -> None:
    """Kustomize finds images in every list named containers or initContainers, in custom resources too."""
    if isinstance(node, list):
        for each in node:
            _rename(each, image)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                for container in value:
                    if container["image"] == image["name"]:
                        container["image"] = f"{image['newName']}:{image['newTag']}"
            _rename(value, image)


def _replace(objects: list[Object], replacement: Mapping[str, Any]) -> None:
    source = dict(replacement["source"])
    path = source.pop("fieldPath").split(".")
    (origin,) = _selected(objects, source)
    place, last = _field(origin, path)
    for target in replacement["targets"]:
        assert target.keys() <= {"select", "fieldPaths", "options"}, target
        for each in _selected(objects, target["select"]):
            for field in target["fieldPaths"]:
                there, name = _field(each, field.split("."))
                assert name in there or target.get("options") == {"create": True}, f"no field {field}"
                there[name] = _copied(place[last])


def _field(root: Object, path: list[str]) -> tuple[Object, str]:
    """The mapping that has, or is to have, the last part of the path."""
    place: Any = root
    for part in path[:-1]:
        if part.startswith("["):
            key, _, value = part.strip("[]").partition("=")
            (place,) = [each for each in place if each[key] == value]
        else:
            place = place[part]
    return place, path[-1]


def _copied(value: Any) -> Any:
    """A copy that shares nothing, not even what aliases made one."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value
