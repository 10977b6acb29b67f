"""What nothing refers to goes, and nothing else: afterwards a run makes nothing, and every byte is what its manifest says."""

import ast
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from road_world import Finished, copied_history

import interp_assets
from interp_assets.errors import InputError
from interp_assets.graph.jobs import run_road
from interp_assets.graph.leftovers import Leftover, Leftovers, delete_leftovers, find_leftovers, known_kinds
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.storage.manifest import create_artifact
from interp_assets.storage.store import open_store
from interp_assets.storage.verify import list_tree, verify_tree
from interp_assets.train.refs import sae_ref
from interp_assets.train.resume import checkpoint_ref
from interp_assets.visualize.refs import records_ref, thresholds_ref

NO_AGE = timedelta(0)


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> PipelineConfig:
    """Return a copy of the finished pipeline, to be changed."""
    shutil.copytree(finished.config.root, tmp_path / "copy")
    return finished.config.model_copy(update={"root": str(tmp_path / "copy")})


def leftovers(*configs: PipelineConfig, min_age: timedelta = NO_AGE, forget: tuple[str, ...] = ()) -> Leftovers:
    """Find what may go of the configurations' folder, a minute from now."""
    store = open_pipeline_store(configs[0])
    pipelines = [load_pipeline(config, store) for config in configs]
    return find_leftovers(store, pipelines, min_age=min_age, forget=forget, now=datetime.now(UTC) + timedelta(minutes=1))


def test_a_finished_pipeline_has_no_leftovers(copied: PipelineConfig) -> None:
    """Each artifact of its road is needed: the next run would make it again."""
    assert leftovers(copied).items == []


def test_after_gc_a_run_makes_nothing_and_verify_is_clean(copied: PipelineConfig, finished: Finished) -> None:
    """An older training, its evidence, a checkpoint and a stray file go; labels, the bundle, and what the road needs stay."""
    store = open_pipeline_store(copied)
    pipeline, before = load_pipeline(copied, store), set(list_tree(store).artifacts)
    sae = copied.sae("demo").model_copy(update={"learning_rate": 0.5})
    older = load_pipeline(copied.model_copy(update={"saes": [sae, copied.sae("other")]}), store)
    made = [sae_ref(older, "demo"), records_ref(older, "demo", 0), thresholds_ref(older, "demo", 1), checkpoint_ref(sae_ref(pipeline, "demo"), 7)]
    for ref in made:
        with create_artifact(store, ref) as art:
            art.put("file.bin", b"old" * 100)
    store.put("4-sae/gone-123456789abc/half.bin", b"x" * 10)
    found = leftovers(copied)
    assert {item.path for item in found.items} == {*(ref.path for ref in made), "4-sae/gone-123456789abc/half.bin"}
    assert found.n_bytes > 900
    assert leftovers(copied, min_age=timedelta(hours=24)) == Leftovers([], 5, [])
    delete_leftovers(store, found)
    assert set(list_tree(store).artifacts) == before
    folders = [path for path in Path(copied.root, copied.name).rglob("*") if path.is_dir() and not path.name.startswith(".")]
    assert [folder for folder in folders if not any(folder.iterdir())] == []
    assert verify_tree(store) == []
    with copied_history(finished) as instance:
        assert {item.name: item.n_made for item in run_road(copied, instance) if item.n_made} == {"corpus_plan": 1}


KEPT = {"sae_comparison", "feature_labels"}
"""Kinds that no asset makes and nobody can make again: what people and retrainings left."""


def test_no_kind_of_artifact_is_forgotten(copied: PipelineConfig) -> None:
    """Thresholds of rows were never listed: no asset has them as its own. Every kind that code names is known, or kept on purpose."""
    store = open_pipeline_store(copied)
    plain = copied.model_copy(update={"features": copied.features.model_copy(update={"saes": []})})
    assert known_kinds(load_pipeline(plain, store), store) == _named_kinds() - KEPT


def _named_kinds() -> set[str]:
    """Return what the package's `make_ref`, and what hands its first argument on to it, are called with."""
    found: set[str] = set()
    for path in Path(interp_assets.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {node.target.id: node.value for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            if call.func.id in ("make_ref", "_ref") and call.args:
                kind = constants.get(call.args[0].id) if isinstance(call.args[0], ast.Name) else call.args[0]
                if isinstance(kind, ast.Constant):
                    found.add(str(kind.value))
    return found


def test_folders_above_the_pipeline_are_never_removed(tmp_path: Path) -> None:
    """Even where nothing is left in it."""
    store = open_store(str(tmp_path / "root")).child("pipeline")
    store.put("a/b/c.bin", b"x")
    delete_leftovers(store, Leftovers([Leftover("a/b/c.bin", "", 1)], 0, []))
    assert list((tmp_path / "root" / "pipeline").iterdir()) == []


def test_a_training_that_is_not_done_keeps_its_checkpoints(copied: PipelineConfig) -> None:
    """It goes on from there: hours of work."""
    store = open_pipeline_store(copied)
    sae = copied.sae("demo").model_copy(update={"name": "third"})
    config = copied.model_copy(update={"saes": [*copied.saes, sae]})
    ref = checkpoint_ref(sae_ref(load_pipeline(config, store), "third"), 7)
    with create_artifact(store, ref) as art:
        art.put("state", b"state")
    assert [item.kind for item in leftovers(config).items] == ["sweep"]  # the table of two SAEs: three have another


def test_what_another_configuration_may_need_is_not_touched(copied: PipelineConfig) -> None:
    """Two YAML files, one folder: with one of them alone nothing is listed; with both nothing is left over; what is given up goes by name."""
    alone = copied.model_copy(update={"saes": [copied.sae("demo")]})
    with pytest.raises(InputError, match=r"There are artifacts of other, which no named configuration has: .* --forget other"):
        leftovers(alone)
    assert leftovers(alone, copied).items == []
    found = leftovers(alone, forget=("other",))
    assert {item.kind for item in found.items} == {"sae", "sae_evaluation", "sweep"}
    store = open_pipeline_store(alone)
    delete_leftovers(store, found)
    assert verify_tree(store) == []


def test_a_bundle_keeps_the_sae_that_it_shows(copied: PipelineConfig) -> None:
    """Nobody asks for its evidence any more, and yet people look at it: search by example needs the SAE."""
    hidden = copied.model_copy(update={"features": copied.features.model_copy(update={"saes": []}), "saes": [copied.sae("other")]})
    found = leftovers(hidden, forget=("demo",))
    paths = [item.path for item in found.items]
    assert not any(path.startswith("6-web/") for path in paths)
    assert sae_ref(load_pipeline(copied, open_pipeline_store(copied)), "demo").path not in paths
