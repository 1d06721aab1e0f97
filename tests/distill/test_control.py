"""Control: what the sum of everyone's floats tells."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metamixer_ray.distill.control import (
    MAX_PEERS_IN_BF16,
    STEP_BITS,
    Control,
    PeersDrifted,
    decode_control,
    encode_control,
)


def summed(controls: list[Control], dtype: torch.dtype = torch.float32) -> list[float]:
    """What an all_reduce in ``dtype`` gives."""
    rows = [
        [*encode_control(control), control.nonfinite, control.nonfinite * (index + 1)]
        for index, control in enumerate(controls)
    ]
    total = torch.zeros(len(rows[0]), dtype=dtype)
    for row in rows:
        total += torch.tensor(row, dtype=dtype)
    return [float(value) for value in total]


DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@given(
    dtype=DTYPES,
    step=st.integers(0, 10**9),
    flags=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=64),
)
def test_counts_are_exact_and_a_single_culprit_is_named(
    dtype: torch.dtype, step: int, flags: list[tuple[bool, bool, bool]]
) -> None:
    controls = [Control(step=step, nonfinite=n, wish_checkpoint=c, wish_stop=s) for n, c, s in flags]
    total = decode_control(summed(controls, dtype), len(controls), step)
    spoiled = [index for index, flag in enumerate(flags) if flag[0]]
    assert total.peers == len(flags)
    assert total.nonfinite == len(spoiled)
    assert total.culprit == (spoiled[0] if len(spoiled) == 1 else None)
    assert total.wish_checkpoint == sum(flag[1] for flag in flags)
    assert total.wish_stop == sum(flag[2] for flag in flags)


@given(
    dtype=DTYPES,
    peers=st.integers(2, MAX_PEERS_IN_BF16),
    step=st.integers(0, 10**9),
    drifts=st.dictionaries(st.integers(0, MAX_PEERS_IN_BF16 - 1), st.integers(-1000, 1000), min_size=1),
)
def test_any_drift_within_the_modulus_is_found(
    dtype: torch.dtype, peers: int, step: int, drifts: dict[int, int]
) -> None:
    steps = [max(0, step + drifts.get(index, 0)) for index in range(peers)]
    total = summed([Control(step=own) for own in steps], dtype)
    if len({own % 2**STEP_BITS for own in steps}) == 1:
        assert decode_control(total, peers, steps[0]).peers == peers
    else:
        with pytest.raises(PeersDrifted, match="different steps"):
            decode_control(total, peers, steps[0])


def test_a_whole_drift_of_many_peers_is_found_in_float32() -> None:
    controls = [Control(step=7)] * 4095 + [Control(step=8)]
    with pytest.raises(PeersDrifted):
        decode_control(summed(controls), 4096, 7)
