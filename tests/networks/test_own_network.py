"""The user's own network: found, understood, checked, and left as it was."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metamixer_ray.errors import ConfigError
from metamixer_ray.networks import NetworkConfig, StagedNetwork, build_network

SOURCE = '''
import torch
from torch import nn
from metamixer_ray.networks import NetworkConfig, StagedNetwork, build_network


class Net(nn.Module):
    """Children out of order, one shared, one unused, one without parameters."""

    def __init__(self, classes):
        super().__init__()
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.shared = nn.Conv2d(8, 8, 1)
        self.unused = nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        x = self.drop(torch.relu_(self.first(x))) + torch.rand(())
        return self.head(self.shared(self.shared(self.second(x))).mean((2, 3)))


def net(classes, image_size):
    assert image_size == 12
    return Net(classes)


def net_with_stages(*, classes, **others):
    network = Net(classes)
    network.stage_names = ["first", "second"]
    return network


def tokens(classes, depth=2):
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(depth)]
    body = [nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), Transpose(), *layers, Mean(), nn.Linear(8, classes)]
    return nn.Sequential(nn.Sequential(*body))


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def staged(classes, image_size):
    return build_network("resnet8", classes=classes, image_size=image_size, config=NetworkConfig())


def linear(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, classes))


def wrong_classes(classes):
    return Net(classes + 1)


def a_tuple(classes):
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), x
    return Pair(classes)


def broken(classes):
    class Broken(Net):
        def forward(self, x):
            raise KeyError("lost")
    return Broken(classes)


def fails(classes):
    raise OSError("no such weights")


def a_dict(classes):
    return {}


def no_arguments():
    return Net(10)


def one_more(classes, width):
    return Net(classes)


number = 3
'''


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "users_nets.py").write_text(SOURCE)
    (tmp_path / "users_broken.py").write_text("import a_module_that_is_nowhere\n")
    (tmp_path / "users_syntax.py").write_text("def net(:\n")
    monkeypatch.chdir(tmp_path)
    here = str(Path.cwd())
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", here)])
    yield
    for name in ("users_nets", "users_broken", "users_syntax"):
        sys.modules.pop(name, None)


def build(name: str, **options: object) -> StagedNetwork:
    torch.manual_seed(0)
    return build_network(name, classes=4, image_size=12, config=NetworkConfig(**options))


def test_stages_are_found_in_the_order_they_run() -> None:
    network = build("users_nets:net")
    assert network.stage_names == ("first", "second"), "without the head, the shared and the unused child"
    assert network(torch.rand(3, 3, 12, 12)).shape == (3, 4)


def test_declared_and_given_stages() -> None:
    assert build("users_nets:net_with_stages").stage_names == ("first", "second")
    assert build("users_nets:net", stage_names=("first.0", "second")).stage_names == ("first.0", "second")
    assert build("users_nets:net_with_stages", stage_names=("second",)).stage_names == ("second",)
    scoped = ("users_nets:net/second", "resnet8/stage1")
    assert build("users_nets:net", stage_names=scoped).stage_names == ("second",)
    assert build("users_nets:net_with_stages", stage_names=scoped).stage_names == ("first", "second")


def test_taps_and_overwritten_features() -> None:
    network = build("users_nets:net")
    seen: list[Tensor] = []

    def look(features: Tensor) -> Tensor:
        seen.append(features)
        return features

    logits = network(torch.rand(3, 3, 12, 12), {1: look})
    (logits.sum() + seen[0].square().mean()).backward()
    assert (seen[0] < 0).any(), "relu_ after the stage must not reach what the tap has kept"


def test_token_sequences() -> None:
    network = build("users_nets:tokens")
    assert network.layouts == ("BCHW", "BNC", "BNC")
    assert network.stage_names == ("0.0", "0.3", "0.4")
    mixed = network(torch.rand(2, 3, 12, 12), {2: lambda x: x.flip(0)})
    assert mixed.shape == (2, 4)


def test_a_staged_network_keeps_its_stages() -> None:
    network = build("users_nets:staged")
    assert network.stage_names == ("stage1", "stage2", "stage3")
    assert not isinstance(network.network, StagedNetwork)


def test_the_dry_run_leaves_no_trace() -> None:
    network = build("users_nets:net")
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    sys.modules["users_nets"].net(4, 12)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert network.network.calls == 0
    assert network.network.first[1].num_batches_tracked == 0
    assert all(child.training for child in network.modules())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_at_all:net", r"can't import 'nowhere_at_all'.*working directory"),
        (
            "users_broken:net",
            r"can't import 'users_broken' \(ModuleNotFoundError: .*a_module_that_is_nowhere",
        ),
        ("users_syntax:net", r"can't import 'users_syntax' \(SyntaxError"),
        ("users_nets:nett", r"has no function 'nett'\. Did you mean users_nets:net\?"),
        ("users_nets:number", r"has no function 'number'"),
        ("users_nets:", r"write MODULE:FUNCTION"),
        (":net", r"write MODULE:FUNCTION"),
        ("users_nets:a_dict", r"gave a dict, not a torch.nn.Module"),
        ("users_nets:no_arguments", r"must be callable as f\(classes=\.\.\., image_size=\.\.\.\)"),
        ("users_nets:one_more", r"must be callable as .*\(classes, width\)"),
        ("users_nets:wrong_classes", r"shape \[2, 5\], and logits have \[2, 4\]"),
        ("users_nets:a_tuple", r"gives a tuple, not one tensor"),
        ("users_nets:broken", r"don't go through it \(KeyError: 'lost'\)"),
        ("users_nets:linear", r"no stages found.*--stage-names"),
    ],
)
def test_errors_name_the_peer_and_the_cause(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)--peers {name}: .*{message}"):
        build(name)


@pytest.mark.parametrize(
    ("stage_names", "message"),
    [
        (("third",), r"'third' is no sub-module of Net; its direct ones are second, first"),
        (("shared",), r"'shared' of users_nets:net runs 2 times"),
        (("unused",), r"'unused' of users_nets:net runs 0 times"),
        (("second", "first"), r"run in the order first second"),
    ],
)
def test_stages_that_cannot_be(stage_names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"--stage-names: .*{message}"):
        build("users_nets:net", stage_names=stage_names)


def test_the_function_s_own_error_comes_through() -> None:
    with pytest.raises(OSError, match="no such weights") as caught:
        build("users_nets:fails")
    assert caught.value.__notes__ == ["while building the network of --peers users_nets:fails"]
