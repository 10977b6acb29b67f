"""The format pages of the shuffle describe what the code writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from shuffle_world import HOOK, make_world, row_values, run_shuffle

from interp_assets.shuffle.certificate import certify
from interp_assets.shuffle.plan import PLAN, decode_plan, encode_plan, make_content
from interp_assets.shuffle.refs import mixed_shard_ref, shuffle_plan_ref, split_shard_ref
from interp_assets.storage.manifest import load_manifest, read_file
from interp_assets.storage.store import Store

PAGES = Path(__file__).parents[2] / "docs" / "formats"


def page(name: str) -> str:
    """Return the text of a page."""
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def block(name: str, language: str) -> str:
    """Return the first block of code in a language on a page."""
    return page(name).partition(f"```{language}\n")[2].partition("```")[0]


def test_the_example_of_a_plan_is_one_to_the_last_byte() -> None:
    """Its counts are real draws: a changed sampler changes the page."""
    plan = decode_plan(block("shuffle_plan", "json").encode(), "the page")
    assert encode_plan(make_content(plan.seed, plan.shards, plan.sizes)).decode() == block("shuffle_plan", "json")


def test_a_split_shard_is_read_as_the_page_says(local_store: Store) -> None:
    """With NumPy alone."""
    world = make_world((40, 30), invalid_every=7, store=local_store)
    run_shuffle(world)
    ref = split_shard_ref(world.pipeline, HOOK, 2)
    names = {"folder": local_store.local_path(ref.path)}
    exec(block("split_shard", "python"), names)
    records = names["records"]
    assert np.array_equal(records["row"], row_values(HOOK, records["row_id"], 4))
    assert set(records["row_id"] >> 40) == {2}
    ranges = load_manifest(local_store, ref).facts["ranges"]
    assert len(records) == ranges[2] - ranges[1] > 0


def test_a_mixed_shard_is_read_as_the_page_says(local_store: Store) -> None:
    """With safetensors alone; the first row's bytes are where the page puts them."""
    world = make_world((40, 30), store=local_store)
    run_shuffle(world)
    ref = mixed_shard_ref(world.pipeline, HOOK, 1)
    folder = local_store.local_path(ref.path)
    names: dict[str, object] = {"folder": folder}
    exec(block("mixed_shard", "python"), names)
    tensors = names["tensors"]
    assert np.array_equal(tensors["rows"], row_values(HOOK, tensors["row_ids"], 4))
    assert set(names["shard_index"].tolist()) == {1, 2}
    data = (folder / "rows.safetensors").read_bytes()
    assert data[4096 : 4096 + 16] == tensors["rows"][:1].tobytes()


def test_every_finding_and_key_of_a_certificate_is_on_its_page() -> None:
    """A new finding needs a line."""
    world = make_world((900, 900), fan_out=4)
    run_shuffle(world)
    done = certify(world.pipeline, world.store, HOOK)
    content = json.loads(read_file(world.store, done.ref.path, done.manifest, "certificate.json"))
    names = [*content, *content["lags"][0], *content["findings"][0], *[item["name"] for item in content["findings"]]]
    assert len(content["findings"]) == 10
    for name in names:
        assert f"`{name}`" in page("shuffle_certificate") or f"`{name}[]`" in page("shuffle_certificate"), name


@pytest.mark.parametrize("kind", ["shuffle_plan", "split_shard", "mixed_shard", "shuffle_certificate"])
def test_every_fact_is_on_its_page(kind: str) -> None:
    """Later stages and people read facts."""
    for passes in (1, 2):
        world = make_world((900, 900), passes=passes, fan_out=4)
        run_shuffle(world)
        done = certify(world.pipeline, world.store, HOOK)
        refs = {
            "shuffle_plan": shuffle_plan_ref(world.pipeline),
            "split_shard": split_shard_ref(world.pipeline, HOOK, 1) if passes > 1 else mixed_shard_ref(world.pipeline, HOOK, 0),
            "mixed_shard": mixed_shard_ref(world.pipeline, HOOK, 0),
            "shuffle_certificate": done.ref,
        }
        described = page(kind) + (page("mixed_shard") if passes == 1 else "")
        for fact in load_manifest(world.store, refs[kind]).facts:
            assert f"`{fact}`" in described, fact


def test_every_key_of_a_plan_is_on_its_page() -> None:
    """The same for the plan."""
    world = make_world((40, 30), passes=3)
    run_shuffle(world)
    ref = shuffle_plan_ref(world.pipeline)
    content = json.loads(world.store.get(f"{ref.path}/{PLAN}"))
    for name in [*content, *content["shards"][0], *content["distributing_passes"][0]]:
        assert f"`{name}`" in page("shuffle_plan") or f"`{name}[]`" in page("shuffle_plan"), name
