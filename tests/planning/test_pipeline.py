"""From a configuration and a plan, every artifact's place follows."""

import json
from dataclasses import replace

import pytest

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import ArtifactCorruptError, ArtifactForeignError, ArtifactMissingError, ConfigError
from interp_assets.harvest.refs import activation_shard_ref, hook_folder, statistics_ref
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline, load_configuration, load_pipeline, save_configuration, save_plan, shard_index, shard_key
from interp_assets.shuffle.refs import mixed_shard_ref, shuffle_plan_ref, split_shard_ref
from interp_assets.storage.manifest import CONFIGURATION
from interp_assets.storage.store import Store
from interp_assets.storage.verify import verify_tree
from interp_assets.train.refs import sae_ref
from interp_assets.visualize.assets import make_assets
from interp_assets.visualize.refs import candidates_ref, examples_ref, records_ref, slice_bounds, windows_ref
from interp_assets.web.refs import bundle_ref


def _with(pipeline: Pipeline, **sections: dict) -> Pipeline:
    config = pipeline.config
    for name, changes in sections.items():
        config = config.model_copy(update={name: getattr(config, name).model_copy(update=changes)})
    return replace(pipeline, config=config)


def _ids(pipeline: Pipeline) -> dict[str, str]:
    refs = [
        *[token_shard_ref(pipeline, i) for i in pipeline.shard_indices],
        *[activation_shard_ref(pipeline, "resid_post.0", i) for i in pipeline.shard_indices],
        statistics_ref(pipeline, "resid_post.0"),
        shuffle_plan_ref(pipeline),
        *[split_shard_ref(pipeline, "resid_post.0", i) for i in pipeline.train_indices],
        mixed_shard_ref(pipeline, "resid_post.0", 0),
        sae_ref(pipeline, "demo"),
        candidates_ref(pipeline, "demo", 2, 1),
        bundle_ref(pipeline, "demo"),
    ]
    return {ref.path.rpartition("-")[0]: ref.artifact_id for ref in refs}


def _changed(a: Pipeline, b: Pipeline) -> set[str]:
    before, after = _ids(a), _ids(b)
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_execution_settings_never_change_an_id(small_pipeline: Pipeline) -> None:
    """Moving to another machine must reuse all work."""
    moved = _with(small_pipeline, execution={"device": "cuda", "tokens_per_batch": 7, "processes": 4}, shuffle={"memory_bytes": 1 << 21})
    moved = replace(moved, config=moved.config.model_copy(update={"root": "s3://elsewhere"}))
    assert _changed(small_pipeline, moved) == set()


def test_a_changed_text_changes_its_shard_and_what_depends_on_it(small_pipeline: Pipeline) -> None:
    """The other shards' forward passes are the expensive part, and are reused."""
    shards = [replace(s, fingerprint="edited") if s.index == 2 else s for s in small_pipeline.plan.shards]
    changed = _changed(small_pipeline, replace(small_pipeline, plan=replace(small_pipeline.plan, shards=shards)))
    assert "1-corpus/shard-000002" in changed
    assert "2-activations/resid_post.0/shard-000002" in changed
    assert "3-shuffle/resid_post.0/mixed/bucket-00000" in changed
    assert not any("shard-000001" in name and not name.startswith("3-") for name in changed)


def test_a_new_sae_recipe_leaves_the_data_alone(small_pipeline: Pipeline) -> None:
    """A sweep must not harvest or shuffle again."""
    saes = [small_pipeline.config.saes[0].model_copy(update={"learning_rate": 1e-3})]
    other = replace(small_pipeline, config=small_pipeline.config.model_copy(update={"saes": saes}))
    assert {name.split("/")[0] for name in _changed(small_pipeline, other)} == {"4-sae", "5-features", "6-web"}


@pytest.mark.parametrize(
    ("changes", "stay"),
    [
        ({"window": 5}, {"candidates", "examples"}),
        ({"gather": True}, {"candidates", "examples", "records"}),
        ({"n_intervals": 3}, {"candidates"}),
        ({"examples_per_interval": 2}, {"candidates"}),
        ({"distinct_tokens": 5}, {"candidates"}),
        ({"distinct_tokens": 0}, set()),
        ({"n_random": 7}, set()),
        ({"saes": ["demo", "other"]}, {"candidates", "examples", "windows", "records"}),
    ],
)
def test_a_pass_is_made_again_only_for_what_it_reads(small_pipeline: Pipeline, changes: dict, stay: set[str]) -> None:
    """Pass A reads all activations: a wider window or more intervals must not ask for that again, nor say so in Dagster."""

    def ids(pipeline: Pipeline) -> dict[str, tuple[str, str]]:
        refs = {
            "candidates": candidates_ref(pipeline, "demo", 2, 1),
            "examples": examples_ref(pipeline, "demo", 1),
            "windows": windows_ref(pipeline, "demo", 2),
            "records": records_ref(pipeline, "demo", 1),
        }
        names = {"candidates": "feature_candidates", "examples": "feature_examples", "windows": "example_activations", "records": "feature_records"}
        versions = {asset.key: str(asset.code_version) for asset in make_assets(pipeline.config)}
        return {which: (ref.artifact_id, versions["features", "demo", names[which]]) for which, ref in refs.items()}

    before, after = ids(small_pipeline), ids(_with(small_pipeline, features=changes))
    for i in range(2):
        assert {which for which in before if before[which][i] == after[which][i]} == stay


def test_names_of_folders_are_no_identity_but_of_the_bundle_that_shows_them(small_pipeline: Pipeline) -> None:
    """The same weights and text under another path are the same: nothing is harvested or trained again."""
    moved = _with(small_pipeline, model={"name": "/models/renamed"}, corpus={"path": "/texts/renamed"})
    assert {name.split("/")[0] for name in _changed(small_pipeline, moved)} == {"6-web"}


def test_a_changed_model_leaves_the_tokens_alone(small_pipeline: Pipeline) -> None:
    """Same tokenizer, other weights: token shards stay."""
    other = replace(small_pipeline, plan=replace(small_pipeline.plan, model_fingerprint="other"))
    changed = _changed(small_pipeline, other)
    assert not any(name.startswith("1-") for name in changed)
    assert "2-activations/resid_post.0/shard-000000" in changed


def test_the_plan_survives_the_store(small_pipeline: Pipeline, memory_store: Store) -> None:
    """Every job starts by reading it; writing the same plan again changes nothing."""
    assert save_plan(memory_store, small_pipeline.plan)
    assert not save_plan(memory_store, small_pipeline.plan)
    assert load_pipeline(small_pipeline.config, memory_store) == small_pipeline


@pytest.mark.parametrize(("aliases", "version"), [({}, 1), ({"q.0": "blocks.0.attn.hook_q"}, 3)])
def test_a_plan_has_the_lowest_version_that_knows_its_keys(
    small_pipeline: Pipeline, memory_store: Store, aliases: dict[str, str], version: int
) -> None:
    """An earlier release refuses what it does not know, and nothing else."""
    plan = replace(small_pipeline.plan, hook_aliases=aliases)
    save_plan(memory_store, plan)
    content = json.loads(memory_store.get("plan.json"))
    assert (content["version"], content.get("hook_aliases", {})) == (version, aliases)
    assert load_pipeline(small_pipeline.config, memory_store).plan == plan


def test_no_plan_and_a_damaged_plan_say_what_to_do(small_pipeline: Pipeline, memory_store: Store) -> None:
    """The first thing a new user meets."""
    with pytest.raises(ArtifactMissingError, match=r"'small' has no plan at .*Materialize `corpus_plan`"):
        load_pipeline(small_pipeline.config, memory_store)
    memory_store.put("plan.json", b'{"format": ')
    with pytest.raises(ArtifactCorruptError, match=r"is damaged .*Materialize `corpus_plan` again"):
        load_pipeline(small_pipeline.config, memory_store)


def test_a_newer_plan_is_named_and_not_called_damaged(small_pipeline: Pipeline, memory_store: Store) -> None:
    """In a cluster of two releases the remedy is to update, not to look for a broken disk."""
    save_plan(memory_store, small_pipeline.plan)
    plan = json.loads(memory_store.get("plan.json"))
    memory_store.put("plan.json", json.dumps({**plan, "version": 9, "news": 1}).encode())
    with pytest.raises(ArtifactForeignError, match=r"is \('interp-assets/plan', 9\), this release reads .*\(1, 2, 3\)\. Use the release"):
        load_pipeline(small_pipeline.config, memory_store)


def test_a_plan_that_counts_empty_files_is_still_read(small_pipeline: Pipeline, memory_store: Store) -> None:
    """Some plans of version 1 have two keys more, and what was made under them must not be refused."""
    save_plan(memory_store, small_pipeline.plan)
    plan = json.loads(memory_store.get("plan.json"))
    memory_store.put("plan.json", json.dumps({**plan, "n_empty_files": 1, "empty_files": ["a"]}).encode())
    assert load_pipeline(small_pipeline.config, memory_store) == small_pipeline


def test_held_out_shards_are_never_trained_on(small_pipeline: Pipeline) -> None:
    """They measure; they must stay the same ones when more text lands."""
    assert small_pipeline.held_out_indices == [0]
    assert small_pipeline.train_indices == [1, 2, 3]


def test_keys_go_both_ways() -> None:
    """Partition keys are the addresses that people see."""
    assert shard_index(shard_key(17)) == 17
    with pytest.raises(ConfigError, match="'bucket-1' is no shard key; they look like 'shard-000017'"):
        shard_index("bucket-1")


def test_slices_cover_every_latent_once(small_pipeline: Pipeline) -> None:
    """A latent in no slice would silently have no feature."""
    pipeline = _with(small_pipeline, features={"latent_slices": 5})
    bounds = [slice_bounds(pipeline, "demo", i) for i in range(5)]
    assert [latent for start, stop in bounds for latent in range(start, stop)] == list(range(32))


def test_hook_points_become_safe_folders() -> None:
    """`module:` paths hold characters that object stores dislike."""
    assert hook_folder("module:model.layers.3") == "module_model.layers.3"


def test_a_folder_says_what_it_was_planned_from(small_pipeline: Pipeline, local_store: Store) -> None:
    """Who opens the folder has not the file that somebody wrote. A candidate's plan must not take its place, and verifying finds nothing odd."""
    save_configuration(local_store, small_pipeline.config)
    candidate = {**small_pipeline.config.model_dump(), "execution": {"plan": "candidate.json"}}
    save_configuration(local_store, make_config(candidate))
    assert load_configuration(local_store) == small_pipeline.config
    assert verify_tree(local_store) == []
    local_store.put(CONFIGURATION, b'{"name": 3')
    with pytest.raises(ArtifactCorruptError, match=r"pipeline\.json is damaged .*Name the pipeline's YAML instead"):
        load_configuration(local_store)
