"""The command line, made from the configuration's dataclasses."""

import signal
import sys
from collections.abc import Callable, Sequence

import tyro

from metamixer_ray.config import TrainConfig, read_yaml
from metamixer_ray.errors import TrainingFailed, UserError
from metamixer_ray.interruption import Stopped

EXIT_FAILED, EXIT_USAGE = 1, 2


def parse(argv: Sequence[str], *, program: str, description: str) -> TrainConfig:
    """A checked configuration from the command line.

    Raises:
        UserError: a file that can't be read, or an impossible combination.
        SystemExit: unknown flags or values of the wrong type (tyro prints which, and what is close).
    """
    default, words = take_config_file(argv)
    config = tyro.cli(
        TrainConfig,
        prog=program,
        description=f"{description}\n\n--config FILE starts from a YAML file of settings, such as a run's config.yaml; "
        "flags override it.",
        default=default,
        args=words,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    config.check()
    return config


def take_config_file(argv: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration of the file that ``--config`` names, else the defaults; and the other words.

    Raises:
        UserError: a file that can't be read.
    """
    config, words = TrainConfig(), []
    rest = iter(argv)
    for word in rest:
        if word == "--config":
            config = read_yaml(next(rest, ""))
        elif word.startswith("--config="):
            config = read_yaml(word.partition("=")[2])
        else:
            words.append(word)
    return config, words


def run_command(body: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command's body; a :class:`UserError` becomes its message and exit status 2."""
    try:
        body(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except Stopped as error:
        return 128 + error.signum
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0
