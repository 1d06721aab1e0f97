"""Seeds: what a network draws depends on its own alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamixer_ray.randomness import seed_torch, torch_seed


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(0, 1000))
def test_a_seeded_network_draws_what_torch_would(seed: int, epoch: int, step: int) -> None:
    number = torch_seed(seed, "network", epoch, step)
    torch.manual_seed(number)
    expected = torch.nn.functional.dropout(torch.ones(64))
    torch.rand(7)
    seed_torch(number, torch.device("cpu"))
    assert torch.equal(torch.nn.functional.dropout(torch.ones(64)), expected)
    assert number != torch_seed(seed, "network", epoch, step + 1)
