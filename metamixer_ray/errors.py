"""The errors a person can cause. Each says what was wrong, where, and what to do instead, in one message.

Secrets in it are masked.
"""

from metamixer_ray.masking import masked


class UserError(ValueError):
    """Base of every error that the person at the keyboard can mend; commands print it without a traceback."""

    def __init__(self, message: str = "") -> None:
        super().__init__(masked(message))


class ConfigError(UserError):
    """An option has a value that cannot work; the message names the option and a value that can."""


class DataError(UserError):
    """The data cannot be used as it is; the message names the file and the row, and the remedy."""


class Unwritable(ConfigError, OSError):
    """A folder that can't be written. To a person who just named it, it is an option's error; to a training that is
    under way, storage that may recover."""


class Unreachable(DataError, OSError):
    """Data whose store doesn't answer. The same holds of it."""


class CheckpointError(UserError):
    """A checkpoint is torn, missing, or belongs to another configuration; the message says which and why."""


class TornCheckpoint(CheckpointError):
    """A checkpoint is not as it was written: files are missing, cut off or changed. An older one may be whole."""


class UnreadableCheckpoint(TornCheckpoint):
    """Storage doesn't give a checkpoint for now, which may be whole."""


class TrainingFailed(RuntimeError):
    """A training ended before its last epoch; the message says why, and how to go on."""

    def __init__(self, message: str = "") -> None:
        super().__init__(masked(message))


class ProcessKilled(TrainingFailed):
    """A process that helps this one was killed. Nothing is wrong with what a person gave: the same may go well again,
    so workers that meet it are restarted."""


class TrainingDiverged(TrainingFailed):
    """Values stayed non-finite, as they would again; the message names the peer."""


class StorageFailed(TrainingFailed):
    """Storage could not be written, or read, for longer than ``--storage-patience``; the message says why."""
