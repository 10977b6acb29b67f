"""The values for the official Dagster chart name only what the chart knows, with the types that it wants.

The chart's own `values.schema.json` cannot be installed from a package registry, so `CHART` below says in our words what it allows in the
sections that we set, read from the schema of November 2026 (the one with `concurrency`). It is stricter: a key that the chart
would ignore in silence is a fault here. Where the chart refers to Kubernetes' definitions, Kubernetes' own schemas are asked. With a copy
of the chart at hand (`helm pull dagster/dagster --untar`), CHART_SCHEMA=dagster/values.schema.json asks the original too.
"""

import json
import os
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

VALUES = Path(__file__).parent.parent.parent / "infra" / "kubernetes" / "values.yaml"
ANY = object()
"""An object that the chart hands on as it stands."""
KUBERNETES = object()
"""Something of Kubernetes' own, checked in a pod below."""
POLICY = ("Always", "IfNotPresent", "Never")
IMAGE = {"repository": str, "tag": (str, int, type(None)), "pullPolicy": POLICY}
CLASS = {"module": str, "class": str, "config": ANY}
POD = dict.fromkeys(("nodeSelector", "affinity", "tolerations", "podSecurityContext", "securityContext", "resources"), KUBERNETES)
POD |= dict.fromkeys(("readinessProbe", "livenessProbe", "startupProbe", "annotations", "labels"), KUBERNETES)
WORLD = dict.fromkeys(("env", "envConfigMaps", "envSecrets", "volumes", "volumeMounts", "schedulerName"), KUBERNETES)
DEPLOYMENT = (
    POD | WORLD | {"name": str, "image": IMAGE, "port": int, "dagsterApiGrpcArgs": [str], "codeServerArgs": [str], "deploymentNamespace": str}
)
DEPLOYMENT |= {
    "deploymentNamespace": str,
    "includeConfigInLaunchedRuns": {"enabled": bool},
    "initContainers": KUBERNETES,
    "sidecarContainers": KUBERNETES,
}
QUEUE = {"maxConcurrentRuns": int, "tagConcurrencyLimits": ANY, "dequeueIntervalSeconds": int, "dequeueNumWorkers": int, "dequeueUseThreads": bool}
RUN_POD = dict.fromkeys(("containerConfig", "podSpecConfig", "podTemplateSpecMetadata", "jobSpecConfig", "jobMetadata"), ANY)
LAUNCHER = {"image": IMAGE, "imagePullPolicy": POLICY, "jobNamespace": str, "loadInclusterConfig": bool, "kubeconfigFile": str, "envVars": [str]}
LAUNCHER |= {"failPodOnRunFailure": bool, "runK8sConfig": RUN_POD, "labels": ANY, "resources": KUBERNETES, "securityContext": KUBERNETES}
LAUNCHER |= {key: WORLD[key] for key in ("envConfigMaps", "envSecrets", "volumes", "volumeMounts", "schedulerName")}
LOGS = {"bucket": str, "localDir": str, "prefix": str, "useSsl": bool, "verify": bool, "verifyCertPath": str, "endpointUrl": str, "region": str}
LOGS |= {"skipEmptyFiles": bool, "uploadInterval": int, "uploadExtraArgs": ANY, "showUrlOnly": bool}
TICKS = {"purgeAfterDays": (int, {"skipped": int, "success": int, "failure": int, "started": int})}
CHART = {
    "global": dict.fromkeys(("postgresqlSecretName", "dagsterHome", "serviceAccountName", "celeryConfigSecretName", "dagsterInstanceConfigMap"), str),
    "dagster-user-deployments": {"enabled": bool, "enableSubchart": bool, "imagePullSecrets": KUBERNETES, "deployments": [DEPLOYMENT]},
    "dagsterWebserver": POD | WORLD | {"replicaCount": int, "image": IMAGE, "enableReadOnly": bool, "logLevel": str, "pathPrefix": str},
    "dagsterDaemon": POD | WORLD | {
        "enabled": bool, "image": IMAGE, "heartbeatTolerance": int, "runMonitoring": ANY, "runRetries": ANY, "sensors": ANY, "schedules": ANY,
        "runCoordinator": {
            "enabled": bool, "type": ("QueuedRunCoordinator", "CustomRunCoordinator"),
            "config": {"queuedRunCoordinator": QUEUE, "customRunCoordinator": CLASS},
        },
    },
    "runLauncher": {
        "type": ("CeleryK8sRunLauncher", "K8sRunLauncher", "CustomRunLauncher"),
        "config": {"celeryK8sRunLauncher": ANY, "k8sRunLauncher": LAUNCHER, "customRunLauncher": CLASS},
    },
    "computeLogManager": {
        "type": ("NoOpComputeLogManager", "AzureBlobComputeLogManager", "GCSComputeLogManager", "S3ComputeLogManager", "CustomComputeLogManager"),
        "config": {"s3ComputeLogManager": LOGS, "customComputeLogManager": CLASS},
    },
    "postgresql": {
        "enabled": bool, "image": IMAGE, "postgresqlHost": str, "postgresqlUsername": str, "postgresqlPassword": str, "postgresqlDatabase": str,
        "postgresqlParams": ANY, "postgresqlScheme": str, "service": {"port": int},
    },
    "concurrency": {
        "enabled": bool,
        "pools": {"defaultLimit": int, "granularity": ("run", "op"), "opGranularityRunBuffer": int},
        "runs": {"maxConcurrentRuns": int, "tagConcurrencyLimits": [{"key": str, "value": ANY, "limit": int}]},
    },
    "telemetry": {"enabled": bool},
    "retention": {"enabled": bool, "sensor": TICKS, "schedule": TICKS, "autoMaterialize": TICKS},
    "additionalInstanceConfig": ANY,
}  # fmt: skip


def faults(value: Any, allowed: Any, where: str = "") -> list[str]:
    """List what the chart would refuse or ignore."""
    if allowed is ANY or allowed is KUBERNETES:
        return []
    if isinstance(allowed, dict):
        if not isinstance(value, dict):
            return [f"{where} is no section"]
        found = [f"{where}.{key} is not known to the chart" for key in value if key not in allowed]
        return found + [fault for key in value if key in allowed for fault in faults(value[key], allowed[key], f"{where}.{key}")]
    if isinstance(allowed, list):
        return [fault for i, item in enumerate(value) for fault in faults(item, allowed[0], f"{where}[{i}]")]
    if isinstance(allowed, tuple) and all(isinstance(item, str) for item in allowed):
        return [] if value in allowed else [f"{where} is {value!r}, none of {', '.join(allowed)}"]
    if isinstance(allowed, tuple):
        return [] if any(not faults(value, item, where) for item in allowed) else [f"{where} is {value!r}"]
    is_right = isinstance(value, allowed) and not (allowed is int and isinstance(value, bool))
    return [] if is_right else [f"{where} is {value!r}, not {allowed.__name__}"]


@pytest.fixture
def values() -> dict[str, Any]:
    """Read the values."""
    return yaml.safe_load(VALUES.read_text(encoding="utf-8"))


def test_every_value_is_one_that_the_chart_knows(values: dict[str, Any]) -> None:
    """Helm ignores a misspelt key, and a cluster would run on the chart's defaults: SQLite's limits, no logs, no queue."""
    assert faults(values, CHART) == []


def test_a_misspelt_key_and_a_wrong_type_are_found(values: dict[str, Any]) -> None:
    """The check above can fail."""
    values["runLauncher"]["config"]["k8sRunLauncher"]["runK8sconfig"] = {}
    values["concurrency"]["runs"]["maxConcurrentRuns"] = "64"
    values["runLauncher"]["type"] = "K8RunLauncher"
    found = faults(values, CHART)
    assert [fault.split(" is ")[0] for fault in found] == [
        ".runLauncher.type",
        ".runLauncher.config.k8sRunLauncher.runK8sconfig",
        ".concurrency.runs.maxConcurrentRuns",
    ]


def test_the_chosen_kinds_have_their_sections(values: dict[str, Any]) -> None:
    """The chart requires the section that its `type` names, and name, image and port of a code location."""
    for section in (values["runLauncher"], values["computeLogManager"]):
        assert section["type"].lower() in {key.lower() for key in section["config"]}
    for deployment in values["dagster-user-deployments"]["deployments"]:
        assert {"name", "image", "port"} <= set(deployment)
        assert {"repository", "pullPolicy"} <= set(deployment["image"])


@pytest.mark.filterwarnings("ignore")
def test_what_kubernetes_defines_is_valid_kubernetes(values: dict[str, Any]) -> None:
    """Environment, volumes and resources are handed on to pods: they are checked in one, strictly."""
    import kubernetes_validate

    (deployment,) = values["dagster-user-deployments"]["deployments"]
    sources = [{"configMapRef": item} for item in deployment["envConfigMaps"]]
    containers = [
        {"name": "code", "image": "i", "envFrom": sources, "volumeMounts": deployment["volumeMounts"], "resources": deployment["resources"]},
        {"name": "web", "image": "i", "resources": values["dagsterWebserver"]["resources"]},
        {"name": "run", "image": "i", **values["runLauncher"]["config"]["k8sRunLauncher"]["runK8sConfig"]["containerConfig"]},
    ]
    pod = {"containers": containers, "volumes": deployment["volumes"]}
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod}, "1.30", strict=True)


def test_the_instance_that_the_chart_writes_is_one_that_dagster_reads(values: dict[str, Any], tmp_path: Path) -> None:
    """Limits, monitoring, retries and retention pass Dagster's own schema together; a run coordinator beside them does not."""
    from dagster._core.instance.config import dagster_instance_config

    daemon = values["dagsterDaemon"]
    monitoring, pools, runs = daemon["runMonitoring"], values["concurrency"]["pools"], values["concurrency"]["runs"]
    settings = {
        "concurrency": {
            "pools": {"default_limit": pools["defaultLimit"], "granularity": pools["granularity"]},
            "runs": {"max_concurrent_runs": runs["maxConcurrentRuns"]},
        },
        "run_monitoring": {
            "enabled": monitoring["enabled"],
            "start_timeout_seconds": monitoring["startTimeoutSeconds"],
            "max_resume_run_attempts": monitoring["maxResumeRunAttempts"],
            "poll_interval_seconds": monitoring["pollIntervalSeconds"],
        },
        "run_retries": {"enabled": daemon["runRetries"]["enabled"], "max_retries": daemon["runRetries"]["maxRetries"]},
        "telemetry": values["telemetry"],
        "retention": {name: {"purge_after_days": values["retention"][name]["purgeAfterDays"]} for name in ("sensor", "schedule")},
    }
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(settings))
    found, _ = dagster_instance_config(str(tmp_path))
    assert found["concurrency"]["runs"]["max_concurrent_runs"] == 64
    assert daemon["runCoordinator"] == {"enabled": False}
    queue = {"module": "dagster.core.run_coordinator", "class": "QueuedRunCoordinator", "config": {"max_concurrent_runs": -1}}  # the chart's default
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({**settings, "run_coordinator": queue}))
    with pytest.raises(dg.DagsterInvalidConfigError, match="incompatible with the `concurrency > runs` config"):
        dagster_instance_config(str(tmp_path))


def test_the_original_schema_accepts_the_values(values: dict[str, Any]) -> None:
    """Where somebody has the chart. What it refers to in Kubernetes' schemas on the web is looked up in the installed ones, strictly."""
    path = os.environ.get("CHART_SCHEMA")
    if not path:
        pytest.skip("CHART_SCHEMA names no schema: helm pull dagster/dagster --untar")
    import jsonschema

    schema = read_original(Path(path))
    jsonschema.validate(values, schema)
    wrong = [
        {"runLauncher": {"type": "K8RunLauncher"}},
        {"dagsterDaemon": {"runCoordinatr": {}}},
        {"telemetry": {"enabled": "no"}},
        {"dagster-user-deployments": {"deployments": [{"volumes": [{"nme": "pipeline"}]}]}},
    ]
    for change in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**values, **change}, schema)


def read_original(path: Path) -> dict[str, Any]:
    """Read the chart's schema without its requirements, which concern values merged with its own defaults, and with Kubernetes' definitions in it."""
    import kubernetes_validate

    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / "v1.30.0-local-strict"
    kubernetes = json.loads((folder / "_definitions.json").read_text(encoding="utf-8").replace("/api/_definitions.json#/", "#/"))["$defs"]

    def local(node: Any) -> Any:
        if isinstance(node, dict):
            found = {key: local(item) for key, item in node.items() if key != "required"}
            if "_definitions.json#/" in str(found.get("$ref")):
                found["$ref"] = f"#/$defs/{found['$ref'].rpartition('#/definitions/')[2]}"
            return found
        return [local(item) for item in node] if isinstance(node, list) else node

    schema = local(json.loads(path.read_text(encoding="utf-8")))
    return {**schema, "$defs": {**kubernetes, **schema.get("$defs", {})}}
