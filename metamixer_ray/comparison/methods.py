"""Methods by their names: a distiller, a mixer and settings, joined by ``+``."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from metamixer_ray.config import TrainConfig, sections, with_settings
from metamixer_ray.distill.config import DistillerName
from metamixer_ray.errors import ConfigError, UserError
from metamixer_ray.mixing.config import MixerName
from metamixer_ray.settings_text import parse_value

REFERENCE = "independent"
# What a method may set; all else is the protocol, the same for all.
_OPEN_SECTIONS = ("mixing", "distillation", "optimisation")


@dataclass(frozen=True)
class Method:
    """What is compared with others."""

    name: str
    """Always the same for the same settings: the distiller, the mixer, the other settings by name; joined by ``+``."""
    settings: Mapping[str, Any]
    """What it sets of a training: always ``distiller`` and ``mixer``."""


def read_methods(words: Sequence[str], training: TrainConfig) -> list[Method]:
    """Methods in the order of their names on the command line, the reference first where nobody names it.

    Raises:
        ConfigError: no method at all, an unknown part, a setting that isn't the method's, a method that is named
            twice or that ``training`` can't be trained with.
    """
    if not words:
        raise ConfigError("--methods: name at least one, such as dml+metamixer")
    methods = [read_method(word) for word in words]
    names = [method.name for method in methods]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--methods: {twice} is named twice")
    if REFERENCE not in names:
        methods.insert(0, read_method(REFERENCE))
    for method in methods:
        try:
            with_settings(training, method.settings).check()
        except UserError as error:
            raise ConfigError(f"--methods: {method.name}: {error}") from None
    return methods


def read_method(word: str) -> Method:
    """A method from its name.

    Raises:
        ConfigError: a part of it is no distiller, mixer or setting of these; the nearest one is suggested.
    """
    chosen: dict[str, str] = {}
    others: dict[str, Any] = {}
    parts = [part for part in word.split("+") if part != REFERENCE]
    for part in parts:
        name, is_setting, value = part.partition("=")
        if is_setting:
            others[_setting(name, word)] = _value(value, word)
            continue
        kind = _kind(part, word)
        if kind in chosen:
            raise ConfigError(f"--methods: {word} has two {kind}s, {chosen[kind]} and {part}; give one of them")
        chosen[kind] = part
    settings: dict[str, Any] = {"distiller": "none", "mixer": "none", **chosen}
    if "distiller" not in chosen:
        # Peers that learn nothing from each other have nothing to exchange.
        settings |= {"divergence": "kl", "statistics": "none", "statistics_weight": 0.0}
    settings |= dict(sorted(others.items()))
    named = [chosen[kind] for kind in ("distiller", "mixer") if kind in chosen] or [REFERENCE]
    return Method("+".join([*named, *(f"{name}={_text(value)}" for name, value in sorted(others.items()))]), settings)


def _kind(part: str, word: str) -> str:
    distillers, mixers = (tuple(n for n in get_args(names) if n != "none") for names in (DistillerName, MixerName))
    if part in distillers:
        return "distiller"
    if part in mixers:
        return "mixer"
    raise ConfigError(
        f"--methods: {part!r} in {word!r} is neither a distiller ({', '.join(distillers)}) nor a mixer "
        f"({', '.join(mixers)}){_hint(part, [*distillers, *mixers, REFERENCE])}"
    )


def _value(text: str, word: str) -> Any:
    try:
        return parse_value(text, source=word)
    except ConfigError:
        raise ConfigError(f"--methods: {text!r} in {word!r} is not a value; a list is [0.1,0.2]") from None


def _setting(name: str, word: str) -> str:
    key, known = name.replace("-", "_"), sections()
    if key in ("distiller", "mixer"):
        raise ConfigError(f"--methods: {word}: name the {key} without {name}=, as in dml+metamixer")
    open_settings = [n for n, section in known.items() if section in _OPEN_SECTIONS and n not in ("distiller", "mixer")]
    if key in open_settings:
        return key
    if key in known:
        raise ConfigError(
            f"--methods: {word} may not set {key}: it is the same for all methods, an option of the comparison"
        )
    near = difflib.get_close_matches(key, open_settings, n=1)
    raise ConfigError(
        f"--methods: unknown setting {name!r} in {word!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _text(value: Any) -> str:
    """What :func:`_value` reads as the same again."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return "null" if value is None else str(value)
