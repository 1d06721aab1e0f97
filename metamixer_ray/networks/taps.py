"""Taps: functions applied to what flows between two stages of a network, by stage number (0: the images)."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from metamixer_ray.networks.staged import Tap


def keep_features(features: dict[int, Tensor], stages: Sequence[int]) -> dict[int, Tap]:
    """Taps that put what flows out of ``stages`` into ``features`` and let it pass unchanged."""

    def keeper(stage: int) -> Tap:
        def keep(x: Tensor) -> Tensor:
            features[stage] = x
            return x

        return keep

    return {stage: keeper(stage) for stage in stages}


def join_taps(first: Mapping[int, Tap], second: Mapping[int, Tap]) -> dict[int, Tap]:
    """At each stage the first tap, then the second."""

    def both(a: Tap, b: Tap) -> Tap:
        return lambda x: b(a(x))

    return {**first, **{k: both(first[k], tap) if k in first else tap for k, tap in second.items()}}
