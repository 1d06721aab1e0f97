"""The launcher's files: what Ray and its providers make of them, and that nothing is open that needn't be."""

import copy
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.gcp.config import get_node_type
from ray.autoscaler._private.gcp.node import GCPNodeType
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from metamixer_ray.capacity import Node
from metamixer_ray.growth import NodeType, launched
from metamixer_ray.runs import STORAGE_VARIABLE

ROOT = Path(__file__).parents[2]
FILES = ("aws", "gcp")
SECRETS = (".ray/auth_token", ".mlflow/credentials")
"""In home folders, a laptop's and the nodes'."""
PLACEHOLDERS = {
    "aws": {"REGISTRY", "BUCKET", "MLFLOW_HOST", "AMI"},
    "gcp": {"REGISTRY", "BUCKET", "MLFLOW_HOST", "PROJECT", "IMAGE_FAMILY"},
}
Config = dict[str, Any]


def read(name: str) -> Config:
    config: Config = yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())
    return config


@pytest.fixture(params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(name: str) -> Config:
    """As Ray fills it in before it starts anything."""
    prepared: Config = prepare_config(read(name))
    validate_config(prepared)
    return prepared


def workers(config: Config) -> dict[str, Config]:
    return {key: kind for key, kind in config["available_node_types"].items() if key != config["head_node_type"]}


def variables(config: Config) -> dict[str, str]:
    options = [option.removeprefix("--env=") for option in config["docker"]["run_options"] if "--env=" in option]
    return dict(option.split("=", 1) for option in options)


def test_ray_takes_it_and_a_misspelt_field_would_be_refused(name: str, config: Config) -> None:
    assert config["provider"]["type"] == name
    wrong = {**config, "idle_timeout_minuets": 5}
    with pytest.raises(Exception, match="idle_timeout_minuets"):
        validate_config(wrong)


def test_what_is_to_be_filled_in_is_named_at_the_top(name: str) -> None:
    text = (ROOT / "cluster" / f"{name}.yaml").read_text()
    head, _, body = text.partition("cluster_name:")
    body = re.sub(r"#.*", "", body)
    found = set(re.findall(r"\b(?<!\$)[A-Z][A-Z_]{2,}\b", body))
    known = {"CPU", "GPU", "SPOT", "PERSISTENT", "DELETE", "TERMINATE", *re.findall(r"--env=(\w+)=", body)}
    assert found - known - {"RAY_HEAD_IP"} == PLACEHOLDERS[name]
    assert all(re.search(rf"\b{word}\b", head) for word in PLACEHOLDERS[name])


def test_the_head_trains_nothing_and_stays_and_gpus_are_spot_and_none_at_first(name: str, config: Config) -> None:
    head = config["available_node_types"]["head"]
    assert head["resources"]["CPU"] == 0
    assert "GPU" not in head["resources"]
    assert not {"InstanceMarketOptions", "scheduling", "guestAccelerators"} & head["node_config"].keys()
    assert workers(config).keys() == {"l4", "t4"}
    for kind in workers(config).values():
        assert kind["min_workers"] == 0 < kind["max_workers"] <= config["max_workers"]
        node = kind["node_config"]
        if name == "aws":
            assert node["InstanceMarketOptions"] == {"MarketType": "spot"}
        else:
            assert node["scheduling"]["provisioningModel"] == "SPOT"
            # Google moves no machine with a GPU to another host.
            assert node["scheduling"]["onHostMaintenance"] == "TERMINATE"
    assert 1 <= config["idle_timeout_minutes"] <= 30


def test_the_autoscaler_gives_the_labels_by_which_peers_are_placed(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # It reads the files that are to be on every node.
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in SECRETS:
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).touch()
    scaling = AutoscalingConfig({**config, "auth": {}})
    for key in workers(config):
        assert scaling.get_node_labels(key) == {"accelerator-type": key.upper()}


def test_a_driver_on_the_head_knows_what_may_come(config: Config, tmp_path: Path) -> None:
    # What `ray up` leaves on the head.
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    growth = launched(tmp_path / "ray_bootstrap_config.yaml")
    assert growth.most == config["max_workers"]
    assert growth.types == tuple(
        NodeType(8, Node(cpus=8, gpus=1, labels={"accelerator-type": kind})) for kind in ("L4", "T4")
    )


def test_all_nodes_know_where_runs_go_ask_for_the_token_and_have_a_login(name: str, config: Config) -> None:
    told = variables(config)
    assert told[STORAGE_VARIABLE].partition("://")[0] == {"aws": "s3", "gcp": "gs"}[name]
    assert told["MLFLOW_TRACKING_URI"].startswith("http://")
    assert told["RAY_AUTH_MODE"] == "token"
    assert int(told["RAY_JOB_STOP_WAIT_TIME_S"]) > 3
    assert config["file_mounts"] == {f"/home/ray/{place}": f"~/{place}" for place in SECRETS}
    assert not [key for key in told if re.search(r"SECRET|PASSWORD|ACCESS_KEY|TOKEN$", key)]


def test_dashboard_and_jobs_are_reached_through_ssh_only(config: Config) -> None:
    (start,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert not re.search(r"client-server|0\.0\.0\.0", start)


def test_the_image_is_the_projects() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {read(name)["docker"]["image"] for name in FILES} == {f"REGISTRY/metamixer-ray:{version}"}


def test_google_takes_the_nodes_for_machines() -> None:
    for kind in read("gcp")["available_node_types"].values():
        assert get_node_type(kind["node_config"]) == GCPNodeType.COMPUTE


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Config]:
    """The file for AWS as Ray's own code completes it, with a local stand-in for AWS."""
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    with mock_aws():
        config = prepare_config(read("aws"))
        for profile in ("metamixer-head", "metamixer-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
        completed: Config = aws.bootstrap_aws(copy.deepcopy(config))
        yield completed


def test_aws_gets_what_the_file_says(cloud: Config) -> None:
    for key, kind in cloud["available_node_types"].items():
        node = kind["node_config"]
        assert node["IamInstanceProfile"] == {"Name": "metamixer-head" if key == "head" else "metamixer-worker"}
        assert node["SubnetIds"]
        assert node["ImageId"] == "AMI"
        assert node["KeyName"]


def test_from_outside_aws_lets_in_ssh_alone(cloud: Config) -> None:
    (group,) = {sg for kind in cloud["available_node_types"].values() for sg in kind["node_config"]["SecurityGroupIds"]}
    rules = boto3.resource("ec2", region_name="us-west-2").SecurityGroup(group).ip_permissions
    outside = [rule for rule in rules if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert [(rule["FromPort"], rule["ToPort"], rule["IpProtocol"]) for rule in outside] == [(22, 22, "tcp")]
    inside = [rule for rule in rules if rule not in outside]
    assert [pair["GroupId"] for rule in inside for pair in rule["UserIdGroupPairs"]] == [group]
