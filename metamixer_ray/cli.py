"""The command line, made from the configuration's dataclasses."""

import signal
import sys
from collections.abc import Callable, Sequence

import tyro

from metamixer_ray.config import TrainConfig, read_yaml
from metamixer_ray.errors import ConfigError, TrainingFailed, UserError
from metamixer_ray.interruption import Stopped
from metamixer_ray.printing import lenient
from metamixer_ray.recipes import read_recipe, recipe_table

EXIT_FAILED, EXIT_USAGE = 1, 2
STARTING_POINTS = (
    "--config FILE starts from a YAML file of settings, such as a run's config.yaml; --recipe NAME from a published "
    "condition (--recipe list shows them). Flags override either."
)


def parse(argv: Sequence[str], *, program: str, description: str) -> TrainConfig:
    """A checked configuration from the command line.

    Raises:
        UserError: a file that can't be read, or an impossible combination.
        SystemExit: unknown flags or values of the wrong type (tyro prints which, and what is close).
    """
    default, words = take_starting_point(argv)
    config = tyro.cli(
        TrainConfig,
        prog=program,
        description=f"{description}\n\n{STARTING_POINTS}",
        default=default,
        args=words,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    config.check()
    return config


def take_starting_point(argv: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration that ``--config`` or ``--recipe`` names, else the defaults; and the other words.

    Raises:
        UserError: a file that can't be read, a recipe that there isn't, or more than one of them.
        SystemExit: after ``--recipe list``, which prints the recipes.
    """
    given: list[tuple[str, str]] = []
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        option, joined, value = word.partition("=")
        if option in ("--config", "--recipe"):
            given.append((option, value if joined else next(rest, "")))
        else:
            words.append(word)
    if ("--recipe", "list") in given:
        print(recipe_table())
        raise SystemExit(0)
    if len(given) > 1:
        both = " and ".join(f"{option} {value}" for option, value in given)
        raise ConfigError(f"{both}: start from one of them, and change its settings by flags")
    if not given:
        return TrainConfig(), words
    ((option, value),) = given
    return (read_yaml if option == "--config" else read_recipe)(value), words


def run_command(body: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command's body; a :class:`UserError` becomes its message and exit status 2."""
    try:
        body(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=lenient(sys.stderr))
        return EXIT_USAGE
    except Stopped as error:
        return 128 + error.signum
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except TrainingFailed as error:
        print(f"error: {error}", file=lenient(sys.stderr))
        return EXIT_FAILED
    return 0
