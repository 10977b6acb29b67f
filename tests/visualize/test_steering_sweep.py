"""Dose curves as an asset: a partition a recipe, the same bytes again, and nothing without the section."""

import re
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from tiny_models import make_tiny_config, save_model, write_texts

from interp_assets import lab
from interp_assets.corpus.plan import plan_corpus
from interp_assets.errors import ConfigError, InputError
from interp_assets.garcon.steering.dose import ARMS, DIFFERENCE
from interp_assets.graph.definitions import build_defs
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import Asset, Job
from interp_assets.planning.config import PipelineConfig, make_config
from interp_assets.planning.pipeline import Pipeline, open_pipeline_store
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.store import Store
from interp_assets.visualize.steering.assets import find_obstacles
from interp_assets.visualize.steering.refs import curve_ref
from interp_assets.web.opened import BundlePlace, OpenBundle
from interp_assets.web.refs import bundle_ref
from resources.world import World

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "steering_sweep.md"
SAE = {"d_sae": 24, "k": 3, "n_rows": 512, "batch_rows": 128, "dead_after_rows": 256}
FEATURES = {"latent_slices": 2, "top_k": 4, "n_random": 8, "window": 4, "n_intervals": 2, "examples_per_interval": 2}
STEERING = {"prompts": ["word1 word", "word5"], "strengths": [-2, 4], "new_tokens": 4}


def _configure(root: Path, **steering: Any) -> PipelineConfig:
    sections = {"saes": [{"name": "demo", "hook_point": "resid_post.0", **SAE}], "features": {"saes": ["demo"], **FEATURES}}
    return make_tiny_config(
        root / "model",
        root / "texts",
        root=str(root / "data"),
        shuffle={"passes": 2, "fan_out": 2},
        execution={"device": "cpu", "tokens_per_batch": 512, "rows_per_block": 256},
        steering={**STEERING, **steering},
        **sections,
    )


def _make(config: PipelineConfig, pipeline: Pipeline, store: Store, assets: list[Asset]) -> None:
    world = World(config)
    for asset in assets:
        keys = tuple(asset.partition_keys(pipeline))
        make = asset.make(Job(world, pipeline, store, keys))
        for key in keys:
            make(key)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[PipelineConfig, Pipeline, Store]:
    """Run a tiny pipeline with a recipe for its most frequent latents."""
    root = tmp_path_factory.mktemp("steer")
    save_model(root / "model", "gpt2")
    write_texts(root / "texts", n_files=4)
    clamps = [{"sae": "demo", "latent": latent, "clamp": "1 raw"} for latent in (0, 1)]
    recipes = {"first": clamps[:1], "raw": [clamps[1], {"freeze": "pattern.*"}]}
    config = _configure(root, recipes=recipes, unit="raw")
    store = open_pipeline_store(config)
    pipeline = plan_corpus(config, store)
    _make(config, pipeline, store, [asset for asset in make_road(config) if not asset.plan and asset.stage != "web"])
    return config, pipeline, store


def test_a_recipe_becomes_texts_and_a_table_as_the_page_says(made: tuple[PipelineConfig, Pipeline, Store]) -> None:
    """Every arm of every strength, for each prompt; the columns are those of the page, in its order."""
    _, pipeline, store = made
    dose = lab.Opened(pipeline, store).dose("first")
    columns = re.findall(r"^\| `(\w+)` \| (?:string|int64|float64) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert dose.texts.columns == columns
    assert set(dose.texts["arm"]) <= set(ARMS)
    assert {"feature", "random", "flip", "zero"} <= set(dose.texts["arm"])
    assert dose.texts.filter(pl.col("arm") == "feature").height == 4
    assert dose.strengths == ["-2 raw", "4 raw"]
    facts = load_manifest(store, curve_ref(pipeline, "first")).facts
    table = dose.table().filter((pl.col("arm") == DIFFERENCE) & (pl.col("strength") == "4 raw") & (pl.col("outcome") == "kl"))
    assert facts["kl_over_controls"] == table["mean"][0]
    assert facts["what"] == "Latent 0 of demo at resid_post.0"
    with pytest.raises(ConfigError, match=r"No recipe is called 'second'; `steering.recipes` has \['first', 'raw'\]"):
        lab.Opened(pipeline, store).dose("second")


def test_what_was_computed_is_found_and_another_recipe_is_another(made: tuple[PipelineConfig, Pipeline, Store]) -> None:
    """Its id is of the edits, prompts, strengths, model and SAEs; a second run makes nothing."""
    config, pipeline, store = made
    (asset,) = [asset for asset in make_road(config) if asset.group == "steer"]
    assert asset.partition_keys(pipeline) == ["first", "raw"]
    make = asset.make(Job(World(config), pipeline, store, ("first",)))
    (again,) = make("first")
    assert again.is_cached
    shown = asset.shows(Job(World(config), pipeline, store, ("first",)), "first", [again])
    assert str(shown["curve"]).count("<svg") == 5
    assert "kl_over_controls" in shown
    assert curve_ref(pipeline, "first").artifact_id != curve_ref(pipeline, "raw").artifact_id
    assert asset.takes(pipeline, store, "first").busy_s > 0


def test_a_recipe_that_cannot_be_is_an_obstacle_before_any_work(made: tuple[PipelineConfig, Pipeline, Store], tmp_path: Path) -> None:
    """Hours of training must not end at a misspelt word."""
    config, pipeline, store = made
    recipes = {"typo": [{"sae": "demo", "latent": 0, "clmp": "1 max"}], "strange": [{"sae": "other", "latent": 0, "clamp": "1 max"}]}
    changed = config.model_copy(update={"steering": config.steering.model_copy(update={"recipes": recipes})})
    found = find_obstacles(Pipeline(changed, pipeline.plan), store)
    assert "`steering.recipes.typo`: The recipe is wrong at edits.0.sae" in found[0]
    assert "`steering.recipes.strange` names ['other']; how latents fire is known of features.saes, ['demo']" in found[1]
    assert find_obstacles(pipeline, store) == []


def test_the_bundle_holds_the_curves_of_its_latents(made: tuple[PipelineConfig, Pipeline, Store]) -> None:
    """A page without a model shows what was swept; the bundle follows the curves, and only where there are some."""
    config, pipeline, store = made
    (browser,) = [asset for asset in make_road(config) if asset.stage == "web"]
    assert [reads.partitions for reads in browser.reads if reads.key == ("steering_sweep",)] == [("first", "raw")]
    _make(config, pipeline, store, [browser])
    bundle = OpenBundle(BundlePlace(store, bundle_ref(pipeline, "demo").path))
    assert bundle.description["doses"]["latents"] == [0, 1]
    (curve,) = bundle.doses(0)
    assert (curve.recipe, curve.prompts, curve.n_texts) == ("first", STEERING["prompts"], 2)
    dose = lab.Opened(pipeline, store).dose("first")
    table = dose.table().filter((pl.col("outcome") == "kl") & (pl.col("arm") == DIFFERENCE))
    assert curve.outcomes["kl"][DIFFERENCE].high == table["high"].to_list()
    assert {text.text for text in curve.texts} == set(dose.texts.filter(pl.col("arm") == "feature")["text"])
    changed = config.steering.model_copy(update={"new_tokens": 5}) if config.steering else None
    longer = Pipeline(config.model_copy(update={"steering": changed}), pipeline.plan)
    plain = Pipeline(config.model_copy(update={"steering": None}), pipeline.plan)
    assert len({bundle_ref(other, "demo").artifact_id for other in (pipeline, longer, plain)}) == 3
    (unswept,) = [asset for asset in make_road(plain.config) if asset.stage == "web"]
    assert [reads.key for reads in unswept.reads] == [reads.key for reads in browser.reads[:-1]]


def test_nothing_is_steered_without_the_section() -> None:
    """The road of a pipeline that does not ask for it is as it was, and so is its configuration."""
    plain = make_config({})
    assert [asset for asset in make_road(plain) if asset.group == "steer"] == []
    assert "steering" not in plain.model_dump()
    with pytest.raises(ConfigError, match=r"steering.recipes"):
        make_config({"steering": {"prompts": ["a"], "recipes": {}}})
    with pytest.raises((ConfigError, InputError), match="unit"):
        make_config({"steering": {"prompts": ["a"], "recipes": {"x": []}, "unit": "furlongs"}})


def test_dagster_sees_a_partition_for_each_recipe() -> None:
    """With what it is made from."""
    edits = [{"sae": "demo", "latent": 1, "clamp": "1 max"}]
    definitions = build_defs(make_config({"steering": {"prompts": ["a"], "recipes": {"golden": edits, "other": edits}}}))
    node = definitions.resolve_asset_graph().get(dg.AssetKey(["steering_sweep"]))
    assert node.partitions_def is not None
    assert list(node.partitions_def.get_partition_keys()) == ["golden", "other"]
    assert {key.to_user_string() for key in node.parent_keys} == {"activation_statistics", "features/demo/feature_records", "sae"}
