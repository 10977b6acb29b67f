"""What runs elsewhere is valid before anybody pays for it: checked offline, against the tools' own schemas."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
INFRA = ROOT / "infra"


def load(path: str) -> dict[str, Any]:
    """Read a YAML file."""
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_cloudformation_template_is_valid() -> None:
    """Wrong names of properties cost a quarter of an hour each when AWS finds them."""
    import subprocess
    import sys

    template = str(INFRA / "aws" / "template.yaml")
    result = subprocess.run(
        [str(Path(sys.executable).with_name("cfn-lint")), "--regions", "us-east-1", "--", template], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.filterwarnings("ignore")
def test_the_manifests_are_valid_kubernetes() -> None:
    """Strict: a field that Kubernetes does not know is an error, not ignored."""
    import kubernetes_validate

    documents = list(yaml.safe_load_all((INFRA / "kubernetes" / "manifests.yaml").read_text(encoding="utf-8")))
    assert {document["kind"] for document in documents} == {"ServiceAccount", "Role", "RoleBinding", "ConfigMap"}
    for document in documents:
        kubernetes_validate.validate(document, "1.30", strict=True)


def test_what_a_pod_asks_for_is_what_dagster_k8s_reads() -> None:
    """The tags of the assets and the launcher's values go through dagster-k8s's own parser: a misspelt key is refused."""
    from dagster_k8s.job import UserDefinedDagsterK8sConfig, get_user_defined_k8s_config

    from interp_assets.graph.partitions import tags_of
    from interp_assets.graph.stages import make_road
    from interp_assets.planning.config import make_config

    config, road = make_config({}), make_road(make_config({}))
    gpu_needs, memory_needs = road.find("activations").needs, road.find("mixed_shards").needs
    key = "dagster-k8s/config"
    gpu, memory = (get_user_defined_k8s_config({key: json.dumps(tags[key])}) for tags in (tags_of(gpu_needs, config), tags_of(memory_needs, config)))
    assert gpu.container_config["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert gpu.pod_spec_config["node_selector"] == {"interp-assets/accelerator": "gpu"}
    assert memory.container_config["resources"]["limits"]["memory"] == "2560Mi"
    on_cpu = tags_of(gpu_needs, make_config({"execution": {"device": "cpu"}}))
    assert set(on_cpu) == {key}  # a cluster without a GPU would wait for one for ever
    assert "nvidia.com/gpu" not in get_user_defined_k8s_config({key: json.dumps(on_cpu[key])}).container_config["resources"]["limits"]
    values = load("infra/kubernetes/values.yaml")["runLauncher"]["config"]["k8sRunLauncher"]["runK8sConfig"]
    assert UserDefinedDagsterK8sConfig.from_dict({"container_config": values["containerConfig"], "job_spec_config": values["jobSpecConfig"]})


@pytest.mark.parametrize("name", ["dagster.yaml", "dagster.production.yaml", "dagster.ecs.yaml", "dagster.ray.yaml"])
@pytest.mark.filterwarnings("ignore")
def test_the_settings_are_valid(name: str, tmp_path: Path) -> None:
    """Dagster's own schema of `dagster.yaml`, and the configuration schemas of its launcher and log manager."""
    from dagster import DagsterInstance  # noqa: F401 - loads the plugins' types
    from dagster._config import process_config, resolve_to_config_type
    from dagster._core.instance.config import dagster_instance_config
    from dagster._serdes import ConfigurableClassData  # noqa: F401

    content = load(f"resources/{name}")
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(content))
    found, _ = dagster_instance_config(str(tmp_path))
    assert found
    for section in ("run_launcher", "compute_logs"):
        if section not in content:
            continue
        import importlib

        kind = getattr(importlib.import_module(content[section]["module"]), content[section]["class"])
        result = process_config(resolve_to_config_type(kind.config_type()), content[section].get("config", {}))
        assert result.success or all("environment variable" in str(error.message) for error in result.errors or []), result.errors


def test_the_values_name_the_settings_that_the_stages_read() -> None:
    """A renamed environment variable would leave a cluster on its defaults in silence."""
    from interp_assets.graph.assembly import CONFIG_VARIABLE, EXECUTOR_VARIABLE
    from interp_assets.graph.jobs import POSTGRES_VARIABLE
    from interp_assets.planning.config import ROOT_VARIABLE, load_config

    documents = list(yaml.safe_load_all((INFRA / "kubernetes" / "manifests.yaml").read_text(encoding="utf-8")))
    maps = {document["metadata"]["name"]: document["data"] for document in documents if document["kind"] == "ConfigMap"}
    assert {ROOT_VARIABLE, CONFIG_VARIABLE, EXECUTOR_VARIABLE} < set(maps["interp-environment"])
    assert POSTGRES_VARIABLE in (INFRA / "aws" / "template.yaml").read_text(encoding="utf-8")
    path = ROOT / "infra" / "kubernetes" / "manifests.yaml"
    assert yaml.safe_load(maps["interp-pipeline"]["pipeline.yaml"])["name"] == "pythia"
    assert load_config is not None
    assert path.exists()
