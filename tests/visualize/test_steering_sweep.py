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
from interp_assets.garcon.steering.dose import ARMS, DIFFERENCE, Dose
from interp_assets.graph.definitions import build_defs
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import Asset, Job
from interp_assets.planning.config import PipelineConfig, make_config
from interp_assets.planning.pipeline import Pipeline, open_pipeline_store
from interp_assets.planning.steering import SteeringConfig
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.store import Store
from interp_assets.visualize.steering.assets import find_obstacles
from interp_assets.visualize.steering.refs import curve_ref
from interp_assets.visualize.steering.search import IDLE, MOVER, choose_candidates, chosen_latents, rank_candidates, read_search
from interp_assets.web.opened import BundlePlace, OpenBundle
from interp_assets.web.refs import bundle_ref
from resources.world import World

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "steering_sweep.md"
SAE = {"d_sae": 24, "k": 3, "n_rows": 512, "batch_rows": 128, "dead_after_rows": 256}
FEATURES = {"latent_slices": 2, "top_k": 4, "n_random": 8, "window": 4, "n_intervals": 2, "examples_per_interval": 2}
STEERING = {"prompts": ["word1 word", "word5"], "strengths": [-2, 4], "new_tokens": 4}
SEARCHED = {"prompts": ["word1 word", "word5", "a", "word word"], "strengths": [1, 4], "new_tokens": 4, "unit": "raw"}


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
    assert str(shown["curve"]).startswith("![Latent 0 of demo at resid_post.0](data:image/png;base64,")
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


def test_a_search_finds_latents_that_move_and_some_that_do_not(made: tuple[PipelineConfig, Pipeline, Store]) -> None:
    """On every other prompt; curves are of the rest, and both go into the bundle."""
    config, planned, store = made
    steering = SteeringConfig.model_validate({**SEARCHED, "search": {"candidates": 6, "strength": 3, "shown": 2}})
    pipeline = Pipeline(config.model_copy(update={"steering": steering}), planned.plan)
    road = make_road(pipeline.config)
    search, browser = [asset for asset in road if asset.group == "steer" or asset.stage == "web"]
    _make(pipeline.config, pipeline, store, [search, browser])
    found = read_search(pipeline, store, "demo")
    page = PAGE.with_name("steering_search.md").read_text(encoding="utf-8")
    columns = [name for row in re.findall(r"^\| (`.+?) \| (?:string|int64|float64) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert found.candidates.columns == columns
    assert 2 <= found.candidates.height <= 6
    roles = dict(found.candidates.select("latent", "role").iter_rows())
    assert [latent for latent, role in roles.items() if role] == sorted(found.doses)
    assert list(roles.values()).count(IDLE) == 2
    for dose in found.doses.values():
        assert dose.strengths == ["1 raw", "4 raw"]
        assert dose.texts["prompt"].unique().to_list() == [0, 1]
    bundle = OpenBundle(BundlePlace(store, bundle_ref(pipeline, "demo").path))
    assert bundle.description["doses"]["latents"] == sorted(found.doses)
    for latent, role in roles.items():
        assert [(curve.recipe, curve.prompts) for curve in bundle.doses(latent)] == ([(f"found: {role}", ["word5", "word word"])] if role else [])
    (again,) = search.make(Job(World(pipeline.config), pipeline, store, ("demo",)))("demo")
    assert again.is_cached
    assert str(search.shows(Job(World(pipeline.config), pipeline, store, ("demo",)), "demo", [again])["curves"]).count("![") == len(found.doses)
    assert lab.Opened(pipeline, store).steering_search("demo").candidates.equals(found.candidates)
    tried, dosed = 6 * 3 * (2 * 4 + (10 + 1) / 4), 2 * 2 * (4 * 2 + 1) * (2 * 4 + (5 + 9) / 4)  # cells x tokens, new and the prompts'
    assert search.takes(pipeline, store, "demo").busy_s == pytest.approx(2 * (tried + dosed) / 6_000)
    assert search.obstacles is not None
    assert search.obstacles(pipeline, store) == []
    few = pipeline.config.model_copy(update={"steering": steering.model_copy(update={"prompts": ["a", "b"]})})
    assert "it takes 4, and there are 2" in search.obstacles(Pipeline(few, planned.plan), store)[0]


def test_candidates_are_live_and_even_over_how_often_they_fire() -> None:
    """Nobody picks them; a dead latent has no strength."""
    frequency, maximum = [0.5, 0.1, 0.0, 0.3, 0.2, 0.4], [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    assert choose_candidates(frequency, maximum, 2) == [4, 5]
    assert choose_candidates(frequency, maximum, 99) == [1, 4, 3, 5, 0]
    with pytest.raises(InputError, match="of 3 there are 1"):
        choose_candidates([0.1, 0.0, 0.0], [1.0, 0.0, 0.0], 2)


def test_movers_are_beyond_doubt_and_idle_ones_nearest_to_nothing() -> None:
    """A large mean with an interval over zero is no mover."""
    effects = {7: [2.0, 2.2], 8: [0.0, 9.0], 9: [0.5, 0.6], 4: [-0.1, 0.1], 5: [-3.0, -2.0]}

    def dose(effect: list[float]) -> Dose:
        lines = [
            {"arm": arm, "strength": "1 max", "prompt": i, "continuation": 0, "kl": value * (arm == "feature")}
            for arm in ("feature", "other", "random")
            for i, value in enumerate(effect)
        ]
        return Dose(pl.DataFrame(lines), "", ["1 max"], 0)

    table = rank_candidates(list(effects), [0.1] * 5, [dose(effect) for effect in effects.values()], 2)
    assert chosen_latents(table) == [7, 9, 4, 5]
    assert dict(table.select("latent", "role").iter_rows()) == {4: IDLE, 5: IDLE, 7: MOVER, 8: "", 9: MOVER}


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
