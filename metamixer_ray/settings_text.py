"""Settings as text that anybody may have written: YAML into plain values, and values into messages."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from metamixer_ray.errors import ConfigError
from metamixer_ray.masking import masked


def read_settings(path: str | Path, *, source: str) -> Mapping[Any, Any]:
    """What :func:`parse_settings` finds in a file.

    Raises:
        ConfigError: no such file, not YAML, or something else.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}: {getattr(error, 'strerror', None) or error}") from None
    return parse_settings(content, source=source)


def parse_settings(text: bytes | str, *, source: str) -> Mapping[Any, Any]:
    """The mapping that YAML text is; empty text is an empty one.

    Args:
        source: how a message names the text.

    Raises:
        ConfigError: not YAML, or something else.
    """
    settings = parse_value(text, source=source)
    if not isinstance(settings, Mapping | None):
        raise ConfigError(f"{source} must hold settings as 'name: value', not a {type(settings).__name__}")
    return settings or {}


def parse_value(text: bytes | str, *, source: str) -> Any:
    """What YAML text says: plain values only, no object is made and nothing is called.

    Raises:
        ConfigError: not YAML.
    """
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply") from None
    except Exception as error:  # beside its own errors PyYAML passes on those of what it calls, such as int and date
        raise ConfigError(f"{source} is not YAML: {_what_is_wrong(error)}") from None


def _what_is_wrong(error: Exception) -> str:
    """Without the lines around it, which PyYAML cuts where they are long: of a password's URI only a part may be left,
    and nobody could tell that it is one."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    told = []
    for what, mark in ((error.context, error.context_mark), (error.problem, error.problem_mark)):
        if what is not None:
            told.append(what if mark is None else f"{what} in line {mark.line + 1}, column {mark.column + 1}")
    return ", ".join(told)


class _Brief(reprlib.Repr):
    """Secrets are masked before they are cut, or what is left of them wouldn't be known as such."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 100, 100

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(masked(x), level)

    def repr_bytes(self, x: bytes, level: int) -> str:
        return self.repr_str(x.decode(errors="replace"), level)


def brief(value: object) -> str:
    """``value`` for a message: cut, since what a file holds can be endless (ten lines of YAML make a billion words)."""
    try:
        return _Brief().repr(value)
    except Exception:  # a number of too many digits, for one
        return f"a {type(value).__name__}"
