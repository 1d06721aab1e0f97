"""The options of a sweep; what every trial has in common are a training's own options."""

from dataclasses import dataclass, field
from typing import Literal

from metamixer_ray.config import TrainConfig
from metamixer_ray.errors import ConfigError

SearchName = Literal["tpe", "random", "grid"]
SchedulerName = Literal["asha", "median", "none"]
ObjectiveName = Literal["mean", "ensemble", "best", "worst", "nll"]

DEFAULT_VALIDATION = 0.1


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Search a training's settings: every trial is a whole training of peers that learn together."""

    space: tuple[str, ...] = ("tune_spaces.mixing",)
    """What is searched: modules or files with a function space(); several are joined."""
    samples: int = 32
    """How many settings are tried, the defaults among them; a grid is tried whole."""
    search: SearchName = "tpe"
    """How settings are proposed: tpe (HyperOpt's Tree of Parzen Estimators), random, or grid (finite choices only)."""
    first: tuple[str, ...] = ()
    """YAML files of settings to try first, after the defaults; each like a run's config.yaml, in part or whole."""
    random_first: int = 10
    """tpe: settings that are drawn at random before what was seen decides."""
    search_seed: int = 0
    """Decides what is proposed. The trainings' own --seed is the same for all trials."""
    objective: ObjectiveName = "mean"
    """What makes a trial good, on the validation split: the mean top-1 of the peers, the ensemble's, the best or the
    worst peer's, or the peers' mean negative log-likelihood (the smaller the better)."""
    scheduler: SchedulerName = "asha"
    """Which trials are stopped early: asha (successive halving), median (those below the median), or none."""
    grace_epochs: int | None = None
    """Epochs that every trial gets before it may be stopped. Default: an eighth of --epochs, at least 1."""
    reduction_factor: float = 3.0
    """asha: one in so many trials goes on at each rung."""
    max_concurrent: int | None = None
    """Trials at once. Default: what the cluster can hold at its autoscaling maximum."""
    trial_failures: int = 3
    """How often a trial is taken up again, from its last checkpoint, when more than its workers died."""
    confirm_seeds: int = 2
    """After the search, the best settings and the defaults are trained with so many further seeds each, which tells
    what was found from what was luck; 0 for none."""
    refit: bool = False
    """In the end train the best settings and the defaults on the whole training set (but what a distiller such as
    kdcl-general needs for validation), and only then test them."""
    training: TrainConfig = field(default_factory=TrainConfig)

    @property
    def grace(self) -> int:
        """Epochs that every trial gets."""
        return self.grace_epochs if self.grace_epochs is not None else max(1, self.training.epochs // 8)

    @property
    def maximised(self) -> bool:
        """Whether more of the objective is better."""
        return self.objective != "nll"

    def check(self) -> None:
        """Refuse what can't work, before anything is started.

        Raises:
            ConfigError: names the option and a value that works.
        """
        self.training.check()
        if not self.space:
            raise ConfigError("--space needs at least one module, for example --space tune_spaces.mixing")
        for name, least in (("samples", 1), ("random_first", 1), ("trial_failures", 0), ("confirm_seeds", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, it is {getattr(self, name)}")
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ConfigError(f"--max-concurrent must be at least 1, it is {self.max_concurrent}")
        if not 1 <= self.grace <= self.training.epochs:
            raise ConfigError(f"--grace-epochs must lie between 1 and the {self.training.epochs} --epochs")
        if not self.reduction_factor > 1:
            raise ConfigError(f"--reduction-factor must be above 1, it is {self.reduction_factor}")
        if self.training.baseline:
            raise ConfigError("--baseline is for single trainings; a sweep always compares with the defaults")
