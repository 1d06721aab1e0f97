"""Search spaces: which settings are searched, over which values, and which of them only matter for some choices.

A space is a mapping in HyperOpt's own form. Its keys are field names of the training's configuration; a key whose
value is a choice among mappings is only a name for that choice, and what stands in the mapping chosen is used::

    {
        "pairing": hp.choice("pairing", ["cross-class", "within-class"]),
        "coins": hp.choice("coins", [
            {"mix_together": True, "local_probability": hp.uniform("both", 0, 1)},
            {"mix_together": False, "local_probability": hp.uniform("local", 0, 1)},
        ]),
    }
"""

import difflib
import importlib
import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from hyperopt.pyll import Literal as PyllLiteral
from hyperopt.pyll import as_apply
from hyperopt.pyll.base import Apply
from hyperopt.pyll.stochastic import sample

from metamixer_ray.config import from_settings, sections
from metamixer_ray.errors import ConfigError

Space = Mapping[str, Any]
Settings = dict[str, Any]

# All else is the same for all trials: the data and its splits, the seed, the epochs, and where and how they run.
_SEARCHED_SECTIONS = ("mixing", "distillation", "optimisation", "networks")
_SEARCHED_FIELDS = ("peers", "batch_size", "augment", "sampler")


def load_spaces(names: Sequence[str]) -> Space:
    """The spaces of modules (``tune_spaces.mixing``) or files, joined and checked.

    Raises:
        ConfigError: a module that can't be loaded, has no ``space()``, names no setting of a training, or the same
            setting as another.
    """
    joined: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for name in names:
        space = _space_of(name)
        check_space(space, source=f"--space {name}")
        for field in sorted(field_names(space)):
            if field in owner:
                raise ConfigError(f"--space: {field!r} is searched by both {owner[field]} and {name}; give only one")
            owner[field] = name
        joined |= {key if key in sections() else f"{name}:{key}": value for key, value in space.items()}
    labels = [str(node.pos_args[0].obj) for node in _nodes(joined) if node.name == "hyperopt_param"]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"--space: HyperOpt's label {label!r} is used twice; labels must differ")
    return joined


def _space_of(name: str) -> Space:
    try:
        module = _load(name)
        if not callable(getattr(module, "space", None)):
            raise ConfigError(f"--space {name}: there is no function space() in it")
        space = module.space()
    except ConfigError:
        raise
    except Exception as error:
        # It is a person's own code, and may fail in any way.
        raise ConfigError(f"--space {name}: {type(error).__name__}: {error}") from error
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(f"--space {name}: space() must return a mapping of settings, not {space!r}")
    return space


def _load(name: str) -> ModuleType:
    path = Path(name)
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(f"_space_{path.stem}", path)
            if spec is None or spec.loader is None or not path.exists():
                raise ConfigError(f"--space {name}: no such file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        if os.getcwd() not in sys.path:
            # A person's own spaces lie where they work.
            sys.path.append(os.getcwd())
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and not name.startswith(error.name):
            raise ConfigError(f"--space {name} needs the module {error.name!r}, which is not installed") from None
        near = difflib.get_close_matches(name, built_in_spaces(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(built_in_spaces())}"
        raise ConfigError(f"--space {name}: no such module{hint}") from None


def built_in_spaces() -> list[str]:
    """Names of the spaces that come with the project."""
    import tune_spaces

    return sorted(f"tune_spaces.{path.stem}" for path in Path(tune_spaces.__path__[0]).glob("[a-z]*.py"))


def check_space(space: Space, *, source: str) -> None:
    """Refuse names that are no setting of a training, settings that trials must share, and values of the wrong type.

    Raises:
        ConfigError: the name, and the nearest valid one; or the value that doesn't fit.
    """
    for name in sorted(field_names(space)):
        if name in sections() and not searchable(name):
            raise ConfigError(f"{source}: {name!r} can't be searched: it is the same for all trials")
        if name not in sections():
            near = difflib.get_close_matches(name, sections(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{source}: unknown setting {name!r}{hint}")
    for drawn in draws(space, 20, seed=0):
        from_settings(drawn, source=source)


def searchable(name: str) -> bool:
    """Whether trials may differ in a setting."""
    return name in _SEARCHED_FIELDS or sections().get(name) in _SEARCHED_SECTIONS


def field_names(space: Space) -> set[str]:
    """All settings that a space may set."""
    return {name for mapping in _mappings(space) for name, value in mapping if not _is_group(value)}


def flattened(chosen: Mapping[str, Any]) -> Settings:
    """What a search proposed as plain settings: the mappings of choices are put in place of their names."""
    settings: Settings = {}
    for name, value in chosen.items():
        if isinstance(value, Mapping):
            settings |= flattened(value)
        elif isinstance(value, tuple):
            settings[name] = [_plain(item) for item in value]
        else:
            settings[name] = _plain(value)
    return settings


def draws(space: Space, number: int, seed: int) -> list[Settings]:
    """So many random settings of a space."""
    rng = np.random.default_rng(seed)
    apply = as_apply(dict(space))
    return [flattened(sample(apply, rng)) for _ in range(number)]


def locate(space: Space | Apply, settings: Settings) -> dict[str, Any] | None:
    """HyperOpt's labels of a point, each with its value: the index of an option, or a number.

    ``settings`` are all of a training's settings, not only those that the space has. None: the point does not lie in
    the space, or in one whose expressions can't be turned round (such as ``2 ** hp.uniform(...)``).
    """
    return _labels_of(as_apply(space if isinstance(space, Apply) else dict(space)), "", settings)


def grid(space: Space) -> list[Settings]:
    """All settings of a space of finite choices, without repetition.

    Raises:
        ConfigError: names a setting with infinitely many values.
    """
    settings = [flattened(point) for point in _points(as_apply(dict(space)))]
    return [point for index, point in enumerate(settings) if point not in settings[:index]]


def describe(space: Space) -> str:
    """The space as text, a line per setting, as HyperOpt prints it."""
    return "\n\n".join(f"{name}:\n{as_apply(value)}" for name, value in space.items())


def _plain(value: Any) -> Any:
    plain = value.item() if isinstance(value, np.generic) else value
    # Four digits are more than any of these settings is sensitive to, and can be read.
    return float(f"{plain:.4g}") if isinstance(plain, float) else plain


def _nodes(value: Any) -> list[Apply]:
    """All nodes of HyperOpt's graph, each as often as it is used."""
    found: list[Apply] = []

    def visit(node: Apply) -> None:
        found.append(node)
        for child in node.inputs():
            visit(child)

    visit(as_apply(value if not isinstance(value, Mapping) else dict(value)))
    return found


def _mappings(space: Space) -> Iterator[list[tuple[str, Apply]]]:
    for node in _nodes(space):
        if node.name == "dict":
            yield list(node.named_args)


def _options(node: Apply) -> list[Apply] | None:
    """What a choice chooses from, None for other nodes."""
    return list(node.pos_args[1:]) if node.name == "switch" else None


def _is_group(node: Apply) -> bool:
    options = _options(node)
    return options is not None and any(option.name == "dict" for option in options)


def _labels_of(node: Apply, name: str, settings: Settings) -> dict[str, Any] | None:
    """The labels that give setting ``name`` its value; of a mapping, those that do so for all its settings."""
    if node.name == "dict":
        return _merged(_labels_of(value, key, settings) for key, value in node.named_args)
    if (options := _options(node)) is not None:
        for index, option in enumerate(options):
            labels = _labels_of(option, name, settings)
            if labels is not None:
                return {str(node.pos_args[0].pos_args[0].obj): index, **labels}
        return None
    return _labels_for(node, settings[name])


def _labels_for(node: Apply, value: Any) -> dict[str, Any] | None:
    """The labels that make ``node`` be ``value``."""
    if isinstance(value, list | tuple) and len(value) == 1 and node.name != "pos_args":
        # One learning rate for all peers is a number in a space.
        return _labels_for(node, value[0])
    if isinstance(node, PyllLiteral):
        return {} if node.obj == value else None
    if node.name == "pos_args":
        if not isinstance(value, list | tuple) or len(value) != len(node.pos_args):
            return None
        return _merged(_labels_for(item, wanted) for item, wanted in zip(node.pos_args, value, strict=True))
    if node.name in ("float", "int"):
        return _labels_for(node.pos_args[0], value)
    if node.name == "hyperopt_param" and isinstance(value, int | float) and _may_be(node.pos_args[1], value):
        return {str(node.pos_args[0].obj): value}
    return None


def _merged(parts: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """All parts in one; None where one is missing."""
    merged: dict[str, Any] = {}
    for part in parts:
        if part is None:
            return None
        merged |= part
    return merged


def _may_be(distribution: Apply, value: float) -> bool:
    """Whether a distribution may draw a number."""
    kind, bounds = distribution.name, ("low", "high", "q")
    low, high, step = (
        argument.obj if isinstance(argument, PyllLiteral) else None for argument in map(distribution.arg.get, bounds)
    )
    if step is not None and not math.isclose(value / step, round(value / step), abs_tol=1e-9):
        return False
    if kind in ("normal", "qnormal", "lognormal", "qlognormal"):
        return "log" not in kind or value > 0
    if kind == "randint" and low is not None:
        return value in (range(low) if high is None else range(low, high))
    if low is None or high is None:
        return False
    if kind in ("loguniform", "qloguniform"):
        return value > 0 and low <= math.log(value) <= high
    return kind in ("uniform", "quniform") and low <= value <= high


def _points(node: Apply, name: str = "") -> Iterator[Any]:
    if isinstance(node, PyllLiteral):
        yield node.obj
    elif (options := _options(node)) is not None:
        for option in options:
            yield from _points(option, name)
    elif node.name == "dict":
        names = [key for key, _ in node.named_args]
        for values in itertools.product(*(list(_points(value, key)) for key, value in node.named_args)):
            yield dict(zip(names, values, strict=True))
    elif node.name == "pos_args":
        for items in itertools.product(*(list(_points(item, name)) for item in node.pos_args)):
            yield tuple(items)
    else:
        raise ConfigError(f"--search grid: {name!r} has infinitely many values; use --search tpe or random")
