"""Probes of few latents: what is planted is found by one of them, the fit is scikit-learn's, and labels lie at their tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from interp_assets.corpus.plan import plan_corpus
from interp_assets.corpus.tokens import load_tokens, make_token_shard
from interp_assets.errors import ArtifactMissingError, ConfigError, InputError
from interp_assets.garcon.tokenizer import load_tokenizer
from interp_assets.graph.stages import make_road
from interp_assets.harvest.planted import planting_of
from interp_assets.planning.asset import Job
from interp_assets.planning.config import find_code, make_config
from interp_assets.planning.pipeline import Pipeline, open_pipeline_store
from interp_assets.storage.manifest import Produced, create_artifact
from interp_assets.storage.store import Store
from interp_assets.train.checkpoint import save_sae
from interp_assets.train.own.columns import read_metrics
from interp_assets.train.probes.fit import balance, fit, measure, read_all, read_chosen, scale
from interp_assets.train.probes.labels import load_labels
from interp_assets.train.probes.probe import SCHEMA, probe_saes, read_probes
from interp_assets.train.refs import sae_ref
from interp_assets.train.sae import Sae
from resources.world import World

CORPUS: dict[str, Any] = {"source": "planted", "features": 6, "width": 12, "n_rows": 6000, "rows_per_shard": 3000, "context_length": 64}
FREQUENCY = {"zipf": 0.0, "most": 0.3}


def plant(probes: dict[str, Any], folder: Path = Path()) -> tuple[Pipeline, Store]:
    """Make the rows of a planted pipeline, and publish an SAE that has exactly its features, in reverse, and one latent that never fires."""
    content = {
        "name": "toy",
        "root": "memory://",
        "corpus": {**CORPUS, "frequency": FREQUENCY},
        "shuffle": {"fan_out": 2},
        "features": {"saes": []},
        "saes": [{"name": "a", "d_sae": 7, "k": 3}],
        "probes": probes,
        "execution": {"device": "cpu"},
    }
    config = find_code(make_config(content), folder)
    store = open_pipeline_store(config)
    pipeline, world = plan_corpus(config, store), World(config)
    for name in (("token_shards",), ("activations",)):
        asset = make_road(config).get(name)
        for key in asset.partition_keys(pipeline):
            asset.make(Job(world, pipeline, store, (key,)))(key)
    directions = planting_of(pipeline).directions.flip(0)
    W_dec = torch.cat([directions, torch.zeros(1, 12)])
    W_enc = torch.cat([torch.linalg.pinv(directions), torch.zeros(12, 1)], dim=1)
    b_enc = torch.tensor([-0.1] * 6 + [-1.0])
    sae = Sae(kind="relu", W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=torch.zeros(12), threshold=torch.zeros(7), k=0)
    with create_artifact(store, sae_ref(pipeline, "a")) as art:
        save_sae(art, sae, pipeline, config.saes[0], l0=1.8)
    return pipeline, store


def probe(pipeline: Pipeline, store: Store) -> tuple[Produced, pl.DataFrame]:
    """Probe the SAE."""
    made = probe_saes(pipeline, store, ["a"])["a"]
    assert isinstance(made, Produced)
    return made, read_probes(pipeline, store, "a")


def test_one_latent_tells_a_planted_feature() -> None:
    """It is the feature's own, and no number of the activation comes near; every number says of how many rows and divisions it is."""
    pipeline, store = plant({"labels": "planted", "k": [1, 2], "rows": 2000})
    with pytest.raises(ArtifactMissingError):
        read_probes(pipeline, store, "a")
    made, table = probe(pipeline, store)
    assert dict(table.schema) == SCHEMA
    one = table.filter(reads="latents", k=1).sort("label")
    assert one["accuracy"].min() > 0.99
    assert one["chosen"].to_list() == [[5 - feature] for feature in range(6)]
    assert table.filter(reads="activation", k=1)["accuracy"].mean() < 0.9
    assert table.filter(reads="activation", k=0)["accuracy"].min() > 0.9
    assert table["n_seeds"].unique().to_list() == [5]
    assert ((table["n_train"] + table["n_test"]) == 2000).all()
    values = made.manifest.facts["values"]
    assert values["probe.k1"] == pytest.approx(one["accuracy"].mean())
    assert set(values) == {"probe.k1", "probe.k2", "probe.activation_k1", "probe.activation_k2", "probe.activation"}
    assert made.manifest.facts["n_rows"] == 2000
    assert read_metrics(pipeline, store, "a")["probe.k1"] == values["probe.k1"]
    again = probe_saes(pipeline, store, ["a"])["a"]
    assert isinstance(again, Produced)
    assert again.is_cached


def test_the_fit_is_that_of_scikit_learn() -> None:
    """Balanced classes, all columns or two chosen ones, and rows that do not count: what each says of every row, to a thousandth of its size."""
    draws = torch.Generator().manual_seed(0)
    x = scale(torch.randn(600, 5, generator=draws) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0]))
    positive = torch.stack([x[:, 0] + torch.randn(600, generator=draws) > 1, x[:, 3] - x[:, 1] > 0], dim=1)
    used = torch.rand(600, 2, generator=draws) < 0.5
    weights, chosen = balance(positive, used), torch.tensor([[0, 1], [2, 3]])
    for columns, score in ([slice(None)] * 2, read_all(x)), ([chosen[:, 0].tolist(), chosen[:, 1].tolist()], read_chosen(x, chosen)):
        said = fit(score, 5 if columns[0] == slice(None) else 2, positive, weights, used.sum(0).float())
        accuracy = measure(said, positive, balance(positive, ~used))
        for place in range(2):
            own, target = x[:, columns[place]].numpy(), positive[:, place].numpy()
            on = used[:, place].numpy()
            model = LogisticRegression(class_weight="balanced", tol=1e-8, max_iter=1000).fit(own[on], target[on])
            expected = model.decision_function(own)
            assert np.abs(said[:, place].numpy() - expected).max() < 2e-3 * np.abs(expected).max()
            assert float(accuracy[place]) == pytest.approx(balanced_accuracy_score(target[~on], model.predict(own[~on])), abs=2e-3)


def test_labels_of_a_file_are_columns_of_its_own(tmp_path: Path) -> None:
    """By row id, with rows of which nothing is said; its bytes are the identity of the numbers, and of nothing else."""
    rows = np.arange(0, 3000, 2, dtype=np.uint64)
    table = pl.DataFrame({"row_id": rows, "sign": np.where(rows % 4 == 0, "even", "odd"), "rare": np.where(rows == 2, 1, 0)})
    table.write_parquet(tmp_path / "mine.parquet")
    pipeline, store = plant({"labels": "mine.parquet", "k": [1]}, tmp_path)
    made, found = probe(pipeline, store)
    assert found.filter(reads="latents")[["label", "value"]].rows() == [("sign", "odd")]
    assert made.manifest.facts["left_out"] == ["rare=1"]
    assert found.filter(reads="latents")["n_train"][0] + found.filter(reads="latents")["n_test"][0] == 1500
    assert found.filter(reads="latents")["accuracy"][0] == pytest.approx(0.5, abs=0.1)
    sae = sae_ref(pipeline, "a").path
    table.with_columns(pl.lit("x").alias("sign")).write_parquet(tmp_path / "mine.parquet")
    other, _ = plant({"labels": "mine.parquet", "k": [1]}, tmp_path)
    assert sae_ref(other, "a").path == sae
    with pytest.raises(InputError, match=r"mine.parquet has other bytes .*run the command again"):
        load_labels(Pipeline(pipeline.config, pipeline.plan), store, 100)
    with pytest.raises(InputError, match="the column 'sign' has 1 values, and probes tell 2 to 64 apart"):
        load_labels(other, store, 100)


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ({"labels": "labels.csv"}, "neither 'python' nor 'planted' nor a .parquet file"),
        ({"labels": "python"}, "probes.labels is 'python', and corpus.source 'planted' has the features that fire"),
        ({"labels": "gone.parquet"}, r"gone.parquet, which cannot be read \(No such file"),
        ({"labels": "planted", "k": []}, "probes.k"),
    ],
)
def test_labels_that_there_are_not_are_refused(probes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """When the configuration is read, with what there is."""
    with pytest.raises(ConfigError, match=message):
        plant(probes, tmp_path)


def test_labels_lie_at_their_tokens(tmp_path: Path) -> None:
    """Of a corpus of sources: each token has the label of its first character that is no space; prose has none, and stays one group."""
    (tmp_path / "a.txt").write_text('# ä\ndef f():\n    """Say it."""\n    return 12\n')
    (tmp_path / "b.txt").write_text("this is no Python at all\n")
    content = {
        "name": "p",
        "root": "memory://",
        "corpus": {"source": "files", "path": str(tmp_path), "context_length": 8, "shard_bytes": 60},
        "features": {"saes": []},
        "probes": {},
    }
    (tmp_path / "c.txt").write_text("x = 1\n" * 20)
    config = make_config(content)
    store = open_pipeline_store(config)
    pipeline, tokenizer = plan_corpus(config, store), load_tokenizer(config.model)
    make_token_shard(pipeline, store, tokenizer, 0)
    labelled, tokens = load_labels(pipeline, store, 10_000), load_tokens(pipeline, store, 0)
    kind, depth, docstring = labelled.columns
    pieces = [tokenizer.decode([token]) for token in tokens.token_ids[tokens.valid].tolist()]
    said = {piece.strip(): (kind.classes[k], d, s) for piece, k, d, s in zip(pieces, kind.codes, depth.codes, docstring.codes, strict=True) if k >= 0}
    assert said["def"] == ("keyword", 0, 0)
    assert said["return"] == ("keyword", 1, 0)
    in_docstring = [piece for piece, code in zip(pieces, docstring.codes, strict=True) if code == 1]
    assert "".join(in_docstring).strip() == '"""Say it."""'
    prose = [code for piece, code in zip(pieces, kind.codes, strict=True) if piece.strip() in ("this", "Python", "all")]
    assert set(prose) == {-1}
    assert labelled.n_unlabelled >= 4
    (tmp_path / "a.txt").write_text('def g():\n    """Say it."""\n    return 12\n')
    with pytest.raises(InputError, match="does not become the tokens that were harvested"):
        load_labels(pipeline, store, 10_000)
