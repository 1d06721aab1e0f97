"""Control: what the sum of everyone's floats tells."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metamixer_ray.distill.control import (
    CONTROL_FLOATS,
    Control,
    PeersDrifted,
    decode_control,
    encode_control,
    step_modulus,
)


def summed(controls: list[Control]) -> list[float]:
    """What an all_reduce in float32 gives."""
    peers = len(controls)
    rows = [
        [*encode_control(control, peers), control.nonfinite, control.nonfinite * (index + 1)]
        for index, control in enumerate(controls)
    ]
    total = np.zeros(CONTROL_FLOATS, dtype=np.float32)
    for row in rows:
        total += np.asarray(row, dtype=np.float32)
    return [float(value) for value in total]


@given(
    step=st.integers(0, 10**9),
    flags=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=64),
)
def test_counts_are_exact_and_a_single_culprit_is_named(step: int, flags: list[tuple[bool, bool, bool]]) -> None:
    controls = [Control(step=step, nonfinite=n, wish_checkpoint=c, wish_stop=s) for n, c, s in flags]
    total = decode_control(summed(controls), len(controls), step)
    spoiled = [index for index, flag in enumerate(flags) if flag[0]]
    assert total.peers == len(flags)
    assert total.nonfinite == len(spoiled)
    assert total.culprit == (spoiled[0] if len(spoiled) == 1 else None)
    assert total.wish_checkpoint == sum(flag[1] for flag in flags)
    assert total.wish_stop == sum(flag[2] for flag in flags)


@given(
    peers=st.integers(2, 300),
    step=st.integers(0, 10**9),
    drifts=st.dictionaries(st.integers(0, 299), st.integers(-1000, 1000), min_size=1),
)
def test_any_drift_within_the_modulus_is_found(peers: int, step: int, drifts: dict[int, int]) -> None:
    modulus = step_modulus(peers)
    steps = [max(0, step + drifts.get(index, 0)) for index in range(peers)]
    controls = [Control(step=own) for own in steps]
    if len({own % modulus for own in steps}) == 1:
        assert decode_control(summed(controls), peers, steps[0]).peers == peers
    else:
        with pytest.raises(PeersDrifted, match="different steps"):
            decode_control(summed(controls), peers, steps[0])


@pytest.mark.parametrize(("peers", "modulus"), [(1, 1024), (2, 1024), (16, 1024), (17, 993), (4096, 64)])
def test_modulus_keeps_squares_exact(peers: int, modulus: int) -> None:
    assert step_modulus(peers) == modulus
    assert peers * (modulus - 1) ** 2 < 2**24
