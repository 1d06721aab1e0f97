"""The options of distillation and what follows from them alone."""

import math
from dataclasses import dataclass
from typing import Literal

from metamixer_ray.distill.control import MAX_PEERS_IN_BF16
from metamixer_ray.errors import ConfigError

DistillerName = Literal[
    "none",
    "dml",
    "ensemble",
    "ensemble-gated",
    "kdcl-naive",
    "kdcl-linear",
    "kdcl-minlogit",
    "kdcl-general",
    "codistillation",
    "okddip",
    "mcl",
]
PROJECTION_DIMS = {"okddip": 8, "mcl": 128}
WARMUP_SHARE = 0.25
_CONTRASTS = ("vcl_weight", "icl_weight", "soft_vcl_weight", "soft_icl_weight")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What peers learn from each other, how strongly, and from when on.

    Raises:
        ConfigError: when an option's value cannot work; the message names the option and a value that can.
    """

    distiller: DistillerName = "dml"
    """What a peer imitates: 'dml' each other peer's predictions (deep mutual learning), 'ensemble' those of all peers'
    mean logits, 'ensemble-gated' those of their mean as a learnt gate weighs it, 'kdcl-naive' those of the peer that
    fits the label best, 'kdcl-linear' those of the weighted mean that fits it best, 'kdcl-minlogit' those of the peers'
    lowest logits, 'kdcl-general' those of a mean that weighs peers by their errors on the validation split,
    'codistillation' the mean of those of copies of the others that are some steps old, 'okddip' those of the peers it
    attends to (the last peer: the mean of the others), 'mcl' how the others' embeddings tell images apart (mutual
    contrastive learning); with 'none' the peers learn independently."""

    divergence: Literal["kl", "dkd"] = "kl"
    """How the teacher of 'ensemble*', 'kdcl-*' and 'codistillation' is imitated: 'kl', or 'dkd', which weighs the
    target class and the other classes separately (decoupled knowledge distillation)."""

    dkd_alpha: float = 1.0
    """dkd: weight of the target class."""

    dkd_beta: float = 8.0
    """dkd: weight of the other classes."""

    stale_steps: int = 50
    """codistillation: steps from one exchange of the networks' weights to the next. Before the first of them peers
    learn from the labels alone. The copies predict as in an evaluation, by the running statistics of BatchNorm."""

    disjoint_data: bool = False
    """codistillation, none: every peer learns from a part of the training images of its own, as many of each class as
    the others (what doesn't divide by the peers is left out). An epoch is one pass through such a part. The other
    distillers, and feature statistics, compare what peers say of the same images."""

    projection_dim: int | None = None
    """okddip, mcl: numbers per image that peers tell each other of their embedding, whatever its width. Default: 8 for
    okddip (what its public code has for 64 channels), 128 for mcl."""

    contrast_temperature: float = 0.1
    """mcl: the temperature tau that similarities of embeddings are divided by."""

    vcl_weight: float = 0.1
    """mcl: weight of telling images apart by a peer's own embeddings."""

    icl_weight: float = 0.1
    """mcl: weight of telling images apart by its own and another peer's embeddings."""

    soft_vcl_weight: float = 1.0
    """mcl: weight of agreeing with the others on how alike the images are."""

    soft_icl_weight: float = 1.0
    """mcl: weight of agreeing on that between its own and another peer's embeddings."""

    kd_weight: float = 1.0
    """Weight of the distillation loss beside the cross-entropy, once the ramp is over."""

    temperature: float = 3.0
    """Softens predictions before they are compared; the loss is multiplied by its square, so gradients keep
    their scale."""

    kd_burn_in_epochs: float = 0.0
    """Epochs at the start without any distillation, before its weight begins to grow; fractions count."""

    kd_warmup_epochs: float | None = None
    """Epochs over which the distillation weight grows linearly from zero, after the burn-in; fractions count. Default:
    a quarter of all epochs. With 0 peers that know nothing yet pull each other to saying nothing, and may stay
    there."""

    statistics: Literal["none", "attention", "similarity"] = "attention"
    """Feature statistics that peers exchange per stage: 'attention' maps (where a peer looks), 'similarity'
    between the images of a batch, or 'none'."""

    statistics_weight: float = 0.0
    """Weight of the feature statistics in the loss. With 0 they are only measured now and then, see
    --statistics-every."""

    statistics_grid: int = 4
    """Attention maps are pooled to this many cells per side, so that stages of different resolution
    compare."""

    statistics_every: int = 16
    """Exchanges between two measurements of the feature statistics when their weight is 0."""

    exchange_every: int = 1
    """Steps from one exchange to the next; on those between, peers learn from the labels alone (codistillation: from
    its copies too, which --stale-steps refreshes). For slow networks between distant workers: less is sent, and less is
    learnt from each other."""

    exchange_dtype: Literal["float32", "bf16"] = "float32"
    """What travels in the exchange. bf16 halves the bytes and rounds what peers hear to about three digits, which is
    worth it when the exchange is limited by bandwidth (many classes, large batches, slow networks), not on one
    machine. For up to 256 peers."""

    def __post_init__(self) -> None:
        _at_least_zero("--kd-weight", self.kd_weight)
        _at_least_zero("--kd-burn-in-epochs", self.kd_burn_in_epochs)
        if self.kd_warmup_epochs is not None:
            _at_least_zero("--kd-warmup-epochs", self.kd_warmup_epochs)
        _at_least_zero("--statistics-weight", self.statistics_weight)
        _positive("--temperature", self.temperature, example=3)
        _positive("--contrast-temperature", self.contrast_temperature, example=0.1)
        contrasts = {name: getattr(self, name) for name in _CONTRASTS}
        for name, weight in contrasts.items():
            _at_least_zero(f"--{name.replace('_', '-')}", weight)
        if self.distiller == "mcl" and not any(contrasts.values()):
            raise ConfigError("--distiller mcl has nothing to learn with all its weights 0; try --soft-icl-weight 1")
        if self.stale_steps < 1:
            raise ConfigError(f"--stale-steps must be at least 1, not {self.stale_steps}; with 1 copies are never old")
        if self.projection_dim is not None and self.projection_dim < 1:
            raise ConfigError(f"--projection-dim must be at least 1, not {self.projection_dim}")
        _at_least_zero("--dkd-alpha", self.dkd_alpha)
        _at_least_zero("--dkd-beta", self.dkd_beta)
        if self.divergence == "dkd" and self.distiller in ("none", "dml", "okddip", "mcl"):
            raise ConfigError(
                f"--divergence dkd needs a teacher that all peers share, and --distiller {self.distiller} has none; "
                "choose for example --distiller ensemble, or --divergence kl"
            )
        if self.statistics_weight > 0 and self.statistics == "none":
            raise ConfigError(
                f"--statistics-weight {self.statistics_weight} has nothing to weigh with --statistics none; "
                "choose --statistics attention or --statistics similarity, or set --statistics-weight 0"
            )
        if self.statistics_grid < 2:
            raise ConfigError(
                f"--statistics-grid must be at least 2, not {self.statistics_grid}: "
                "a map of one cell looks the same for every peer"
            )
        if self.statistics_every < 1:
            raise ConfigError(
                f"--statistics-every must be at least 1 step, not {self.statistics_every}; "
                "use --statistics none to measure no statistics"
            )
        if self.exchange_every < 1:
            raise ConfigError(
                f"--exchange-every must be at least 1 step, not {self.exchange_every}; "
                "use --distiller none for peers that learn nothing from each other"
            )

    def check(self, peers: int) -> None:
        """Raise ConfigError where what is chosen can't work for ``peers`` peers."""
        if self.distiller == "okddip" and peers < 3:
            raise ConfigError(
                f"--distiller okddip needs at least three --peers, not {peers}: the last one leads, "
                "and the others learn from each other; add a peer, or use --distiller dml"
            )
        if self.disjoint_data and self.distiller not in ("none", "codistillation"):
            raise ConfigError(
                f"--disjoint-data: --distiller {self.distiller} compares what peers say of the same images; "
                "use --distiller codistillation, or none"
            )
        if self.disjoint_data and self.statistics != "none":
            raise ConfigError(
                "--disjoint-data: feature statistics compare how peers look at the same images; use --statistics none"
            )
        if self.distiller != "none" and peers < 2:
            raise ConfigError(
                f"--distiller {self.distiller} needs at least two --peers, there is one: "
                "add a peer, or train it alone with --distiller none"
            )
        if self.exchange_dtype == "bf16" and peers > MAX_PEERS_IN_BF16:
            raise ConfigError(
                f"--exchange-dtype bf16 can count up to {MAX_PEERS_IN_BF16} peers, there are {peers}: "
                "use --exchange-dtype float32"
            )


def _positive(option: str, value: float, *, example: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{option} must be a positive number, not {value}; try {option} {example}")


def _at_least_zero(option: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{option} must be a number of at least 0, not {value}")


def kd_ramp(config: DistillConfig, epoch_progress: float, epochs: int) -> float:
    """The factor in [0, 1] on ``kd_weight`` after ``epoch_progress`` of ``epochs`` epochs (fractions count).

    Zero for ``kd_burn_in_epochs``, then linear over ``kd_warmup_epochs`` (None: a quarter of ``epochs``), then 1.
    """
    if epoch_progress < config.kd_burn_in_epochs:
        return 0.0
    warmup = WARMUP_SHARE * epochs if config.kd_warmup_epochs is None else config.kd_warmup_epochs
    return 1.0 if warmup == 0 else min(1.0, (epoch_progress - config.kd_burn_in_epochs) / warmup)


def exchanges_statistics(config: DistillConfig, step: int) -> bool:
    """Whether the exchange at this step of an epoch carries feature statistics: always when they are in the loss, else
    now and then."""
    if config.statistics == "none":
        return False
    return config.statistics_weight > 0 or step // config.exchange_every % config.statistics_every == 0


def tells_weights(config: DistillConfig, step: int, kd_weight: float) -> bool:
    """Whether codistillation's peers tell each other their weights at this step of the training (from 0): every
    ``stale_steps``, once the others count. ``kd_weight`` is that of the step, ramp included."""
    return step > 0 and step % config.stale_steps == 0 and kd_weight > 0


def needs_validation(config: DistillConfig) -> bool:
    """Whether the distiller asks how good the peers are on images held out from training."""
    return config.distiller == "kdcl-general"
