"""All four passes against brute force, on small integers: exact arithmetic, many ties."""

import io
import json
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import interp_assets.visualize.records
from interp_assets.errors import InputError, PlanError
from interp_assets.storage.manifest import load_manifest, read_file, remove_artifact
from interp_assets.storage.store import open_store
from interp_assets.storage.tensors import load_tensors
from interp_assets.visualize.candidates import find_candidates
from interp_assets.visualize.examples import select_examples
from interp_assets.visualize.gather import gathered_name
from interp_assets.visualize.records import write_records
from interp_assets.visualize.refs import windows_ref
from interp_assets.visualize.windows import fire_windows

SCHEMA = json.loads(Path(interp_assets.visualize.records.__file__).with_name("feature_record.schema.json").read_text(encoding="utf-8"))


def read_all(world, run_passes, read_records):
    """Run everything and read every record."""
    return [record for produced in run_passes(world) for record in read_records(world, produced)]


def check_statistics(record, wanted, n_digits=4):
    """Compare the numbers of a record with brute force."""
    statistics = record["statistics"]
    assert record["is_dead"] == (wanted["count"] == 0)
    assert statistics["count"] == wanted["count"] == sum(statistics["histogram"]["counts"])
    assert statistics["max"] == wanted["max"]
    assert statistics["frequency"] == float(f"{wanted['frequency']:.{n_digits}g}")
    assert statistics["mean"] == float(f"{wanted['sum'] / max(1, wanted['count']):.{n_digits}g}")


@pytest.mark.parametrize("one_per_document", [True, False])
@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk"])
def test_records_equal_brute_force(make_world, run_passes, read_records, expect_records, kind, one_per_document):
    """The whole chain, from rows to what a browser shows, agrees exactly with encoding and sorting everything."""
    world = make_world(kind, one_per_document=one_per_document)
    records = read_all(world, run_passes, read_records)
    assert [record["latent"] for record in records] == list(range(world.sae.d_sae))
    for record, wanted in zip(records, expect_records(world), strict=True):
        check_statistics(record, wanted)
        assert record["statistics"]["quantiles"] == wanted["quantiles"]
        for name in ("top", "intervals", "random"):
            assert record["examples"][name] == wanted[name], (record["latent"], name)


@pytest.mark.parametrize("scale", [0.123451, 0.0345149])
def test_values_beside_a_peak_are_rounded_once(make_world, run_passes, read_records, expect_records, scale):
    """To 3 digits at once: by way of the peak's 4 digits, 0.123451 became 0.1235, and then 0.124."""
    world = make_world("relu")
    world.sae.W_enc.mul_(scale)
    world.sae.b_enc.mul_(scale)
    world = world.variant()
    n_beside = n_otherwise = 0
    for record, wanted in zip(read_all(world, run_passes, read_records), expect_records(world), strict=True):
        for window, exact in zip(record["examples"]["random"], wanted["random"], strict=True):
            for (place, value), (exact_place, exact_value) in zip(window["activations"], exact["activations"], strict=True):
                n_digits = 4 if place == window["peak"] else 3
                assert (place, value) == (exact_place, float(f"{exact_value:.{n_digits - 1}e}"))
                n_beside += n_digits == 3
                n_otherwise += n_digits == 3 and value != float(f"{float(f'{exact_value:.3e}'):.2e}")
    assert n_beside > n_otherwise > 20


@pytest.mark.parametrize("one_per_document", [True, False])
def test_top_examples_that_repeat_a_text_are_shown_once(make_world, run_passes, read_records, expect_records, one_per_document):
    """Copied files fill the top of many latents. Two words make every text a copy of another; any cutting of the work agrees."""
    world = make_world("relu", one_per_document=one_per_document)
    for shard in world.shards:
        shard.token_ids = np.where(shard.valid, 1 + (shard.token_ids & 1), shard.token_ids).astype(np.uint32)
    shown = {}
    for n_tokens in (0, 1, 2):
        variant = world.variant(distinct_tokens=n_tokens, latent_slices=1 + n_tokens)
        records = read_all(variant, run_passes, read_records)
        shown[n_tokens] = [record["examples"]["top"] for record in records]
        assert shown[n_tokens] == [wanted["top"] for wanted in expect_records(variant)]
    assert len(set(map(str, shown.values()))) == 3


@pytest.mark.parametrize("kind", ["jump_relu", "topk"])
def test_keeping_candidates_gives_the_same_top_and_random_examples_and_windows(make_world, run_passes, read_records, expect_records, kind):
    """Windows computed from encoder rows equal those looked up, and the samples need no store of all firings."""
    world = make_world(kind, keep="candidates")
    for record, wanted in zip(read_all(world, run_passes, read_records), expect_records(world), strict=True):
        check_statistics(record, wanted)
        assert record["examples"]["top"] == wanted["top"]
        assert record["examples"]["random"] == wanted["random"]
        if wanted["count"] <= world.pipeline.config.features.n_random:
            assert record["examples"]["intervals"] == wanted["intervals"]
        for interval in record["examples"]["intervals"]:
            is_last = interval["high"] == record["statistics"]["max"]
            for window in interval["examples"]:
                assert interval["low"] <= window["activation"] < interval["high"] or (is_last and window["activation"] == interval["high"])


@pytest.mark.parametrize(("latent_slices", "rows_per_block"), [(1, 64), (5, 256)])
@pytest.mark.parametrize("kind", ["jump_relu", "topk"])
def test_cutting_latents_and_rows_otherwise_gives_the_same_records(make_world, run_passes, read_records, kind, latent_slices, rows_per_block):
    """Slices and blocks are how the work is done; they must not show in the evidence."""
    world = make_world(kind)
    expected = read_all(world, run_passes, read_records)
    other = world.variant(latent_slices=latent_slices, execution={"rows_per_block": rows_per_block})
    assert read_all(other, run_passes, read_records) == expected


def test_the_same_inputs_give_the_same_bytes(make_world, run_passes):
    """A rebuilt partition must leave everything downstream fresh."""
    world = make_world("topk")
    assert [produced.manifest.digest for produced in run_passes(world)] == [produced.manifest.digest for produced in run_passes(world.variant())]


def test_a_lost_partition_is_rebuilt_with_equal_bytes_and_finished_work_is_skipped(make_world, run_passes):
    """Losing one (shard, slice) costs that one job."""
    world = make_world()
    pipeline, store, sae = world.pipeline, world.store, world.sae
    records = run_passes(world)
    first = find_candidates(pipeline, store, sae, "demo", 1, 0)
    assert first.is_cached
    remove_artifact(store, first.ref.path)
    again = find_candidates(pipeline, store, sae, "demo", 1, 0)
    assert not again.is_cached
    assert again.manifest.digest == first.manifest.digest
    assert all(produced.is_cached for produced in run_passes(world))
    assert [produced.manifest.digest for produced in run_passes(world)] == [produced.manifest.digest for produced in records]


def test_every_record_is_valid_under_the_schema(make_world, run_passes, read_records):
    """The browser and the exporters rely on the schema, dead latents included."""
    for kind in ("jump_relu", "topk"):
        records = read_all(make_world(kind, seed=3), run_passes, read_records)
        assert any(record["is_dead"] for record in records)
        for record in records:
            jsonschema.validate(record, SCHEMA)


def _windows(record):
    """Return the distinct windows of a record."""
    examples = record["examples"]
    shown = [*examples["top"], *examples["random"], *(window for interval in examples["intervals"] for window in interval["examples"])]
    return {tuple(window["row"]): window for window in shown}.values()


def test_examples_of_messages_say_whose_words_they_show(make_world, run_passes, read_records):
    """A feature of questions and one of answers look alike without the roles; everything else of a record stays as it is."""
    world = make_world()
    rng = np.random.default_rng(5)
    for shard in world.shards:
        turns = np.cumsum(rng.random(len(shard.rows)) < 0.2) % 3
        shard.roles = [("template", "user", "assistant")[turn] for turn in turns]
    chat = world.variant(open_store("memory://chat"))
    records = read_records(chat, run_passes(chat)[0])
    n_changes = 0
    for record, plain in zip(records, read_records(world, run_passes(world)[0]), strict=True):
        for window in _windows(record):
            index, row = window["row"]
            first, roles = row - window["peak"], world.shards[index].roles
            said = roles[first : first + len(window["tokens"])]
            assert window.pop("roles") == [[i, said[i]] for i in range(len(said)) if i == 0 or said[i] != said[i - 1]]
            n_changes += len(set(said)) > 1
        assert record == plain
    assert n_changes > 50


def test_a_latent_that_never_fires_has_no_examples(make_world, run_passes, read_records):
    """Nothing is padded: an empty list tells the truth."""
    world = make_world()
    dead = read_all(world, run_passes, read_records)[-1]
    assert dead["is_dead"]
    assert dead["examples"] == {"top": [], "intervals": [], "random": []}
    assert dead["statistics"] == {"count": 0, "frequency": 0.0, "mean": 0.0, "max": 0.0, "quantiles": [], "histogram": {"edges": [], "counts": []}}
    assert len(dead["logits"]["top"]) == 10


def test_an_sae_without_a_live_latent_is_refused_with_what_to_change(make_world, run_passes):
    """Zero live latents is a failed training; the message names the fields to turn."""
    world = make_world("relu")
    world.sae.b_enc.fill_(-1000.0)
    world = world.variant()
    with pytest.raises(InputError, match=r"No latent of SAE 'demo' fires on any of the 455 valid rows.*sparsity_coefficient.*k \(now 5\)"):
        run_passes(world)


def test_each_pass_names_every_missing_partition(make_world, tokenizer, unembedding):
    """A lost shard is reported by name, never silently skipped."""
    world = make_world()
    pipeline, store, sae = world.pipeline, world.store, world.sae
    find_candidates(pipeline, store, sae, "demo", 1, 0)
    with pytest.raises(Exception, match=r"2 of 3 feature_candidates partitions are missing: shard-000000.slice-000, shard-000002.slice-000"):
        select_examples(pipeline, store, "demo", 0)
    with pytest.raises(Exception, match=r"2 of 2 feature_examples .* slice-000, slice-001"):
        fire_windows(pipeline, store, sae, "demo", 0)
    for index in (0, 2):
        find_candidates(pipeline, store, sae, "demo", index, 0)
    select_examples(pipeline, store, "demo", 0)
    with pytest.raises(Exception, match=r"3 of 3 example_activations .* shard-000000, shard-000001, shard-000002"):
        write_records(pipeline, store, "demo", sae, 0, tokenizer, unembedding)


def test_progress_counts_every_row_and_every_latent(make_world, tokenizer, unembedding, run_passes):
    """Bars in the command line and in Dagster are driven by these counts."""
    world, rows, latents = make_world(), [], []
    find_candidates(world.pipeline, world.store, world.sae, "demo", 2, 0, rows.append)
    assert sum(rows) == 230
    run_passes(world)
    other = world.variant(top_k=3)
    for index in range(3):
        for latent_slice in range(2):
            find_candidates(other.pipeline, other.store, other.sae, "demo", index, latent_slice)
    for latent_slice in range(2):
        select_examples(other.pipeline, other.store, "demo", latent_slice)
    for index in range(3):
        fire_windows(other.pipeline, other.store, other.sae, "demo", index)
    write_records(other.pipeline, other.store, "demo", other.sae, 1, tokenizer, unembedding, latents.append)
    assert sum(latents) == 12


def test_mean_sums_are_exact_in_units_of_two_to_the_minus_sixteen(make_world, run_passes, read_records):
    """Sums are integers, so no order of the shards can change a digit."""
    world = make_world("relu")
    for record, dense in zip(read_all(world, run_passes, read_records), np.concatenate(world.dense()).T, strict=True):
        assert record["statistics"]["mean"] == float(f"{dense.sum() / max(1, (dense > 0).sum()):.4g}")


@pytest.mark.parametrize("keep", ["all", "candidates"])
def test_gathered_rows_are_those_of_the_windows_and_change_nothing_else(make_world, run_passes, read_records, keep):
    """The literal way, for those who need the activations themselves: each row once, in order, for each latent slice."""
    world = make_world("jump_relu", keep=keep)
    expected = read_all(world, run_passes, read_records)
    other = world.variant(keep=keep, gather=True, n_random=12)
    assert read_all(other, run_passes, read_records) == expected
    for index, shard in enumerate(world.shards):
        ref = windows_ref(other.pipeline, "demo", index)
        manifest = load_manifest(other.store, ref)
        windows = pq.read_table(io.BytesIO(read_file(other.store, ref.path, manifest, "windows.parquet"))).to_pydict()
        for latent_slice, bounds in enumerate(((0, 12), (12, 24))):
            tensors = load_tensors(other.store, ref.path, manifest, gathered_name(latent_slice))
            columns = zip(windows["latent"], windows["first_row"], windows["length"], strict=True)
            rows = {row & 0xFFFFFFFF for latent, first, n in columns if bounds[0] <= latent < bounds[1] for row in range(first, first + n)}
            assert tensors["row"].tolist() == sorted(rows)
            assert torch.equal(tensors["activations"], shard.rows[tensors["row"]])


def test_a_gather_that_would_write_more_than_twice_the_shard_is_refused(make_world, run_passes):
    """At a million latents it is petabytes; the message says how much and what to do instead."""
    world = make_world("relu", gather=True, latent_slices=6)
    with pytest.raises(PlanError, match=r"Dataset shard 0 of SAE 'demo': the rows .* of 6 latent slices are .* times the shard's 150;"):
        run_passes(world)
