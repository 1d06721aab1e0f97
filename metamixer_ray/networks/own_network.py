"""The user's own network, given as ``module:function``."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from metamixer_ray.errors import ConfigError


def build_own(name: str, *, classes: int, image_size: int) -> nn.Module:
    """Call the user's ``module:function`` with keywords ``classes`` and ``image_size``.

    The module may lie in the working directory. A function that takes only one of the keywords gets only
    that one. What the function itself raises is passed on, with a note of the peer's name.

    Raises:
        ConfigError: the module can't be imported, the function isn't in it, can't be called so, or gives no
            nn.Module.
    """
    function = _find(name)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = None
    keywords: dict[str, int] = {"classes": classes, "image_size": image_size}
    if parameters is not None and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        taken = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
        needed = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
        if "classes" not in taken or needed - set(keywords):
            raise ConfigError(
                f"--peers {name}: the function must be callable as f(classes=..., image_size=...), "
                f"but its signature is {inspect.signature(function)}."
            )
        keywords = {key: value for key, value in keywords.items() if key in taken}
    try:
        network = function(**keywords)
    except Exception as error:
        error.add_note(f"while building the network of --peers {name}")
        raise
    if not isinstance(network, nn.Module):
        raise ConfigError(f"--peers {name}: the function gave a {type(network).__name__}, not a torch.nn.Module.")
    return network


def _find(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"--peers {name}: write MODULE:FUNCTION, such as my_networks:small_net.")
    here = os.getcwd()
    # Where `python -m` would put it; a worker process hasn't got it, and loads the network by this name, too.
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"--peers {name}: can't import {module_name!r} ({type(error).__name__}: {error}). "
            f"It must be installed, or lie in the working directory {here}."
        ) from error
    target: Any = module
    for part in function_name.split("."):
        target = getattr(target, part, None)
    if not callable(target):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(function_name, public, n=1)
        hint = f" Did you mean {module_name}:{near[0]}?" if near else ""
        raise ConfigError(f"--peers {name}: {module_name!r} has no function {function_name!r}.{hint}")
    return target


def found_stages(network: nn.Module) -> tuple[str, ...]:
    """Candidates for the stages of a network that declares none: its direct children with parameters, but
    the last.

    The last is taken for the classifier. A network that is a lone wrapper (one such child) is entered first.
    """
    prefix = ""
    module = network
    while True:
        children = [(child, part) for child, part in module.named_children() if any(True for _ in part.parameters())]
        if len(children) != 1:
            return tuple(prefix + child for child, _ in children[:-1])
        prefix += f"{children[0][0]}."
        module = children[0][1]
