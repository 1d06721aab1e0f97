"""The Ray cluster on Kubernetes, and the jobs that bring one: what Ray, its autoscaler and the program make of them."""

from pathlib import Path
from typing import Any

import pytest
from ray._private import ray_constants
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.dashboard.modules.job.job_supervisor import JobSupervisor

from metamixer_ray.capacity import Node
from metamixer_ray.cli import parse
from metamixer_ray.growth import NodeType
from metamixer_ray.growth import parse as parse_growth
from metamixer_ray.placement import selectors
from metamixer_ray.runs import open_run, write_run
from metamixer_ray.sweeps.engine import MEMORY_SHARE, TRIAL_BYTES
from tests.cluster.image import pinned
from tests.cluster.kustomize import Object
from tests.cluster.manifests import (
    CLOUDS,
    JOBS,
    LOGIN,
    amount,
    command,
    mounted,
    one,
    ray_nodes,
    read_sweep,
    rendered,
    settings,
    variables,
)

# What is larger when it is decoded is streamed, see --streaming.
LARGEST_CACHE = 32e9


@pytest.fixture(params=CLOUDS)
def cluster(request: pytest.FixtureRequest) -> Object:
    return one(rendered("raycluster", request.param), "RayCluster")["spec"]


def autoscaled(cluster: Object) -> dict[str, Any]:
    """The groups as Ray's autoscaler reads them, by name."""
    resource = {"metadata": {"name": "metamixer", "namespace": "default"}, "spec": cluster}
    return _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]


def test_it_is_of_the_images_ray_and_asks_for_a_token(cluster: Object) -> None:
    assert cluster["rayVersion"] == str(pinned()["ray"])
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"


def test_no_worker_lands_on_the_head_and_there_are_none_at_first(cluster: Object) -> None:
    groups = autoscaled(cluster)
    head = groups.pop("headgroup")["resources"]
    assert head["CPU"] == 0
    assert "GPU" not in head
    assert groups.keys() == {"l4", "t4"}
    for name, group in groups.items():
        assert group["min_workers"] == 0 < group["max_workers"]
        assert group["resources"]["GPU"] == 1
        assert group["labels"] == {"accelerator-type": name.upper()}
    assert all(group["replicas"] == 0 for group in cluster["workerGroupSpecs"])


def test_the_driver_is_told_of_just_the_groups_there_are(cluster: Object) -> None:
    groups = autoscaled(cluster)
    del groups["headgroup"]
    told = [parse_growth(text, "METAMIXER_GROWS_TO") for text in settings()["METAMIXER_GROWS_TO"].split()]
    assert told == [
        NodeType(
            group["max_workers"],
            Node(cpus=group["resources"]["CPU"], gpus=group["resources"]["GPU"], labels=group["labels"]),
        )
        for group in groups.values()
    ]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_each_group_goes_to_spot_nodes_with_its_accelerator(cloud: str) -> None:
    spec = one(rendered("raycluster", cloud), "RayCluster")["spec"]
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
        (_, accelerator), market = pod["nodeSelector"].items()
        assert accelerator.rpartition("-")[2] == group["groupName"]
        if cloud == "gke":
            assert market == ("cloud.google.com/gke-spot", "true")
            taint = {"key": market[0], "operator": "Equal", "value": market[1], "effect": "NoSchedule"}
            assert taint in pod["tolerations"]
        else:
            assert market == ("karpenter.sh/capacity-type", "spot")


def test_the_head_goes_to_no_spot_node() -> None:
    gke, eks = (
        one(rendered("raycluster", cloud), "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]
        for cloud in CLOUDS
    )
    required = gke["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = required["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "cloud.google.com/gke-spot", "operator": "DoesNotExist"}]
    assert eks["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    assert "tolerations" not in gke | eks


def test_shared_memory_holds_the_object_store_and_is_within_the_containers_memory(cluster: Object) -> None:
    for group, pod, container in ray_nodes(cluster):
        shared = mounted(pod, container, "/dev/shm")
        assert shared["medium"] == "Memory"
        # Ray takes a folder on the disk where the store doesn't fit; the rest is for loaders and NCCL.
        assert int(group["rayStartParams"]["object-store-memory"]) <= amount(shared["sizeLimit"]) / 2
        assert amount(shared["sizeLimit"]) <= amount(container["resources"]["limits"]["memory"]) / 2


def test_every_node_has_a_disk_for_what_is_decoded(cluster: Object) -> None:
    for _, pod, container in ray_nodes(cluster):
        disk = mounted(pod, container, settings()["METAMIXER_CACHE"])
        assert "medium" not in disk
        assert amount(disk["sizeLimit"]) > LARGEST_CACHE
        assert amount(disk["sizeLimit"]) < amount(container["resources"]["requests"]["ephemeral-storage"])


def test_every_node_has_the_settings_and_may_use_the_bucket(cluster: Object) -> None:
    for _, pod, container in ray_nodes(cluster):
        assert pod["serviceAccountName"] == one(rendered("raycluster"), "ServiceAccount")["metadata"]["name"]
        config, keys, *login = container["envFrom"]
        assert config["configMapRef"]["name"] == one(rendered("raycluster"), "ConfigMap")["metadata"]["name"]
        assert keys["secretRef"]["optional"] is True
        # Drivers, which are on the head, log in at the tracking server.
        head = container["name"] == "ray-head"
        assert login == ([{"secretRef": {"name": LOGIN, "optional": True}}] if head else [])


def test_nodes_are_asked_how_they_are_where_no_token_is_needed(cluster: Object) -> None:
    for _, _, container in ray_nodes(cluster):
        for probe in (container["livenessProbe"], container["readinessProbe"]):
            assert probe["httpGet"]["path"] in PUBLIC_EXACT_PATHS
            assert probe["httpGet"]["port"] == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


def test_only_the_ports_that_are_needed_are_open(cluster: Object) -> None:
    head = cluster["headGroupSpec"]
    ports = {port["name"]: port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {"gcs": 6379, "dashboard": 8265, "metrics": 8080}
    # Without these, KubeRay's service for the head is a ClusterIP.
    assert not head.keys() & {"serviceType", "enableIngress", "headService"}


def test_nodes_and_drivers_have_time_to_end(cluster: Object) -> None:
    (_, head, driver), *workers = ray_nodes(cluster)
    wait = variables(driver)["RAY_JOB_STOP_WAIT_TIME_S"]
    assert JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S < int(wait) < head["terminationGracePeriodSeconds"]
    for _, pod, container in workers:
        drain = float(variables(container)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S <= drain < pod["terminationGracePeriodSeconds"]


def test_the_heads_memory_holds_as_many_trials_as_the_workers_train(cluster: Object) -> None:
    pod = cluster["headGroupSpec"]["template"]["spec"]
    (head,) = pod["containers"]
    free = amount(head["resources"]["limits"]["memory"]) - amount(mounted(pod, head, "/dev/shm")["sizeLimit"])
    gpus = sum(group["maxReplicas"] for group in cluster["workerGroupSpecs"])
    peers = len(read_sweep(command("sweep")[1]).training.peers)
    assert gpus // peers * TRIAL_BYTES <= MEMORY_SHARE * free


def test_the_training_is_one_that_the_cluster_holds_and_a_further_attempt_goes_on_with_it(
    cluster: Object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, words = command("train")
    assert module == "metamixer_ray.train"
    config = parse(words, program="train", description="")
    labels = [group["labels"] for group in cluster["workerGroupSpecs"]]
    assert len(config.placement.peer_labels) == len(config.peers) == 2
    assert all(wanted in labels for wanted in selectors(config.placement.peer_labels))
    monkeypatch.setenv("METAMIXER_STORAGE", str(tmp_path))
    first = open_run(config)
    assert first.new
    write_run(first.folder, config, {"key": first.key})
    again = open_run(config)
    assert (again.new, again.key) == (False, first.key)


def test_the_sweep_is_one_that_a_further_attempt_goes_on_with() -> None:
    module, words = command("sweep")
    assert module == "metamixer_ray.tune"
    config = read_sweep(words)
    assert config.space == ("tune_spaces.mixing",)
    assert config.training.precision == "float32"
    assert config.training.run.resume_or_start
    assert config.training.run.name


@pytest.mark.parametrize("option", ["--peer-label", "--sample"])
def test_a_misspelt_option_would_be_found(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_sweep([option, "2"])
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("job", JOBS)
def test_jobs_end_and_take_their_clusters_with_them(job: str) -> None:
    spec = one(rendered(job), "RayJob")["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] <= 600
    assert 3600 <= spec["activeDeadlineSeconds"] <= 7 * 24 * 3600
    assert spec["backoffLimit"] >= 1
    assert "suspend" not in spec
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("job", JOBS)
def test_in_a_queue_a_job_waits_to_be_started(job: str) -> None:
    queued = one(rendered(job, queued=True), "RayJob")
    assert queued["spec"].pop("suspend") is True
    assert queued["metadata"].pop("labels") == {"kueue.x-k8s.io/queue-name": "metamixer"}
    assert queued["metadata"].pop("annotations") == {"kueue.x-k8s.io/elastic-job": "true"}
    assert queued == one(rendered(job), "RayJob")
