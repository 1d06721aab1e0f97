"""The options of a comparison; what every training has in common are a training's own options."""

from dataclasses import dataclass, field

from metamixer_ray.comparison.methods import read_methods
from metamixer_ray.config import TrainConfig
from metamixer_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare methods under one protocol: the same networks, data, budget and seeds, judged on the test set after the
    last epoch."""

    methods: tuple[str, ...] = ("independent", "dml", "dml+metamixer")
    """What is compared: distillers, mixers and settings joined by +, such as dml+cutmix or kdcl-linear+kd_weight=2.
    What isn't named is 'none'. 'independent' is neither distiller nor mixer, and always there: gains are over it."""
    seeds: int = 3
    """Trainings of each method, with --seed and the numbers after it."""
    max_concurrent: int | None = None
    """Trainings at once. Default: what the cluster can hold at its autoscaling maximum."""
    trial_failures: int = 3
    """How often a training is taken up again, from its last checkpoint, when more than its workers died."""
    training: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Refuse what can't work, before anything is started.

        Raises:
            ConfigError: names the option and a value that works.
        """
        self.training.check()
        for name, least in (("seeds", 1), ("trial_failures", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, it is {getattr(self, name)}")
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ConfigError(f"--max-concurrent must be at least 1, it is {self.max_concurrent}")
        if self.training.baseline:
            raise ConfigError("--baseline is for single trainings; a comparison always trains 'independent' too")
        read_methods(self.methods, self.training)
