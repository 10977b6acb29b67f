"""What comes from elsewhere is data: a bucket, a configuration or a manifest of somebody else's cannot run code or leave its folder."""

import json
from dataclasses import fields
from pathlib import Path

import dagster as dg
import pytest
import yaml

from interp_assets.errors import ArtifactError, ConfigError, InterpError, StoreError
from interp_assets.graph.definitions import build_defs
from interp_assets.planning.config import ModelConfig, PipelineConfig, load_config, make_config
from interp_assets.planning.pipeline import load_pipeline
from interp_assets.storage.manifest import ArtifactRef, create_artifact, encode_manifest, load_manifest, make_ref, read_file
from interp_assets.storage.store import Store, check_address, open_store
from resources.world import World

REF = make_ref("example", "1-stage", identity={}, inputs={}, label="shard-000000")


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/../../b", "a\\b", "a\0b"])
def test_a_manifest_cannot_name_a_file_outside_its_artifact(name: str, local_store: Store, tmp_path: Path) -> None:
    """A reader joins these names to the artifact's folder; a sealed manifest of a malicious bucket is still refused."""
    (tmp_path / "outside").write_text("secret")
    with create_artifact(local_store, REF) as art:
        art.put("a.bin", b"data")
    manifest = load_manifest(local_store, REF)
    entry = manifest.files[0]
    object.__setattr__(entry, "name", name)
    local_store.put(f"{REF.path}/manifest.json", encode_manifest(manifest))
    with pytest.raises(InterpError):
        read_file(local_store, REF.path, load_manifest(local_store, REF), name)


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/./b"])
def test_no_path_leaves_a_store(path: str, local_store: Store) -> None:
    """Whatever a caller was given, the store checks it."""
    for act in (lambda: local_store.get(path), lambda: local_store.put(path, b""), lambda: local_store.child(path)):
        with pytest.raises(StoreError, match="is not a path inside a store"):
            act()


def test_a_configuration_is_only_data(tmp_path: Path) -> None:
    """YAML can name Python objects; ours cannot."""
    path = tmp_path / "p.yaml"
    marker = tmp_path / "ran"
    path.write_text(f"name: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [{"name": "../other"}, {"name": ".hidden"}, {"execution": {"plan": "../plan.json"}}, {"saes": [{"name": "a/b"}]}])
def test_a_name_cannot_become_another_folder(content: dict[str, object], tmp_path: Path) -> None:
    """Names of pipelines, SAEs and plans become folders and files."""
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="is no name"):
        load_config(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    "plan", [b"", b"[]", b"null", b'{"format": "interp-assets/plan", "version": 1, "shards": [{"__class__": "os.system"}]}', b"\x80\x04N."]
)
def test_a_strange_plan_is_refused(plan: bytes, local_store: Store, small_config: PipelineConfig) -> None:
    """The plan is the one file that every job trusts: other content is named as damaged, and nothing is unpickled."""
    local_store.put("plan.json", plan)
    with pytest.raises(ArtifactError, match=r"The plan .* is (damaged|\()"):
        load_pipeline(small_config, local_store)


@pytest.mark.parametrize(
    "content", [{"root": "s3://KEY:S3CR3T@bucket/x"}, {"corpus": {"path": "https://me:S3CR3T@host/x"}}, {"model": {"name": "hf://S3CR3T@x/y"}}]
)
def test_an_address_with_a_key_in_it_is_refused_and_not_repeated(content: dict[str, object], tmp_path: Path) -> None:
    """It would be kept in `store.url`, shown in messages, and recorded by Dagster with each run."""
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="holds credentials in an address") as refused:
        load_config(tmp_path / "p.yaml")
    assert "S3CR3T" not in str(refused.value)
    with pytest.raises(ConfigError, match="holds credentials in an address") as refused:
        open_store("s3://KEY:S3CR3T@bucket/prefix")
    assert "S3CR3T" not in str(refused.value)
    with pytest.raises(ConfigError, match="holds credentials in an address"):
        open_store("s3://KEY:SEC/R3T@bucket/prefix")
    check_address("s3://bucket/a@b", "x")
    check_address("https://host:8080/a@b", "x")


@pytest.mark.parametrize("name", ["/somewhere/of/mine/pythia", "~/models/pythia", "./pythia", "../up/pythia/"])
def test_what_is_published_names_a_local_model_by_its_folder_alone(name: str) -> None:
    """Bundles and exported SAEs go to other people; where a folder lay is nobody's business."""
    assert ModelConfig(name=name).shown_name == "pythia"
    assert ModelConfig(name="EleutherAI/pythia-70m").shown_name == "EleutherAI/pythia-70m"
    assert ModelConfig().shown_name == ModelConfig().name


def test_code_that_comes_with_a_model_is_off() -> None:
    """It runs only when the configuration says so, in so many words."""
    assert ModelConfig().trust_remote_code is False


def test_no_pickle_is_read_or_written() -> None:
    """Loading a pickle runs what it says. Ray moves function names and results between our own processes, and is the one exception.

    dictionary_learning keeps weights in torch's own format: it is written as it is, and read by the loader that takes tensors alone.
    """
    root = Path(__file__).parent.parent / "interp_assets"
    words = ("pickle", "torch.load(", "torch.save(", "allow_pickle", "marshal", "eval(", "exec(")
    found = [
        f"{path.name}: {word}"
        for path in root.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        for word in words
        if word in line
        and not line.strip().startswith(("#", '"""'))
        and ".eval()" not in line
        and "allow_pickle=False" not in line
        and "ast.literal_eval(" not in line
    ]
    allowed = {line for line in found if line.split(": ")[1] == "pickle"}  # prose
    allowed |= {"folders.py: torch.save(", "folders.py: torch.load("}
    allowed |= {"load.py: exec("}  # architectures of one's own, whose hash the configuration has: tests/train/test_train_own.py
    (load,) = [line for line in (root / "train" / "exchange" / "folders.py").read_text(encoding="utf-8").splitlines() if "torch.load(" in line]
    assert "weights_only=True" in load
    assert set(found) - allowed == set()


def test_the_world_carries_no_secret() -> None:
    """The world is the configuration and nothing else."""
    assert [field.name for field in fields(World)] == ["config"]


def test_no_run_sets_the_configuration() -> None:
    """Who may start a run must not choose a model whose code is trusted: what its configuration says of the world is not heard."""
    world = (build_defs(make_config({})).resources or {})["world"]
    hostile = {"world": {"config": {"config_json": make_config({"model": {"trust_remote_code": True}}).model_dump_json()}}}
    with dg.build_resources({"world": world}, resource_config=hostile) as resources:
        assert resources.world is world
        assert not resources.world.config.model.trust_remote_code


def test_a_ref_is_plain() -> None:
    """What identifies an artifact is JSON: no object can hide in it."""
    assert isinstance(REF, ArtifactRef)
    json.dumps(REF._asdict())
