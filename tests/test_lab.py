"""The notebook's way in: quick to import, and everything that a pipeline has made in one line."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from tiny_models import make_tiny_config, save_model, write_texts
from typer.testing import CliRunner

from interp_assets import lab
from interp_assets.corpus.plan import plan_corpus
from interp_assets.corpus.tokens import load_tokens
from interp_assets.errors import ArtifactMissingError, ConfigError, InputError
from interp_assets.graph.stages import make_road
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.harvest.rows import OpenedRows
from interp_assets.planning.asset import Job
from interp_assets.planning.pipeline import open_pipeline_store
from interp_assets.storage.manifest import MANIFEST, create_artifact, load_manifest, make_ref
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import TensorSpec, as_bytes, make_header, parse_header
from interp_assets.storage.traffic import METER
from interp_assets.terminal.cli import app
from interp_assets.terminal.serving import load_models
from interp_assets.web.labels import import_labels
from interp_assets.web.opened import BundlePlace, OpenBundle
from interp_assets.web.refs import bundle_ref
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
        heads={"key_tokens": 8, "top_k": 2, "prompts": {"hello": "ab cd ab"}},
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
    assert run.table().height == 2


def test_rows_come_with_tokens_and_addresses(run: lab.Opened) -> None:
    """Across the end of a shard too; the oracle is the model at the stored tokens, of whose rows each lies in its context."""
    rows = run.activations("blocks.1.attn.hook_z")
    first = load_tokens(run.pipeline, run.store, 0)
    assert len(rows) == sum(load_tokens(run.pipeline, run.store, index).n_rows for index in run.pipeline.shard_indices)
    part = rows[first.n_rows - 3 : first.n_rows + 2]
    assert part.tensor.shape == (5, 16)
    assert part.row_ids.tolist() == [first.n_rows - 3, first.n_rows - 2, first.n_rows - 1, 1 << 40, (1 << 40) + 1]
    assert part.tokens.tolist() == [*first.token_ids[-3:], *load_tokens(run.pipeline, run.store, 1).token_ids[:2]]
    context = first.token_ids[first.contexts == 0]
    expected = run.model().subject.capture(torch.from_numpy(context.astype(np.int64))[None], None, ["z.1"])["z.1"][0]
    torch.testing.assert_close(rows[: len(context)].tensor.float(), expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(InputError, match="Rows are read as a range"):
        rows[5:5]


def test_mixed_rows_are_the_rows_at_their_addresses(run: lab.Opened) -> None:
    """Shuffled rows say where they are from: there, in the order asked for and twice if asked twice, lies the same row with the same token."""
    rows, mixed = run.activations("z.1"), run.mixed("blocks.1.attn.hook_z")
    part = mixed[3:40]
    assert part.tensor.shape == (37, 16)
    assert {int(row_id) >> 40 for row_id in mixed[:].row_ids} == set(run.pipeline.train_indices)
    twice = np.concatenate([part.row_ids[::-1], part.row_ids[:2]])
    found = rows.at(twice)
    assert torch.equal(found.tensor, torch.cat([part.tensor.flip(0), part.tensor[:2]]))
    assert found.tokens.tolist() == [*part.tokens[::-1].tolist(), *part.tokens[:2].tolist()]
    place = int(part.row_ids[0]) & ((1 << 40) - 1)
    assert part.tokens[0] == run.tokens(int(part.row_ids[0]) >> 40)["token_id"][place]
    all_ids = np.sort(mixed[:].row_ids)
    valid = np.concatenate([np.flatnonzero(run.tokens(shard)["valid"].to_numpy()) + (shard << 40) for shard in run.pipeline.train_indices])
    assert np.array_equal(all_ids, valid.astype(np.uint64))


def test_a_document_comes_with_its_text(run: lab.Opened) -> None:
    """As it was written, whatever the shard; the addresses are those of its tokens."""
    documents = run.documents(1)
    assert documents.columns == ["document", "source", "first_row", "n_rows"]
    found = run.activations("z.1").document(1, 0)
    assert len(found) == documents["n_rows"][0] == len(found.pieces)
    written = Path(documents["source"][0])
    text = written.read_text() if written.is_file() else next(path.read_text() for path in Path(run.config.corpus.path).rglob(written.name))
    assert found.text == text
    assert "".join(piece for piece in found.pieces if piece not in ("<s>", "</s>")) == text
    assert run.tokens(1).filter(document=0)["token_id"].to_list() == found.tokens.tolist()
    assert "16 x bfloat16, of 1 shard" in repr(found)


def test_only_the_needed_bytes_are_read(run: lab.Opened) -> None:
    """The data may be a terabyte in a bucket: opening reads manifests, a range its blocks, and tokens are read when they are asked for."""

    def count(read: Callable[[], Any]) -> tuple[int, Any]:
        before = METER.total()
        answer = read()
        return METER.total().since(before).read_bytes, answer

    refs = [activation_shard_ref(run.pipeline, "z.1", index) for index in run.pipeline.shard_indices]
    manifests = sum(run.store.size(f"{ref.path}/{MANIFEST}") or 0 for ref in refs)
    files = [load_manifest(run.store, ref).file("rows.safetensors") for ref in refs]
    fresh = lab.open(run.store.url)
    n_bytes, rows = count(lambda: fresh.activations("z.1"))
    assert n_bytes == manifests
    assert all(len(file.checksums) == 1 for file in files), "each of these files is one block"
    n_bytes, part = count(lambda: rows[3:5])
    assert n_bytes == files[0].n_bytes
    n_bytes, _ = count(lambda: rows.at([7, 9, 30, (1 << 40) + 2, 8]))
    assert n_bytes == files[0].n_bytes + files[1].n_bytes, "a block that holds several rows is read once"
    n_bytes, _ = count(lambda: part.tokens)
    assert 0 < n_bytes <= 1 << 16
    assert count(lambda: rows[5:9].tokens)[0] == files[0].n_bytes, "tokens of a shard are kept"


def test_rows_in_different_blocks_are_read_each_by_itself(memory_store: Store) -> None:
    """What lies between two rows of a large file is not read."""
    values = torch.arange(4000, dtype=torch.float32).reshape(1000, 4)
    ref = make_ref("rows", "rows", identity={}, inputs={}, label="rows")
    with create_artifact(memory_store, ref) as art:
        data = make_header({"rows": TensorSpec("float32", (1000, 4))}) + as_bytes(values)
        art.put("rows.safetensors", data, n_rows=1000, block_bytes=512)
    assert art.manifest is not None
    opened = OpenedRows(memory_store, ref.path, art.manifest, parse_header(data, "rows")["rows"])
    before = METER.total()
    chosen = [999, 0, 31, 32, 0, 500]
    assert torch.equal(opened.read_each(chosen), values[chosen])
    assert METER.total().since(before).read_bytes <= 4 * 512


def test_labels_are_a_table_with_their_provenance(run: lab.Opened, tmp_path: Path) -> None:
    """Of every set that was imported, and a table without lines before that."""
    assert run.labels("heads").is_empty()
    labels = tmp_path / "said.csv"
    labels.write_text("latent,label,source,score\n4,opens a bracket,gpt,0.5\n9,Zebra,hand,\n4,worse,gpt,0.1\n")
    import_labels(OpenBundle(BundlePlace(run.store, bundle_ref(run.pipeline, "heads").path)), labels)
    found = run.labels("heads")
    assert found.columns == ["latent", "text", "source", "score", "score_kind", "author", "set", "file", "imported"]
    assert found.select("latent", "text", "source", "score").rows() == [
        (4, "opens a bracket", "gpt", 0.5),
        (4, "worse", "gpt", 0.1),
        (9, "Zebra", "hand", None),
    ]
    assert found["file"].unique().to_list() == ["said.csv"]


def test_features_are_a_table_and_examples_are_text(run: lab.Opened) -> None:
    """What the browser shows, in a notebook."""
    features = run.features("heads")
    assert features.height == 24
    latent = int(features.filter(~pl.col("is_dead"))["latent"][0]) if "is_dead" in features.columns else 0
    examples = run.feature("heads", latent).examples("top")
    assert examples.columns == ["activation", "token", "text", "shard", "row", "row_id"]
    assert run.activations("z.1").at(examples["row_id"]).pieces == examples["token"].to_list()
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


def test_a_bundle_finds_its_model_on_a_server(run: lab.Opened) -> None:
    """By the id of the SAE, which the bundle and the served model both tell: a page steers by no other."""
    config = run.pipeline.config
    models = load_models([config.model.name], config, weights=False, say=lambda _: None)
    (name,) = models.names
    served = models.find(name)
    served.thread.close()
    bundle = OpenBundle(BundlePlace(run.store, bundle_ref(run.pipeline, "heads").path))
    assert served.facts["saes"]["heads"]["artifact_id"] == bundle.description["sae"]["artifact_id"]
    assert served.facts["saes"]["heads"]["fvu"] > 0


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


def test_a_recipe_steers_in_the_terminal(run: lab.Opened, tmp_path: Path) -> None:
    """Both texts, and what the edit did; a recipe that does not fit is told in a sentence."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    latent = int(run.features("heads").sort("max")["latent"][-1])
    (tmp_path / "golden.yaml").write_text(f"edits: [{{sae: heads, latent: {latent}, clamp: 10 max}}]")
    words = ["steer", str(tmp_path / "golden.yaml"), "--prompt", "word word", "--new-tokens", "4", "--config", str(tmp_path / "run.yaml")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert re.search(r"^ default  word word.*\n steered  word word", done.stdout, re.MULTILINE)
    long = CliRunner().invoke(app, [*words, "--prompt", "word word word word"], env={"COLUMNS": "20"}, catch_exceptions=False).stdout
    assert re.search(r"^ default  word word word word", long, re.MULTILINE), "a pipe has no width: lines were broken at 80 columns"
    assert re.search(
        rf"sae_clamp [\d.]+ at z\.1: \d+ places, moved by [\d.e+-]+ of their length; latent {latent}: .* FVU of the SAE on this", done.stdout
    )
    (tmp_path / "golden.yaml").write_text(f"edits: [{{sae: heads, latent: {latent}, clamp: 10}}]")
    with pytest.raises(InputError, match="has a unit"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_what_is_not_there_is_named(run: lab.Opened, tmp_path: Path) -> None:
    """With the names there are, or the next step."""
    with pytest.raises(ConfigError, match="No SAE is called 'head'"):
        run.sae("head")
    with pytest.raises(ConfigError, match=r"'z.0' is not in the plan \(\['mlp_act.0', 'z.1'\]\)"):
        run.activations("z.0")
    with pytest.raises(ConfigError, match=r"'z.0' is not in the plan"):
        run.mixed("z.0")
    rows = run.activations("z.1")
    for wrong in ([1 << 60], [5, 1 << 30]):
        with pytest.raises(InputError, match=r"There is no row .* The shards are 0 \("):
            rows.at(wrong)
    for wrong in ([-1], ["word"], 5):
        with pytest.raises(InputError, match="Row ids are numbers"):
            rows.at(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one row id"):
        rows.at([])
    for read in (run.tokens, run.documents, lambda shard: rows.document(shard, 0)):
        with pytest.raises(InputError, match="There is no shard 77; there are 2, from 0"):
            read(77)
    with pytest.raises(InputError, match="Shard 1 has documents 0 to"):
        rows.document(1, 5000)
    with pytest.raises(ArtifactMissingError, match=r"There is no pipeline.json at .*Name the pipeline's YAML"):
        lab.open(str(tmp_path))


def test_the_notebook_about_a_pipelines_data_runs(run: lab.Opened) -> None:
    """What is committed with it is of the demo pipeline; its lines are the same for any, and end with a picture."""
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("docs_notebooks_for_lab", root / "docs" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = root / "examples" / "notebooks" / "4_pipeline_data.ipynb"
    made = [cell for cell in script.run(path, run.store.url)["cells"] if cell["cell_type"] == "code"]
    committed = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    kinds = [[[output["output_type"] for output in cell["outputs"]] for cell in cells] for cells in (made, committed)]
    assert kinds[0] == kinds[1], "the committed outputs are of these cells"
    assert "background-color:rgba" in "".join(made[-1]["outputs"][-1]["data"]["text/html"])


def test_heads_are_a_table_and_records(run: lab.Opened) -> None:
    """The statistic that the table is sorted by is the record's; a name that there is not is answered with those there are."""
    table = run.heads()
    assert table.select("layer", "head").rows() == [(0, 0), (0, 1), (1, 0), (1, 1)]
    record = run.head("1.1")
    assert record["statistics"]["previous"] == pytest.approx(table["previous"][3], rel=1e-4)
    assert record["chance"]["previous"] == pytest.approx(table["uniform_previous"][3], rel=1e-4)
    assert len(record["top"]) == 2
    with pytest.raises(InputError, match=r"There is no head '9\.0'; there are 0\.0 to 0\.1, 1\.0 to 1\.1\."):
        run.head("9.0")
    seen = run.prompt("hello")
    assert seen.heads() == ["0.0", "0.1", "1.0", "1.1"]
    assert "".join(seen.tokens) == "ab cd ab"
