"""The notebook's way in: quick to import, and everything that a pipeline has made in one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import make_tiny_config, save_model, write_texts

from interp_assets import lab
from interp_assets.corpus.plan import plan_corpus
from interp_assets.corpus.tokens import load_tokens
from interp_assets.errors import ArtifactMissingError, ConfigError, InputError
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import Job
from interp_assets.planning.pipeline import open_pipeline_store
from interp_assets.storage.traffic import METER
from resources.world import World

SAE = {"d_sae": 24, "k": 3, "n_rows": 512, "batch_rows": 128, "dead_after_rows": 256}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> lab.Opened:
    """Run a tiny pipeline whose SAEs are at heads and at an MLP's activations, named in TransformerLens' words, and open its folder."""
    root = tmp_path_factory.mktemp("lab")
    config = make_tiny_config(
        save_model(root / "model", "gpt2"),
        write_texts(root / "texts", n_files=4),
        root=str(root / "data"),
        harvest={"hook_points": ["blocks.1.attn.hook_z", "mlp_act.0"]},
        shuffle={"passes": 2, "fan_out": 2},
        saes=[{"name": "heads", "hook_point": "z.1", **SAE}, {"name": "mlp", "hook_point": "blocks.0.mlp.hook_post", **SAE}],
        features={"saes": ["heads"], "latent_slices": 1, "top_k": 4, "n_random": 8, "window": 4, "n_intervals": 2, "examples_per_interval": 2},
        execution={"device": "cpu", "tokens_per_batch": 512, "rows_per_block": 256},
    )
    store = open_pipeline_store(config)
    pipeline, world = plan_corpus(config, store), World(config)
    for asset in make_road(config):
        if not asset.plan:
            keys = tuple(asset.partition_keys(pipeline))
            make = asset.make(Job(world, pipeline, store, keys))
            for key in keys:
                make(key)
    return lab.open(str(root / "data" / "tiny"))


def test_importing_it_loads_nothing_that_computes() -> None:
    """A client of a server has neither; and a notebook's first cell should not take seconds."""
    heavy = "{'torch', 'transformers', 'fastapi', 'dagster', 'polars', 'pyarrow'}"
    code = f"import sys; from interp_assets import lab; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_saes_train_at_heads_and_inside_an_mlp(run: lab.Opened) -> None:
    """Evaluated by their loss too: what is put back at z reaches the logits. No logits are claimed for directions that are not on the stream."""
    assert run.config.harvest.hook_points == ["z.1", "mlp_act.0"]
    assert (run.sae("heads").d_in, run.sae("mlp").d_in) == (16, 64)
    for name in ("heads", "mlp"):
        facts = run.evaluation(name)
        assert 0 < facts["fvu"] < 2, facts
        assert np.isfinite(facts["ce_recovered"])
    assert run.feature("heads", 3).record["logits"] is None
    assert run.sweep().height == 2


def test_rows_come_with_tokens_and_addresses(run: lab.Opened) -> None:
    """Across the end of a shard too; the oracle is the model at the stored tokens, of whose rows each lies in its context."""
    rows = run.activations("blocks.1.attn.hook_z")
    first = load_tokens(run.pipeline, run.store, 0)
    assert len(rows) == sum(load_tokens(run.pipeline, run.store, index).n_rows for index in run.pipeline.shard_indices)
    part = rows[first.n_rows - 3 : first.n_rows + 2]
    assert part.tensor.shape == (5, 16)
    assert part.row_ids.tolist() == [first.n_rows - 3, first.n_rows - 2, first.n_rows - 1, 1 << 40, (1 << 40) + 1]
    assert part.tokens[:3].tolist() == first.token_ids[-3:].tolist()
    context = first.token_ids[first.contexts == 0]
    expected = run.model().subject.capture(torch.from_numpy(context.astype(np.int64))[None], None, ["z.1"])["z.1"][0]
    torch.testing.assert_close(rows[: len(context)].tensor.float(), expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(InputError, match="Rows are read as a range"):
        rows[5:5]


def test_a_range_reads_only_its_blocks(run: lab.Opened) -> None:
    """The data may be a terabyte in a bucket."""
    rows = run.activations("z.1")
    rows[0:1]
    before = METER.total()
    rows[3:5]
    assert 0 < METER.total().since(before).read_bytes <= 1 << 20


def test_features_are_a_table_and_examples_are_text(run: lab.Opened) -> None:
    """What the browser shows, in a notebook."""
    features = run.features("heads")
    assert features.height == 24
    latent = int(features.filter(~pl.col("is_dead"))["latent"][0]) if "is_dead" in features.columns else 0
    examples = run.feature("heads", latent).examples("top")
    assert examples.columns == ["activation", "token", "text", "shard", "row"]
    assert all(token in text for token, text in zip(examples["token"], examples["text"], strict=True))
    with pytest.raises(InputError, match="Examples are 'top' or 'random'"):
        run.feature("heads", latent).examples("bottom")


def test_a_model_is_loaded_by_its_name(run: lab.Opened) -> None:
    """With its tokenizer, for a first trace."""
    llm = lab.load(run.config.model.name, device="cpu")
    found = llm.run("word word", read="z.*")
    assert list(found) == ["z.0", "z.1"]
    assert found["z.1"].table().columns == ["row", "position", "head", "dimension", "token", "value"]
    assert found.table().height == 2 * 9 * 16
    points = llm.points("*_mid*")
    assert points.rows()[0] == ("resid_mid.0", "[batch, context, 16]", "transformer.h.0.ln_2", "blocks.0.hook_resid_mid", "")
    drawn = llm.run("<word>", read="pattern.0", heads=[0])["pattern.0"]._repr_html_()
    assert drawn.count("<td") == 36
    assert "&lt;" in drawn


def test_the_pipelines_saes_come_with_its_model(run: lab.Opened) -> None:
    """At heads and inside an MLP: what is read is what the SAE itself encodes."""
    llm = run.model()
    assert sorted(llm.saes) == ["heads", "mlp"]
    with llm.trace("word word") as t:
        latents, rows = t.sae_read("heads"), t.read("z.1")
        t.sae_clamp("mlp", {3: "2 raw"})
        changed = t.loss()
    torch.testing.assert_close(latents.tensor[0], run.sae("heads").encode(rows.tensor[0].flatten(1)))
    with llm.trace("word word") as plain:
        loss = plain.loss()
    assert changed.value != loss.value


def test_strengths_are_told_by_what_the_pipeline_measured(run: lab.Opened) -> None:
    """A latent's maximum and quantiles by its features, the mean norm by the activation statistics; a dead latent has neither."""
    llm = run.model()
    features, heads = run.features("heads"), llm.saes["heads"]
    latent = int(features.sort("max")["latent"][-1])
    edit = {"sae": "heads", "latent": latent}

    def strength(**words: str) -> float:
        return llm.generate("word word", new_tokens=2, steer=[{**edit, **words}]).plan.edits[0].write.values[0]

    maximum = float(features["max"][latent])
    assert strength(clamp="10 max") == pytest.approx(10 * maximum)
    assert 0 < strength(clamp="q0.5") < strength(clamp="q0.99") <= maximum * 1.25  # a bin's width
    rows = run.activations("z.1")
    norms = [rows[start : start + 64].tensor.float().norm(dim=1) for start in range(0, len(rows) - 64, 64)]
    length = float(run.sae("heads").W_dec[latent].norm())
    assert strength(add="0.2 norm") == pytest.approx(0.2 * float(torch.cat(norms).mean()) / length, rel=0.1)  # training shards alone
    assert heads.evaluated.fvu == run.evaluation("heads")["fvu"]
    assert heads.fit.fvu > 0
    dead = features.filter(pl.col("is_dead"))["latent"]
    if len(dead):
        with pytest.raises(InputError, match="it is dead"):
            llm.generate("word", new_tokens=1, steer=[{"sae": "heads", "latent": int(dead[0]), "clamp": "10 max"}])


def test_what_is_not_there_is_named(run: lab.Opened, tmp_path: Path) -> None:
    """With the names there are, or the next step."""
    with pytest.raises(ConfigError, match="No SAE is called 'head'"):
        run.sae("head")
    with pytest.raises(ConfigError, match=r"'z.0' is not in the plan \(\['mlp_act.0', 'z.1'\]\)"):
        run.activations("z.0")
    with pytest.raises(ArtifactMissingError, match=r"There is no pipeline.json at .*Name the pipeline's YAML"):
        lab.open(str(tmp_path))
