"""The same latent in another SAE: found where it was planted, told apart from chance, and correlated as the obvious formula says."""

import io
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import ArtifactMissingError, ConfigError, InputError
from interp_assets.graph.stages import make_road
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import create_artifact, load_manifest
from interp_assets.storage.tensors import TensorSpec, as_bytes, save_stream
from interp_assets.train.assets import name_numbers
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.loop import train_saes
from interp_assets.train.refs import matches_ref
from interp_assets.train.results.matches import MAX_PAIRED, SCHEMA, find_nearest, match_saes, pair_latents, read_matches

TINY: dict[str, Any] = {"d_sae": 32, "k": 3, "n_rows": 3000, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 500}
SAES = [{"name": "a", **TINY}, {"name": "b", **TINY, "seed": 1}, {"name": "c", **TINY, "hook_point": "mlp_out.0"}]
HOOK = "resid_post.0"


def matching(planted, **matches: Any):
    """Return planted data with a section `matches`, and a held-out shard of its first rows, every tenth of which is not valid."""
    content = planted.pipeline.config.model_dump() | {"matches": matches}
    pipeline = Pipeline(make_config(content), planted.pipeline.plan)
    rows = planted.rows[:500]
    with create_artifact(planted.store, token_shard_ref(pipeline, 0)) as art:
        n, buffer = len(rows), io.BytesIO()
        columns = {
            "token_id": np.zeros(n, np.uint32),
            "context": np.zeros(n, np.uint32),
            "document": np.zeros(n, np.uint32),
            "valid": np.arange(n) % 10 > 0,
        }
        pl.DataFrame(columns).write_parquet(buffer)
        art.put("tokens.parquet", buffer.getvalue())
        art.facts |= {"n_rows": n, "n_valid": int(columns["valid"].sum())}
    with create_artifact(planted.store, activation_shard_ref(pipeline, HOOK, 0)) as art:
        save_stream(art, "rows.safetensors", {"rows": TensorSpec("bfloat16", tuple(rows.shape))}, [as_bytes(rows)], n_rows=n)
    return planted._replace(pipeline=pipeline), rows[torch.arange(n) % 10 > 0].float()


def test_a_permutation_is_found_and_chance_is_not_taken_for_it() -> None:
    """Shuffled rows with noise are each other's nearest, whatever their length; of random ones the cosines are small; blocks change nothing."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3000, 64, generator=generator)
    order = torch.randperm(3000, generator=generator)
    b = 3 * a[order] + 0.3 * torch.randn(3000, 64, generator=generator)
    forth, back = find_nearest(a, b)
    assert torch.equal(back.latents, order)
    assert torch.equal(order[forth.latents], torch.arange(3000))
    assert bool(forth.is_mutual.all())
    assert bool(back.is_mutual.all())
    chance, _ = find_nearest(a, torch.randn(200, 64, generator=generator))
    assert chance.cosines.max() < 0.65 < forth.cosines.min()
    expected = torch.nn.functional.cosine_similarity(a[:50, None].double(), b[None].double(), dim=2).max(1)
    torch.testing.assert_close(forth.cosines[:50], expected.values)
    zero, _ = find_nearest(torch.zeros(1, 64), b)
    assert zero.cosines.tolist() == [0.0]


def test_all_latents_are_paired_at_once() -> None:
    """Of two copies of a feature one has it and the other is left over; the nearest alone would give both the same."""
    feature = torch.eye(4, 8)
    a, b = torch.cat([feature, feature[:1] + 0.1 * feature[1:2]]), 2 * feature[[2, 0, 1, 3]]
    assert find_nearest(a, b)[0].latents.tolist() == [1, 2, 0, 3, 1]
    latents, cosines = pair_latents(a, b)
    assert latents == [1, 2, 0, 3, None]
    assert cosines[:4] == pytest.approx([1.0] * 4)
    assert pair_latents(b, a)[0] == [2, 0, 1, 3]
    assert pair_latents(torch.ones(MAX_PAIRED + 1, 1), b[:, :1])[0] == [None] * (MAX_PAIRED + 1)


def test_matched_latents_correlate_as_the_formula_says(make_planted) -> None:
    """Both directions, on the valid held-out rows alone, and no more of them than asked for; made once, and read back."""
    planted, rows = matching(make_planted(SAES[:2]), saes=["a", "b"], rows=200)
    with pytest.raises(ArtifactMissingError):
        read_matches(planted.pipeline, planted.store)
    train_saes(planted.pipeline, planted.store, ["a", "b"])
    heard: list[int] = []
    made = match_saes(planted.pipeline, planted.store, heard.append)
    assert match_saes(planted.pipeline, planted.store).is_cached
    assert (sum(heard), made.manifest.facts["n_held_out"]) == (200, 200)
    table = read_matches(planted.pipeline, planted.store)
    assert dict(table.schema) == SCHEMA
    assert table.select("sae", "other_sae").unique(maintain_order=True).rows() == [("a", "b"), ("b", "a")]
    fired = {name: load_sae(planted.pipeline, planted.store, name).encode(rows[:200]).double().numpy() for name in ("a", "b")}
    for row in table.iter_rows(named=True):
        x, y = fired[row["sae"]][:, row["latent"]], fired[row["other_sae"]][:, row["other_latent"]]
        assert (row["n_fired"], row["n_other_fired"]) == ((x > 0).sum(), (y > 0).sum())
        if x.std() and y.std():
            assert row["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
        else:
            assert row["correlation"] is None
    (forth, _) = made.manifest.facts["pairs"]
    own, others = table.filter(sae="a"), table.filter(sae="b")
    assert others["latent"].gather(own["paired_latent"]).to_list() == own["paired_latent"].to_list()
    assert others["paired_latent"].gather(own["paired_latent"]).to_list() == own["latent"].to_list()
    assert forth["mean_paired_cosine"] == pytest.approx(own["paired_cosine"].mean(), rel=1e-5)
    assert forth["mean_paired_cosine"] <= forth["mean_cosine"] + 1e-6
    assert forth["n_paired"] == 32
    assert forth["mean_cosine"] == pytest.approx(own["cosine"].mean(), rel=1e-5)
    assert forth["share_mutual"] == pytest.approx(own["is_mutual"].mean())
    assert name_numbers(made.manifest.facts["pairs"])["share_above_0.9.a.b"] == forth["share_above_0.9"]
    assert made.manifest.digest == load_manifest(planted.store, matches_ref(planted.pipeline)).digest


def test_the_asset_is_there_where_it_is_asked_for(make_planted) -> None:
    """No pipeline has one more asset than it had; SAEs of two spaces, and names that there are not, are refused."""
    planted = make_planted(SAES)
    assert "sae_matches" not in [asset.name for asset in make_road(planted.pipeline.config).rest]
    with pytest.raises(ArtifactMissingError, match=r"matches: \{saes"):
        read_matches(planted.pipeline, planted.store)
    asked, _ = matching(planted, saes=["a", "b"])
    road = make_road(asked.pipeline.config)
    assert "sae_matches" in [asset.name for asset in road.rest]
    assert road.get(("sae_matches",)).takes(asked.pipeline, asked.store, "").rows > 0
    apart, _ = matching(planted, saes=["a", "c"])
    train_saes(apart.pipeline, apart.store, ["a", "c"])
    with pytest.raises(InputError, match="reconstruct the same hook points"):
        match_saes(apart.pipeline, apart.store)
    with pytest.raises(ConfigError, match=r"matches\.saes names 'd'"):
        matching(planted, saes=["a", "d"])
