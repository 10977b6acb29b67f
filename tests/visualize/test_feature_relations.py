"""What weights, statistics and co-firing tell about a latent, against the obvious formulas."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp_assets.errors import ArtifactCorruptError, NonFiniteError
from interp_assets.garcon.subject import Unembedding
from interp_assets.storage.manifest import create_artifact, make_ref
from interp_assets.storage.store import open_store
from interp_assets.visualize.digits import round_significant
from interp_assets.visualize.firings import FIRING_SCHEMA, Firings, sort_firings
from interp_assets.visualize.logits import measure_logits, used_token_ids
from interp_assets.visualize.neighbours import find_coactivations, find_neighbours, make_sample
from interp_assets.visualize.record_windows import DatasetShard, read_examples
from interp_assets.visualize.records import _at, write_records
from interp_assets.visualize.statistics import (
    LatentStatistics,
    add_firings,
    bin_edges,
    empty_statistics,
    exact_quantiles,
    histogram_origin,
    histogram_quantiles,
    merge_statistics,
)
from interp_assets.visualize.tables import LatentTable, create_table
from interp_assets.visualize.windows import window_bounds


def measure_firings(firings: Firings, origin: int) -> LatentStatistics:
    """Compute the statistics of firings alone."""
    found = empty_statistics(firings.start, firings.n_latents)
    add_firings(found, firings, origin)
    return found


def random_firings(seed, n=4000, n_latents=7):
    """Make firings with log-normal activations."""
    rng = np.random.default_rng(seed)
    latents = rng.integers(0, n_latents - 1, n).astype(np.uint16)  # the last latent is dead
    return sort_firings(3, n_latents, latents, np.arange(n, dtype=np.uint64), np.exp(rng.normal(0, 1.5, n)).astype(np.float32))


def test_histogram_bins_are_quarter_octaves_between_the_published_edges():
    """The record lists edges; each firing must lie between those of its bin, the outer bins hold the rest."""
    firings = random_firings(0)
    statistics, edges = measure_firings(firings, -2), bin_edges(-2)
    assert edges[0] == 0.25
    assert edges[4] == 0.5
    assert edges[-1] == 2.0**14
    for i in range(firings.n_latents):
        values = firings.activations[firings.offsets[i] : firings.offsets[i + 1]]
        expected = np.histogram(np.clip(values, edges[0], edges[-1] * 0.999), edges)[0]
        assert (statistics.histogram[i] == expected).all()


def test_statistics_merge_to_the_same_bits_however_rows_are_cut():
    """Integers add up in any order; a retried or re-cut job changes nothing."""
    firings = random_firings(1)
    whole = measure_firings(firings, -3)
    owner = np.random.default_rng(2).integers(0, 5, len(firings.row_ids))
    merged = merge_statistics([measure_firings(firings.take(owner == i), -3) for i in (3, 0, 4, 1, 2)])
    for name in ("count", "sum_digits", "histogram", "maximum"):
        assert (getattr(merged, name) == getattr(whole, name)).all()


@given(
    st.lists(st.lists(st.floats(2.0**-149, 2.0**127, width=32), min_size=1, max_size=40), min_size=1, max_size=6),
    st.sampled_from([1e-44, 1e-38, 1e-5, 1e-3, 1.0, 1e4, 1e37]),
    st.randoms(use_true_random=False),
)
def test_means_are_exact_at_any_scale_and_in_any_order(latents, scale, order):
    """A hook point of small activations has means as good as another's, and one latent may be far from the others."""
    typical = [scale * (1 + i) / 7 for i in range(200)]
    rows = [(i, np.float32(value)) for i, values in enumerate([typical, *latents]) for value in values]
    order.shuffle(rows)
    parts = [rows[start::3] for start in range(3)]
    total = merge_statistics([_measure_pairs(part, len(latents) + 1) for part in parts])
    for i in range(len(latents) + 1):
        values = [float(value) for latent, value in rows if latent == i]
        assert total.mean[i] == pytest.approx(math.fsum(values) / len(values), rel=1e-15)
    assert (total.sum_digits == _measure_pairs(rows[::-1], len(latents) + 1).sum_digits).all()
    assert total.sum_digits[:, :-1].max() < 1 << 32


def _measure_pairs(pairs, n_latents):
    latents, values = np.array([latent for latent, _ in pairs], np.uint16), np.array([value for _, value in pairs], np.float32)
    return measure_firings(sort_firings(0, n_latents, latents, np.arange(len(pairs), dtype=np.uint64), values), 0)


def test_quantiles_are_values_of_firings_and_the_histogram_comes_near():
    """Exact quantiles are the interval edges; from a histogram they are off by a bin at most."""
    firings = random_firings(2)
    counts = np.diff(firings.offsets)
    exact = exact_quantiles(counts, firings.activations, 10)
    for i in range(6):
        values = np.sort(firings.activations[firings.offsets[i] : firings.offsets[i + 1]])
        assert (exact[i] == values[np.arange(11) * (len(values) - 1) // 10]).all()
    assert np.isnan(exact[6]).all()
    estimated = histogram_quantiles(measure_firings(firings, -8), -8, 10)
    assert np.isnan(estimated[6]).all()
    assert (estimated[:6, -1] == exact[:6, -1]).all()
    assert (np.abs(np.log2(estimated[:6, 1:] / exact[:6, 1:])) < 0.33).all()


def test_the_histogram_covers_what_an_sae_can_do():
    """Sixteen octaves end two above mean norm x typical column length."""
    W_enc = torch.zeros(4, 3)
    W_enc[0] = 2.0
    assert histogram_origin(8.0, W_enc) == 4 + 2 - 16
    pruned = torch.cat([W_enc, torch.zeros(4, 9)], dim=1)
    assert histogram_origin(8.0, pruned) == 4 + 2 - 16, "latents that were pruned say nothing of the others"
    with pytest.raises(NonFiniteError, match="mean row norm of the activation statistics is inf"):
        histogram_origin(float("inf"), W_enc)


def test_logit_effects_leave_out_special_and_unknown_tokens(tokenizer, unembedding):
    """BOS and the embedding's padding rows have large meaningless effects."""
    used = used_token_ids(tokenizer, 52)
    assert used.tolist() == list(range(1, 50))
    directions = torch.from_numpy(np.random.default_rng(0).integers(-2, 3, (30, 8))).float()
    found = measure_logits(directions, unembedding.matrix, used)
    effects = (directions @ unembedding.matrix).numpy()[:, used]
    for i in range(30):
        assert (found.top[i] == np.sort(effects[i])[::-1][:10]).all()
        assert (found.bottom[i] == np.sort(effects[i])[:10]).all()
        assert (effects[i][found.top_ids[i] - 1] == found.top[i]).all()
        assert (effects[i][found.bottom_ids[i] - 1] == found.bottom[i]).all()
        assert found.low[i] == effects[i].min()
        assert found.histogram[i].sum() == 49
        places = (effects[i] - found.low[i]) * (np.float32(40) / (found.high[i] - found.low[i]))
        assert (found.histogram[i] == np.bincount(np.minimum(places.astype(int), 39), minlength=40)).all()


def test_neighbours_are_the_nearest_decoder_rows():
    """Exact, in blocks, never the latent itself; a decoder row of zeros is near to nothing."""
    W_dec = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    W_dec[5] = 0
    found = find_neighbours(W_dec, 10, 25)
    units = (W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-30)).double()
    cosines = (units @ units.T).fill_diagonal_(-9)
    for i in range(15):
        best = cosines[10 + i].topk(10)
        assert found.latents[i].tolist() == best.indices.tolist()
        assert np.allclose(found.cosines[i], best.values.numpy(), atol=1e-6)


@pytest.mark.parametrize(("n_latents", "rate"), [(12, 0.4), (300, 0.02)])
def test_coactivations_equal_the_matrix_of_shared_rows(n_latents, rate):
    """Counts of shared rows by a dense product, for few latents that fire often and many that fire rarely."""
    fires = np.random.default_rng(0).random((500, n_latents)) < rate
    fires[:, 3] = False
    rows, latents = np.nonzero(fires)
    shuffled = np.random.default_rng(1).permutation(len(rows))
    sample = make_sample(latents[shuffled], (rows[shuffled] * 7 + 3).astype(np.uint64), n_latents)
    start, stop = 2, n_latents - 3
    found = find_coactivations(sample, start, stop)
    shared = fires.T.astype(np.int64) @ fires
    counts = fires.sum(axis=0)
    for i, latent in enumerate(range(start, stop)):
        others = [other for other in range(n_latents) if other != latent and shared[latent, other] >= 2]
        cosine = {other: np.float32(shared[latent, other] / np.sqrt(counts[latent] * counts[other])) for other in others}
        expected = sorted(others, key=lambda other: (-cosine[other], other))[:10]
        mine = slice(found.offsets[i], found.offsets[i + 1])
        assert found.partners[mine].tolist() == expected
        assert found.rows[mine].tolist() == [shared[latent, other] for other in expected]
        assert found.cosines[mine].tolist() == [cosine[other] for other in expected]


def test_nothing_that_fires_has_no_coactivations():
    """An empty sample gives empty lists, not an error."""
    found = find_coactivations(make_sample(np.empty(0, np.int64), np.empty(0, np.uint64), 9), 0, 4)
    assert found.offsets.tolist() == [0, 0, 0, 0, 0]


def test_windows_stop_at_contexts_documents_and_the_ends_of_the_shard():
    """Two neighbouring rows of different documents have nothing to do with each other."""
    contexts = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.uint32)
    documents = np.array([0, 0, 1, 1, 1, 1, 1, 1], np.uint32)
    firsts, lengths = window_bounds(contexts, documents, np.array([0, 1, 2, 3, 4, 7]), 2)
    assert firsts.tolist() == [0, 0, 2, 2, 4, 5]
    assert lengths.tolist() == [2, 2, 2, 2, 3, 3]
    assert window_bounds(contexts, documents, np.array([5]), 0) == (np.array([5]), np.array([1]))


def test_numbers_are_rounded_to_four_digits():
    """People read them; JSON must not show seventeen digits."""
    values = np.array([0.0, 1.23456, 98765.4, 0.000123456, -7.0, 2.0**-20, 3e9])
    assert round_significant(values).tolist() == [0.0, 1.235, 98770.0, 0.0001235, -7.0, 9.537e-07, 3e9]
    assert json.dumps(round_significant(np.float32([0.1, 0.7])).tolist()) == "[0.1, 0.7]"


def test_an_encoder_or_another_width_has_no_logits_and_says_why(make_world, run_passes, read_records, tokenizer):
    """The browser shows the reason instead of an empty box."""
    world = make_world()
    run_passes(world)
    for reason, unembedding in (
        ("bert has no language-model head", Unembedding(None, "bert has no language-model head")),
        ("the hook point has 8 dimensions, the residual stream 9", Unembedding(torch.zeros(9, 52), "")),
    ):
        other = world.variant(store=open_store("memory://other"))
        run_passes(other)
        from interp_assets.storage.manifest import remove_artifact
        from interp_assets.visualize.refs import records_ref

        remove_artifact(other.store, records_ref(other.pipeline, "demo", 0).path)
        produced = write_records(other.pipeline, other.store, "demo", other.sae, 0, tokenizer, unembedding)
        assert produced.manifest.facts["logits_reason"] == reason
        record = read_records(other, produced)[0]
        assert (record["logits"], record["logits_reason"]) == (None, reason)


@pytest.mark.parametrize(("hook_point", "is_on_stream"), [("resid_post.0", True), ("z.0", False), ("module:h.0", True), ("module:h.0.q_norm", False)])
def test_logit_effects_are_shown_only_where_they_mean_something(hook_point, is_on_stream):
    """A query projection, or the heads before W_O, may be as wide as the residual stream, and their directions move no logits."""
    matrix = torch.zeros(8, 52)
    found = _at(Unembedding(matrix, "", frozenset({"h.0", "h.0.mlp"})), hook_point)
    assert (found.matrix is matrix) == is_on_stream
    assert (f"{hook_point.removeprefix('module:')} is not known to write to it" in found.reason) != is_on_stream


def test_tables_are_read_by_ranges_of_latents_across_row_groups():
    """Row groups hold a million rows, so a range may begin in one and end in another, and a latent may fill several."""
    rng = np.random.default_rng(0)
    latents = np.sort(rng.integers(0, 40, 2_500_000)).astype(np.uint32)
    columns = {"latent": latents, "row_id": np.arange(len(latents), dtype=np.uint64), "activation": rng.random(len(latents), dtype=np.float32)}
    store, ref = open_store("memory://tables"), make_ref("table", "t", identity={}, inputs={}, label="l")
    with create_artifact(store, ref) as art, create_table(art, "firings.parquet", FIRING_SCHEMA) as table:
        for part in np.array_split(np.arange(len(latents)), 7):
            table.append({name: column[part] for name, column in columns.items()})
    assert art.manifest
    reader = LatentTable(store, ref.path, art.manifest, "firings.parquet")
    assert (reader.start, reader.stop) == (0, 40)
    for start, stop in ((0, 40), (3, 4), (13, 21), (39, 50), (50, 60)):
        wanted = (latents >= start) & (latents < stop)
        found = reader.read(start, stop)
        assert all((found[name] == columns[name][wanted]).all() for name in columns)
    for first, last in ((0, 10), (1_048_570, 1_048_580), (900_000, 2_400_000), (2_499_999, 2_500_000), (7, 7)):
        assert (reader.read_rows(first, last, "activation") == columns["activation"][first:last]).all()
    assert art.manifest.n_bytes / len(latents) < 7.5


def test_an_example_without_its_window_is_reported(make_world, run_passes):
    """Windows that were made from other examples must not be shown for these."""
    world = make_world()
    run_passes(world)
    from interp_assets.corpus.tokens import load_documents, load_tokens
    from interp_assets.storage.manifest import load_manifest
    from interp_assets.visualize.refs import examples_ref, windows_ref

    ref, window_refs = examples_ref(world.pipeline, "demo", 0), [windows_ref(world.pipeline, "demo", i) for i in (0, 1, 1)]
    examples = LatentTable(world.store, ref.path, load_manifest(world.store, ref), "examples.parquet")
    shards = [
        DatasetShard(
            i,
            load_tokens(world.pipeline, world.store, i),
            load_documents(world.pipeline, world.store, i).sources,
            LatentTable(world.store, item.path, load_manifest(world.store, item), "windows.parquet"),
        )
        for i, item in enumerate(window_refs)
    ]
    with pytest.raises(ArtifactCorruptError, match=r"have no window in dataset shard 2: .* Re-materialize"):
        list(read_examples(examples, shards, 0, 12))
