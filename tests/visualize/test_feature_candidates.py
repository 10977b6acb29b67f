"""Pass A: every firing, exact statistics, bounded state, and refusals."""

import io
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from interp_assets.corpus.tokens import load_tokens
from interp_assets.errors import ArtifactForeignError, ArtifactMissingError, InputError, NonFiniteError
from interp_assets.harvest.refs import activation_shard_ref, statistics_ref
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import create_artifact, read_file, remove_artifact
from interp_assets.storage.tensors import load_tensors
from interp_assets.train.checkpoint import save_sae
from interp_assets.train.refs import sae_ref
from interp_assets.visualize.candidates import CANDIDATES, FIRINGS, SAMPLE, STATISTICS, Job, find_candidates, in_sample
from interp_assets.visualize.encoder import Encoder, row_limits
from interp_assets.visualize.examples import select_examples
from interp_assets.visualize.statistics import as_statistics
from interp_assets.visualize.windows import WINDOWS, fire_windows


def run_pass(world, index, latent_slice):
    """Run pass A for one job."""
    return find_candidates(world.pipeline, world.store, world.sae, "demo", index, latent_slice)


def read_table(world, produced, name):
    """Read a Parquet file of an artifact whole."""
    return pq.read_table(io.BytesIO(read_file(world.store, produced.ref.path, produced.manifest, name)))


@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk"])
def test_every_firing_is_kept_once_with_its_activation(make_world, kind):
    """The store of all firings must equal a dense encode exactly: later passes look up instead of encoding."""
    world = make_world(kind, keep="all")
    for index, dense in enumerate(world.dense()):
        rows, latents = [], []
        for latent_slice in range(2):
            table = read_table(world, run_pass(world, index, latent_slice), FIRINGS)
            latents.append(table["latent"].to_numpy())
            rows.append((table["row_id"].to_numpy() - np.uint64(index << 40)).astype(np.int64))
            assert (table["activation"].to_numpy() == dense[rows[-1], latents[-1]]).all()
        expected_latents, expected_rows = np.nonzero(dense.T)
        assert (np.concatenate(latents) == expected_latents).all()
        assert (np.concatenate(rows) == expected_rows).all()


def test_the_sum_of_all_counts_is_the_number_of_firings(make_world):
    """Counts, histograms and stored firings are three ways to count the same thing."""
    world = make_world("relu")
    for index, dense in enumerate(world.dense()):
        for latent_slice, latents in enumerate((slice(0, 12), slice(12, 24))):
            produced = run_pass(world, index, latent_slice)
            tensors = load_tensors(world.store, produced.ref.path, produced.manifest, STATISTICS)
            assert (tensors["count"].numpy() == (dense[:, latents] > 0).sum(axis=0)).all()
            assert (tensors["histogram"].sum(dim=1) == tensors["count"]).all()
            statistics = as_statistics(latents.start, tensors)
            np.testing.assert_allclose(statistics.mean * statistics.count, dense[:, latents].sum(axis=0), rtol=1e-15)
            assert (tensors["maximum"].numpy() == dense[:, latents].max(axis=0)).all()
            assert produced.manifest.facts["n_firings"] == read_table(world, produced, FIRINGS).num_rows == int(tensors["count"].sum())


@pytest.mark.parametrize("spill_bytes", [1 << 30, 3000, 0])
def test_reducing_in_small_steps_gives_the_same_files(make_world, spill_bytes):
    """A job whose collection is full reduces it on the way, and whose memory is full spills; what it writes must not tell."""
    world = make_world("jump_relu", sizes=(700,))
    whole = run_pass(world, 0, 0)
    tokens, encoder = load_tokens(world.pipeline, world.store, 0), Encoder(world.sae, 0, 12, torch.device("cpu"))
    job = Job(world.pipeline, encoder, tokens, 0, whole.manifest.facts["histogram_origin"], n_full=100, spill_bytes=spill_bytes)
    for first in range(0, 700, 64):
        block = encoder.prepare(world.shards[0].rows[first : first + 64], 64, "here")
        for scan in encoder.scan(block, row_limits(tokens.valid[first : first + 64], -np.inf)):
            job.add(scan, first)
    ref = whole.ref._replace(path="elsewhere")
    with create_artifact(world.store, ref) as art:
        job.write(art)
    for name in (CANDIDATES, FIRINGS, SAMPLE):
        mine = pq.read_table(io.BytesIO(read_file(world.store, "elsewhere", art.manifest, name)))
        assert mine.equals(read_table(world, whole, name)), name
    assert (job._runs._file is not None) == (spill_bytes < 1 << 30)
    assert art.manifest.file(STATISTICS).checksums == whole.manifest.file(STATISTICS).checksums


def test_padding_of_rows_and_latents_never_fires(make_world):
    """The last block and the last tile are padded with zeros; a latent with a positive bias fires on rows of zeros."""
    world = make_world("relu", sizes=(70,))
    world.sae.b_enc.fill_(3.0)
    world = world.variant()
    dense = world.dense()[0]
    assert run_pass(world, 0, 1).manifest.facts["n_firings"] == (dense[:, 12:] > 0).sum()


def test_topk_fires_the_same_latents_in_every_slicing(make_world):
    """Which latents fire depends on the whole row, so a slice looks at the other slices' columns too."""
    world = make_world("topk", sizes=(300,))
    dense = world.dense()[0]
    assert ((dense > 0).sum(axis=1) <= 5).all()
    for latent_slices in (1, 5):
        other = world.variant(latent_slices=latent_slices)
        assert sum(run_pass(other, 0, i).manifest.facts["n_firings"] for i in range(latent_slices)) == (dense > 0).sum()


@pytest.mark.parametrize("latent_slices", [1, 3])
@pytest.mark.parametrize("keep", ["all", "candidates"])
def test_of_latents_that_tie_at_place_k_the_first_fire_everywhere(make_world, latent_slices, keep):
    """Tied latents stayed silent, all of them; so did the k-th where the next was one step of float32 below."""
    world = make_world("topk", sizes=(90,), keep=keep, latent_slices=latent_slices)
    world.sae.W_enc[:, 7], world.sae.b_enc[7] = world.sae.W_enc[:, 3], world.sae.b_enc[3]  # tie on every row
    world.sae.W_enc[:, 11], world.sae.b_enc[11] = 0, float(np.nextafter(np.float32(3), np.float32(4)))
    world.sae.W_enc[:, 12], world.sae.b_enc[12] = 0, 3.0
    world = world.variant()
    dense, pre = world.dense()[0], world.sae.pre_activations(world.shards[0].rows).numpy()
    order = np.argsort(-pre, axis=1, kind="stable")[:, :5]
    expected = np.zeros_like(pre)
    np.put_along_axis(expected, order, np.maximum(np.take_along_axis(pre, order, axis=1), 0), axis=1)
    assert (dense == np.where(world.shards[0].valid[:, None], expected, 0)).all()
    assert (np.sort(pre, axis=1)[:, -6] == np.sort(pre, axis=1)[:, -5]).any()
    found = [run_pass(world, 0, i) for i in range(latent_slices)]
    assert sum(produced.manifest.facts["n_firings"] for produced in found) == (dense > 0).sum()
    for i in range(latent_slices):
        select_examples(world.pipeline, world.store, "demo", i)
    table = read_table(world, fire_windows(world.pipeline, world.store, world.sae, "demo", 0), WINDOWS)
    for row in table.to_pylist():
        here = dense[row["first_row"] : row["first_row"] + row["length"], row["latent"]]
        assert row["offsets"] == np.flatnonzero(here).tolist()
        assert row["activations"] == here[here > 0].tolist()


def test_samples_of_lower_rates_lie_inside_those_of_higher_ones():
    """Shards of different sizes offer different rates; pass D takes the lowest from all."""
    row_ids = np.arange(20_000, dtype=np.uint64)
    samples = [in_sample(row_ids, rate, 0) for rate in (0.05, 0.2, 0.7, 1.0)]
    for low, high in pairwise(samples):
        assert (high | ~low).all()
    assert abs(samples[1].mean() - 0.2) < 0.015
    assert samples[3].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_rows_that_are_not_finite_are_refused_with_their_place(make_world, bad):
    """A comparison with NaN is false: without this check firings would be lost in silence."""
    world = make_world("relu", sizes=(150,))
    world.shards[0].rows[101, 3] = bad
    world = world.variant()
    with pytest.raises(NonFiniteError, match=r"Activation shard 0 at resid_post.0, from row 64 \+ 37: a NaN, an infinity or a value above"):
        run_pass(world, 0, 0)


def test_weights_that_are_not_finite_are_refused(make_world):
    """A diverged SAE must not become an empty browser."""
    world = make_world("relu")
    world.sae.W_enc[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="W_enc holds a NaN"):
        Encoder(world.sae, 0, 4, torch.device("cpu"))


def test_an_sae_of_another_size_is_refused(make_world):
    """An SAE trained for another hook point has another d_in; the message says both."""
    world = make_world("relu")
    wide = replace(world.sae, W_enc=torch.zeros(9, 24), W_dec=torch.zeros(24, 9), b_dec=torch.zeros(9))
    with pytest.raises(InputError, match=r"SAE 'demo' is 9 x 24 .* say 8 x 24.*Train it again"):
        find_candidates(world.pipeline, world.store, wide, "demo", 0, 0)


def test_an_sae_of_another_hook_point_of_the_same_width_is_refused(make_world):
    """Widths cannot tell two layers apart, the artifact can: one that was put in another's place would show features that are none."""
    world, other_point = make_world("relu", sizes=(150,)), "resid_post.1"
    content = json.loads(world.pipeline.config.model_dump_json())
    content["harvest"]["hook_points"] = ["resid_post.0", other_point]
    content["saes"][0]["hook_point"] = other_point
    plan = replace(world.pipeline.plan, hook_widths={"resid_post.0": 8, other_point: 8})
    other = Pipeline(make_config(content), plan)
    mine, theirs = sae_ref(other, "demo"), sae_ref(world.pipeline, "demo")
    for item in list(world.store.list(theirs.path)):
        world.store.put(f"{mine.path}/{item.path.removeprefix(theirs.path + '/')}", world.store.get(item.path))
    with pytest.raises(ArtifactForeignError, match=f"holds sae {theirs.artifact_id}, expected sae {mine.artifact_id}"):
        find_candidates(other, world.store, world.sae, "demo", 0, 0)


def test_activations_that_do_not_fit_their_tokens_are_refused(make_world):
    """A truncated activation shard would shift every example by some tokens."""
    world = make_world("relu", sizes=(150,))
    world.shards[0].rows = world.shards[0].rows[:-1]
    world = world.variant()
    with pytest.raises(InputError, match="has 149 rows, its token shard 150"):
        run_pass(world, 0, 0)


def test_candidates_of_an_earlier_training_are_redone_and_never_mixed(make_world):
    """One recipe has one artifact id, but two trainings of it may differ: the digest of the SAE tells."""
    world = make_world("relu")
    old = [run_pass(world, index, 0) for index in range(3)]
    world.sae.b_enc.sub_(1)
    remove_artifact(world.store, sae_ref(world.pipeline, "demo").path)
    with create_artifact(world.store, sae_ref(world.pipeline, "demo")) as art:
        save_sae(art, world.sae, world.pipeline, world.pipeline.config.sae("demo"), l0=4.0)
    again = run_pass(world, 1, 0)
    assert not again.is_cached
    assert again.manifest.facts["n_firings"] < old[1].manifest.facts["n_firings"]
    with pytest.raises(Exception, match=r"2 of 3 feature_candidates .* earlier training of the SAE, .*: shard-000000.slice-000, shard"):
        select_examples(world.pipeline, world.store, "demo", 0)


def test_missing_statistics_are_reported_with_the_asset_to_materialize(make_world):
    """Histograms begin where the statistics say; without them nothing may be guessed."""
    world = make_world("relu")
    remove_artifact(world.store, statistics_ref(world.pipeline, "resid_post.0").path)
    with pytest.raises(ArtifactMissingError, match=r"resid_post.0/statistics-.* Materialize it first"):
        run_pass(world, 0, 0)


def test_activations_that_are_not_there_are_reported_by_their_partition(make_world):
    """A shard that was lost since it was harvested must not become a shard in which nothing fires."""
    world = make_world("relu", sizes=(60,))
    remove_artifact(world.store, activation_shard_ref(world.pipeline, "resid_post.0", 0).path)
    with pytest.raises(ArtifactMissingError, match=r"shard-000000"):
        run_pass(world, 0, 0)
