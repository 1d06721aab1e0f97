"""The tracking server on Kubernetes: MLflow's own command line reads its options, and its objects find each other."""

from pathlib import Path
from typing import Any

import mlflow.cli
from mlflow.environment_variables import (
    MLFLOW_AUTH_ADMIN_PASSWORD,
    MLFLOW_AUTH_ADMIN_USERNAME,
    MLFLOW_FLASK_SERVER_SECRET_KEY,
    MLFLOW_TRACKING_PASSWORD,
    MLFLOW_TRACKING_USERNAME,
)
from mlflow.server.auth import is_unprotected_route
from mlflow.server.security_utils import is_allowed_host_header
from mlflow.utils.uri import extract_db_type_from_uri

from tests.cluster.kustomize import Object
from tests.cluster.manifests import LOGIN, one, rendered, settings, variables


def server() -> Object:
    (container,) = one(rendered("mlflow"), "Deployment")["spec"]["template"]["spec"]["containers"]
    return container


def server_options() -> dict[str, Any]:
    """The server's options, as mlflow reads them."""
    program, command, *words = server()["command"]
    assert (program, command) == ("mlflow", "server")
    return mlflow.cli.server.make_context("server", words).params


def test_the_server_keeps_runs_in_postgres_and_files_in_the_bucket() -> None:
    options = server_options()
    assert extract_db_type_from_uri(options["backend_store_uri"]) == "postgresql"
    assert options["backend_store_uri"] == "postgresql+psycopg://mlflow@mlflow-database/mlflow"
    assert options["serve_artifacts"] is True
    assert options["artifacts_destination"] == "$(MLFLOW_ARTIFACTS_DESTINATION)"
    assert options["host"] == "0.0.0.0"
    assert {"PGPASSWORD", "MLFLOW_ARTIFACTS_DESTINATION"} < {variable["name"] for variable in server()["env"]}
    scheme = settings()["METAMIXER_STORAGE"].partition("://")[0]
    assert settings()["MLFLOW_ARTIFACTS_DESTINATION"].partition("://")[0] == scheme == "gs"


def test_the_databases_tables_are_made_before_the_server_starts() -> None:
    (migrate,) = one(rendered("mlflow"), "Deployment")["spec"]["template"]["spec"]["initContainers"]
    program, *words = migrate["command"]
    assert program == "mlflow"
    name, command, rest = mlflow.cli.cli.resolve_command(mlflow.cli.cli.make_context("mlflow", list(words)), words)
    assert (name, rest) == ("db", ["upgrade", server_options()["backend_store_uri"]])
    assert "upgrade" in command.commands
    assert migrate["env"] == server()["env"]


def test_trainings_get_to_the_server_by_its_name_and_others_names_are_refused() -> None:
    uri = settings()["MLFLOW_TRACKING_URI"]
    host = uri.removeprefix("http://")
    allowed = server_options()["allowed_hosts"].split(",")
    assert is_allowed_host_header(allowed, host)
    assert is_allowed_host_header(allowed, "localhost:5000")
    assert not is_allowed_host_header(allowed, "mlflow.example:5000")
    name, _, port = host.partition(":")
    (there,) = one(rendered("mlflow"), "Service", name)["spec"]["ports"]
    assert there["port"] == int(port) == server_options()["port"] == server()["ports"][0]["containerPort"]


def test_the_server_asks_for_the_login_that_trainings_have() -> None:
    assert server_options()["app_name"] == "basic-auth"
    asked = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in server()["env"] if "AUTH" in each["name"]}
    assert asked == {
        admin.name: {"name": LOGIN, "key": training.name}
        for admin, training in (
            (MLFLOW_AUTH_ADMIN_USERNAME, MLFLOW_TRACKING_USERNAME),
            (MLFLOW_AUTH_ADMIN_PASSWORD, MLFLOW_TRACKING_PASSWORD),
        )
    }
    assert MLFLOW_FLASK_SERVER_SECRET_KEY.name in {variable["name"] for variable in server()["env"]}
    # Probes come without one.
    assert is_unprotected_route(server()["livenessProbe"]["httpGet"]["path"])


def test_the_server_and_the_database_are_watched() -> None:
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert server()[probe]["httpGet"] == {"path": "/health", "port": "http"}
    (database,) = one(rendered("mlflow"), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    for probe in ("livenessProbe", "readinessProbe"):
        assert database[probe]["exec"]["command"][0] == "pg_isready"


def test_what_the_database_writes_is_on_its_volume() -> None:
    spec = one(rendered("mlflow"), "StatefulSet")["spec"]
    (claim,), (container,) = spec["volumeClaimTemplates"], spec["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == claim["metadata"]["name"]
    assert Path(mount["mountPath"]) in Path(variables(container)["PGDATA"]).parents


def test_objects_find_each_other_inside_only() -> None:
    objects = rendered("mlflow")
    owners = {"mlflow": one(objects, "Deployment"), "mlflow-database": one(objects, "StatefulSet")}
    for name, owner in owners.items():
        labels = owner["spec"]["template"]["metadata"]["labels"]
        assert owner["spec"]["selector"]["matchLabels"] == labels
        service, policy = one(objects, "Service", name)["spec"], one(objects, "NetworkPolicy", name)["spec"]
        assert (service["type"], service["selector"]) == ("ClusterIP", labels)
        assert policy["podSelector"]["matchLabels"] == labels
        assert policy["ingress"][0]["ports"] == [{"port": service["ports"][0]["targetPort"]}]
    assert owners["mlflow-database"]["spec"]["serviceName"] == "mlflow-database"
    to_database = one(objects, "NetworkPolicy", "mlflow-database")["spec"]["ingress"][0]["from"]
    assert to_database == [{"podSelector": {"matchLabels": {"app": "mlflow"}}}]
