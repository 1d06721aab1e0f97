"""Taps: what they see and change, and that a network is none the worse for having them."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from metamixer_ray.errors import ConfigError
from metamixer_ray.networks import NetworkConfig, StagedNetwork, build_network, common_stages


@pytest.fixture
def network() -> StagedNetwork:
    torch.manual_seed(0)
    return build_network("resnet8", classes=10, image_size=16, config=NetworkConfig())


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Mix:
    """A tap that mixes every row with the next one and keeps what it was given."""

    def __init__(self, kept: float) -> None:
        self.kept = kept
        self.seen: list[Tensor] = []

    def __call__(self, features: Tensor) -> Tensor:
        self.seen.append(features)
        return self.kept * features + (1 - self.kept) * features.roll(1, 0)


def by_hand(network: StagedNetwork, images: Tensor, taps: dict[int, Mix]) -> Tensor:
    def tapped(stage: int, features: Tensor) -> Tensor:
        return taps[stage](features) if stage in taps else features

    inner = network.network
    out = F.relu(inner.bn(inner.conv(tapped(0, images))))
    out = tapped(1, inner.stage1(out))
    out = tapped(2, inner.stage2(out))
    out = tapped(3, inner.stage3(out))
    return inner.fc(F.avg_pool2d(out, out.shape[-1]).flatten(1))


@pytest.mark.parametrize("stages", [(0,), (1,), (2,), (3,), (0, 2), (0, 1, 2, 3), ()])
def test_taps_equal_surgery_by_hand(network: StagedNetwork, images: Tensor, stages: tuple[int, ...]) -> None:
    twin = copy.deepcopy(network)
    mixes = [{stage: Mix(0.3 + 0.1 * stage) for stage in stages} for _ in range(2)]
    ours, theirs = network(images, mixes[0]), by_hand(twin, images, mixes[1])
    assert torch.equal(ours, theirs)
    for stage in stages:
        assert torch.equal(mixes[0][stage].seen[0], mixes[1][stage].seen[0])
    gradients = [
        torch.autograd.grad(out.square().sum(), list(net.parameters()))
        for out, net in ((ours, network), (theirs, twin))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradients_flow_through_what_a_tap_returns(network: StagedNetwork, images: Tensor) -> None:
    factor = torch.tensor(0.5, requires_grad=True)
    network(images, {2: lambda features: features * factor}).square().sum().backward()
    assert factor.grad is not None
    assert factor.grad.abs() > 0
    assert network.network.conv.weight.grad.abs().sum() > 0


def test_features_of_a_tap_can_be_in_the_loss(network: StagedNetwork, images: Tensor) -> None:
    mixes = {stage: Mix(1.0) for stage in (1, 2, 3)}
    logits = network(images, mixes)
    (logits.sum() + sum(mix.seen[0].square().mean() for mix in mixes.values())).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_taps_hold_for_one_call_only(network: StagedNetwork, images: Tensor) -> None:
    network.eval()
    plain = network(images)
    mix = Mix(0.3)
    assert not torch.equal(network(images, {1: mix}), plain)
    assert torch.equal(network(images), plain)
    assert torch.equal(network.network(images), plain)
    assert len(mix.seen) == 1


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_taps_are_gone_after_an_exception(network: StagedNetwork, images: Tensor, stage: int) -> None:
    network.eval()
    plain = network(images)

    def fail(features: Tensor) -> Tensor:
        raise RuntimeError("a tap that fails")

    with pytest.raises(RuntimeError, match="a tap that fails"):
        network(images, {stage: fail, 2: Mix(0.5)})
    assert torch.equal(network(images), plain)


def test_a_tap_may_call_the_network(network: StagedNetwork, images: Tensor) -> None:
    network.eval()
    plain = network(images)
    inside: list[Tensor] = []

    def call(features: Tensor) -> Tensor:
        inside.append(network(images))
        return features

    mix, twin_mix = Mix(0.3), Mix(0.3)
    out = network(images, {1: call, 2: mix})
    assert torch.equal(inside[0], plain)
    assert len(mix.seen) == 1
    assert torch.equal(out, network(images, {2: twin_mix}))


@pytest.mark.parametrize("stage", [-1, 4])
def test_a_tap_where_no_stage_is(network: StagedNetwork, images: Tensor, stage: int) -> None:
    with pytest.raises(ValueError, match="stages are 0 to 3"):
        network(images, {stage: Mix(0.5)})


def test_copies_and_pickles_have_taps_of_their_own(network: StagedNetwork, images: Tensor) -> None:
    network.eval()
    expected = network(images, {2: Mix(0.3)})
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        seen: list[Tensor] = []

        def look(features: Tensor, twin: StagedNetwork = twin, seen: list[Tensor] = seen) -> Tensor:
            seen.append(network(images))
            return features

        assert torch.equal(twin(images, {2: Mix(0.3)}), expected)
        twin(images, {1: look})
        assert len(seen) == 1


def test_plain_has_no_hooks_and_shares_nothing(network: StagedNetwork, images: Tensor) -> None:
    network.eval()
    plain = network.plain()
    assert not any(module._forward_hooks for module in plain.modules())
    assert list(plain.state_dict()) == list(network.network.state_dict())
    assert torch.equal(plain(images), network(images))
    with torch.no_grad():
        plain.conv.weight.zero_()
    assert network.network.conv.weight.any()
    mix = Mix(0.3)
    network(images, {1: mix})
    assert len(mix.seen) == 1


def test_export_of_the_network_is_free_of_taps(network: StagedNetwork, images: Tensor) -> None:
    network.eval()
    batch = torch.export.Dim("batch", min=2)
    graphs = []
    for module in (network.plain(), network.network):
        program = torch.export.export(module, (images,), dynamic_shapes=({0: batch},))
        assert torch.equal(program.module()(images[:3]), module(images[:3]))
        graphs.append([node.target for node in program.graph.nodes])
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_with_taps_that_change(network: StagedNetwork, images: Tensor, backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = network.compiled(backend=counter)
    twin = copy.deepcopy(network)
    frames = []
    for step in range(8):
        stage = (None, 0, 1, 3)[step % 4]
        mixes = [None if stage is None else {stage: Mix(0.1 + 0.1 * step)} for _ in range(2)]
        losses = []
        for net, taps in zip((compiled, twin), mixes, strict=True):
            out = net(images, taps)
            losses.append(out.square().sum() + (0 if taps is None else taps[stage].seen[0].square().mean()))
        torch.testing.assert_close(losses[0], losses[1])
        gradients = [
            torch.autograd.grad(loss, list(net.parameters())) for loss, net in zip(losses, (network, twin), strict=True)
        ]
        torch.testing.assert_close(gradients[0], gradients[1])
        frames.append(counter.frame_count)
    assert frames[3] == frames[7], "new taps must not compile the network anew"
    torch.testing.assert_close(network.state_dict(), twin.state_dict())
    torch._dynamo.reset()


def test_compiled_without_taps_is_one_graph(network: StagedNetwork, images: Tensor) -> None:
    torch._dynamo.reset()
    network.eval()
    compiled = network.compiled(backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), network(images))
    torch._dynamo.reset()


def test_autocast(network: StagedNetwork, images: Tensor) -> None:
    mix = Mix(0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(images, {1: mix})
    assert mix.seen[0].dtype == torch.bfloat16
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), network(images, {1: Mix(0.3)}), atol=0.1, rtol=0.1)


def test_distributed_data_parallel(network: StagedNetwork, images: Tensor, tmp_path: Path) -> None:
    twin = copy.deepcopy(network)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(network)
        for stage in (2, 0, 3):
            parallel.zero_grad()
            twin.zero_grad()
            mix = Mix(0.3)
            parallel(images, {stage: mix}).square().sum().backward()
            twin(images, {stage: Mix(0.3)}).square().sum().backward()
            assert len(mix.seen) == 1
            for a, b in zip(network.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad)
    finally:
        dist.destroy_process_group()


def test_what_flows_on_is_copied_where_a_later_layer_overwrites_it() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(2))
    inner(torch.rand(2, 3, 8, 8))
    network = StagedNetwork(inner, ["1"], overwritten=[1])
    mix = Mix(1.0)
    network(torch.rand(4, 3, 8, 8), {1: mix}).sum().backward(retain_graph=True)
    assert (mix.seen[0] < 0).any(), "the ReLU must not reach what the tap has kept"
    mix.seen[0].square().sum().backward()


@pytest.mark.parametrize("names", [("stage1", "layer9"), ("",), ("stage1.conv1",)])
def test_unknown_stage(network: StagedNetwork, names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"--stage-names.*no sub-module.*stage1, stage2, stage3"):
        StagedNetwork(network.plain(), names)


def test_stage_named_twice(network: StagedNetwork) -> None:
    with pytest.raises(ConfigError, match=r"--stage-names: 'stage1' is given twice"):
        StagedNetwork(network.plain(), ["stage1", "stage1"])


def test_layouts_must_fit(network: StagedNetwork) -> None:
    with pytest.raises(ValueError, match="1 layouts for 2 stages"):
        StagedNetwork(network.plain(), ["stage1", "stage2"], layouts=["BCHW"])


def test_common_stages_by_example() -> None:
    assert common_stages([3, 3]) == [[1, 2, 3], [1, 2, 3]]
    assert common_stages([3, 5]) == [[1, 2, 3], [2, 3, 5]]
    assert common_stages([4, 1, 2]) == [[4], [1], [2]]
    assert common_stages([4]) == [[1, 2, 3, 4]]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_common_stages_are_evenly_spread(counts: list[int]) -> None:
    chosen = common_stages(counts)
    shared = min(counts)
    for count, stages in zip(counts, chosen, strict=True):
        gaps = [b - a for a, b in zip([0, *stages], stages, strict=False)]
        assert len(stages) == shared
        assert stages[-1] == count
        assert min(gaps) >= 1
        assert all(abs(gap - count / shared) < 1.0 + 1e-9 for gap in gaps)


@pytest.mark.parametrize("counts", [[], [3, 0]])
def test_common_stages_need_stages(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        common_stages(counts)
