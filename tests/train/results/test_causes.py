"""Goal 7: what was changed is named, exactly that, and nothing else: one planted change a test."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from measured_saes import measure
from own_files import SOUND, write_file
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from typer.testing import CliRunner

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import InputError
from interp_assets.garcon.locate import fingerprint_model
from interp_assets.harvest.refs import activation_shard_ref, statistics_ref
from interp_assets.planning.config import ModelConfig, find_code, make_config
from interp_assets.planning.own import hash_code
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource, save_configuration, save_plan
from interp_assets.shuffle.refs import mixed_shard_ref, n_mixed_shards, shuffle_plan_ref
from interp_assets.storage.manifest import ArtifactRef, create_artifact, make_ref, read_manifest, remove_artifact
from interp_assets.storage.store import Store, open_store
from interp_assets.terminal.cli import app
from interp_assets.train.loop import train_saes
from interp_assets.train.own.load import keep_code
from interp_assets.train.refs import code_ref, evaluation_ref, sae_ref
from interp_assets.train.results.causes import Cause, Side, find_causes
from interp_assets.train.results.weights import describe_weights

POINTS = ["resid_post.0", "mlp_out.0"]
SAE: dict[str, Any] = {"name": "a", "hook_point": "resid_post.0", "d_sae": 32, "k": 4}
TEXTS = {index: {f"{index}.txt": [1, 2, 3, 4], f"{index}b.txt": [5, 6]} for index in range(4)}


def make_pipeline(sae: dict[str, Any] | None = None, *, texts: dict[int, str] | None = None, model: str = "m" * 16, **sections: Any) -> Pipeline:
    """Plan a pipeline of four shards, one held out."""
    content = {"name": "p", "root": "memory://", "harvest": {"hook_points": POINTS}, "shuffle": {"fan_out": 2}, "features": {"saes": []}, **sections}
    config = make_config({**content, "saes": [{**SAE, **(sae or {})}]})
    shards = [ShardSource(index=i, fingerprint=(texts or {}).get(i, f"text-{i}"), n_documents=2, n_bytes=6, spec={}) for i in range(4)]
    plan = PipelinePlan(
        shards=shards, tokenizer_fingerprint="t", model_fingerprint=model, hook_widths=dict.fromkeys(POINTS, 8), vocabulary_size=50, max_context=32
    )
    return Pipeline(config, plan)


def list_refs(pipeline: Pipeline) -> Iterator[ArtifactRef]:
    """List everything that the evaluation of the SAE is made from, and it itself."""
    yield from (token_shard_ref(pipeline, index) for index in pipeline.shard_indices)
    for point in POINTS:
        yield from (activation_shard_ref(pipeline, point, index) for index in pipeline.shard_indices)
        yield statistics_ref(pipeline, point)
        yield from (mixed_shard_ref(pipeline, point, bucket) for bucket in range(n_mixed_shards(pipeline)))
    yield from (shuffle_plan_ref(pipeline), sae_ref(pipeline, "a"), evaluation_ref(pipeline, "a"))


def publish(store: Store, pipeline: Pipeline, *, texts: dict[int, dict[str, list[int]]] = TEXTS, gone: str = "", mark: bytes = b"") -> Side:
    """Publish the manifests of a pipeline, token shards with their tables, and return the evaluation."""
    for ref in list_refs(pipeline):
        if gone and ref.kind == gone:
            continue
        with create_artifact(store, ref) as art:
            if ref.kind != "token_shard":
                art.put("content.bin", mark if ref.kind == "activation_shard" else b"")
                continue
            documents = texts[ref.identity["shard"]]
            tokens = [(token, place) for place, ids in enumerate(documents.values()) for token in ids]
            for name, table in {
                "tokens.parquet": pl.DataFrame(tokens, schema={"token_id": pl.UInt32(), "document": pl.UInt32()}, orient="row"),
                "documents.parquet": pl.DataFrame({"source": list(documents)}),
            }.items():
                file = Path(name)
                table.write_parquet(file)
                art.put(name, file.read_bytes())
                file.unlink()
    path = evaluation_ref(pipeline, "a").path
    return Side(store, path, read_manifest(store, path))


def causes_of(before: Pipeline, after: Pipeline, **given: Any) -> list[Cause]:
    """Publish two pipelines in one folder and compare their evaluations."""
    store = open_store("memory://").child("p")
    return find_causes(publish(store, before), publish(store, after, **given))


def test_a_field_is_named() -> None:
    """Of the SAE; of a section far upstream, through shards of every kind; and of the whole pipeline, once."""
    base = make_pipeline()
    assert causes_of(base, base) == []
    assert causes_of(base, make_pipeline({"k": 8})) == [Cause("field", "k", "4", "8")]
    assert causes_of(base, make_pipeline(seed=3)) == [Cause("field", "seed", "0", "3")]
    assert causes_of(base, make_pipeline(corpus={"context_length": 128})) == [Cause("field", "corpus.context_length", "256", "128")]
    assert causes_of(base, make_pipeline(harvest={"hook_points": POINTS, "dtype": "float32"})) == [
        Cause("field", "harvest.dtype", "bfloat16", "float32")
    ]
    assert causes_of(base, make_pipeline(shuffle={"fan_out": 3})) == [
        Cause("rows", "mixed_shards", "2", "3", "only on one side: 2"),
        Cause("field", "shuffle.fan_out", "2", "3"),
    ]
    assert causes_of(base, make_pipeline({"hook_point": "mlp_out.0"})) == [Cause("field", "hook_point", "resid_post.0", "mlp_out.0")]
    assert causes_of(base, make_pipeline({"k": 8, "seed": 1})) == [Cause("field", "k", "4", "8"), Cause("field", "seed", "0", "1")]


def test_an_option_is_named() -> None:
    """Set where it was not, and set otherwise."""
    late, later = ({"options": {"decay_share": share}} for share in (0.4, 0.5))
    assert causes_of(make_pipeline(), make_pipeline(late)) == [Cause("option", "decay_share", "absent", "0.4")]
    assert causes_of(make_pipeline(late), make_pipeline(later)) == [Cause("option", "decay_share", "0.4", "0.5")]


def test_a_text_is_named_with_the_document_and_the_token() -> None:
    """One word of one document: the shard, the document, and where it begins to differ; a document more likewise; of held-out text too."""
    changed = {**TEXTS, 2: {"2.txt": [1, 2, 9, 4], "2b.txt": [5, 6]}}
    (cause,) = causes_of(make_pipeline(), make_pipeline(texts={2: "other"}), texts=changed)
    assert (cause.kind, cause.what, cause.detail) == ("text", "shard 2", "2.txt from token 2")
    grown = {**TEXTS, 0: {**TEXTS[0], "new.txt": [7]}}
    (cause,) = causes_of(make_pipeline(), make_pipeline(texts={0: "other"}), texts=grown)
    assert (cause.kind, cause.what, cause.detail) == ("text", "shard 0", "new.txt added")


def test_weights_are_named_by_their_tensors(tmp_path: Path) -> None:
    """The fingerprint by the walk, the tensor by both folders; a model that has changed since names nothing."""
    first, second = (Path(save_model(tmp_path / name, "gpt2")) for name in ("first", "second"))
    (file,) = second.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("h.1.mlp.c_fc.weight"))
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    models = ModelConfig(name=str(first)), ModelConfig(name=str(second))
    prints = fingerprint_model(models[0]), fingerprint_model(models[1])
    (cause,) = causes_of(make_pipeline(model=prints[0]), make_pipeline(model=prints[1]))
    assert cause == Cause("weights", "model", *prints)
    assert describe_weights(*models, prints) == name
    assert describe_weights(*models, ("other", prints[1])) == ""


def test_a_version_is_named() -> None:
    """A newer release measures otherwise, or makes token shards otherwise."""
    store = open_store("memory://").child("p")
    side = publish(store, make_pipeline())
    newer = make_ref("sae_evaluation", "4-sae", identity={"code": 99}, inputs=side.manifest.inputs, label="a.evaluation")
    with create_artifact(store, newer) as art:
        art.put("content.bin", b"")
    found = find_causes(side, Side(store, newer.path, read_manifest(store, newer.path)))
    assert [(cause.kind, cause.what, cause.after) for cause in found] == [("version", "sae_evaluation", "99")]


def test_a_line_of_code_is_named(tmp_path: Path) -> None:
    """One number in one's own architecture: the file, the line, before and after; without the bytes the file alone."""
    sources = [SOUND, SOUND.replace("0.3", "0.4")]
    store, sides = open_store("memory://").child("p"), []
    for number, source in enumerate(sources):
        write_file(tmp_path / str(number), source)
        pipeline = make_pipeline({"architecture": "my_sae.py:p_anneal"})
        pipeline = Pipeline(find_code(pipeline.config, tmp_path / str(number)), pipeline.plan)
        keep_code(store, pipeline.config.saes[0].code, pipeline.config.saes[0].architecture)
        sides.append(publish(store, pipeline))
    (cause,) = find_causes(*sides)
    assert (cause.kind, cause.what) == ("code", "my_sae.py")
    line = next(i for i, text in enumerate(SOUND.splitlines(), 1) if "0.3" in text)
    text = SOUND.splitlines()[line - 1].strip()
    assert cause.detail == f"line {line}: {text[:80]} -> {text.replace('0.3', '0.4')[:80]}"
    remove_artifact(store, code_ref(hash_code(SOUND.encode())).path)
    assert [cause.detail for cause in find_causes(*sides)] == [""]


def test_a_name_alone_decides_nothing_and_is_said_so() -> None:
    """A renamed arm is trained again; nobody shall look for another reason."""
    base = make_pipeline()
    other = Pipeline(base.config.model_copy(update={"saes": [base.config.saes[0].model_copy(update={"name": "b"})]}), base.plan)
    store = open_store("memory://").child("p")
    publish(store, base)
    ref = sae_ref(other, "b")
    with create_artifact(store, ref) as art:
        art.put("content.bin", b"")
    sides = [Side(store, path, read_manifest(store, path)) for path in (sae_ref(base, "a").path, ref.path)]
    assert find_causes(sides[0], sides[1]) == [Cause("field", "name", "a", "b")]


def test_what_is_gone_is_unknown_and_other_bytes_are_told() -> None:
    """Mixed shards that were deleted name no cause, and no wrong one; one id with other bytes is followed to where they began to differ."""
    base, other = make_pipeline(), make_pipeline(harvest={"hook_points": POINTS, "dtype": "float32"})
    found = causes_of(base, other, gone="mixed_shard")
    assert ("unknown", "sae mixed_shards") in [(cause.kind, cause.what) for cause in found]
    assert Cause("field", "harvest.dtype", "bfloat16", "float32") in found  # by the statistics
    stores = [open_store("memory://").child("p") for _ in range(2)]
    sides = publish(stores[0], base), publish(stores[1], base, mark=b"another device")
    assert {(cause.kind, cause.what.split()[0]) for cause in find_causes(*sides)} <= {("bytes", "activation_shard")}


def test_many_changed_texts_are_all_named() -> None:
    """Two versions of every shard in one folder: which of them an artifact was made from is found by its hash."""
    texts = {index: {name: [*ids, 9] for name, ids in documents.items()} for index, documents in TEXTS.items()}
    found = causes_of(make_pipeline(), make_pipeline(texts={index: f"new-{index}" for index in range(4)}), texts=texts)
    assert sorted(cause.what for cause in found) == [f"shard {index}" for index in range(4)]
    assert {cause.kind for cause in found} == {"text"}


TINY: dict[str, Any] = {"d_sae": 48, "k": 2, "n_rows": 600, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 500}


def test_the_command_names_the_cause_and_both_numbers(make_planted, tmp_path: Path) -> None:
    """By names, by folders; n beside the numbers; noise where there are seeds; what is no such thing is refused with what there is."""
    saes = [{"name": f"{name}-seed{seed}", **TINY, "k": k, "seed": seed} for name, k in (("few", 2), ("many", 8)) for seed in range(2)]
    planted = make_planted(saes, root=str(tmp_path / "data"))
    names = [sae["name"] for sae in saes]
    train_saes(planted.pipeline, planted.store, names)
    for name in names:
        measure(planted, name)
    save_plan(planted.store, planted.pipeline.plan)
    save_configuration(planted.store, planted.pipeline.config)
    config = tmp_path / "pipeline.yaml"
    config.write_text(planted.pipeline.config.model_dump_json())

    def diff(a: str, b: str) -> list[str]:
        return CliRunner().invoke(app, ["diff", a, b, "--config", str(config)], catch_exceptions=False).stdout.splitlines()

    lines = diff("few-seed0", "many-seed0")
    assert lines[lines.index("They differ in") + 1] == "  field k: 2 -> 8"
    assert any(f"measured on {len(planted.rows):,} held-out rows" in line for line in lines)
    fvu = next(line.split() for line in lines if line.startswith("fvu"))
    table = planted.store.local_path()
    assert float(fvu[2]) - float(fvu[1]) == pytest.approx(float(fvu[3]), rel=2e-2)
    assert lines[-1].endswith(("more than noise", "within noise"))
    assert "(n = 2)" in lines[-1]
    folder = str(table / sae_ref(planted.pipeline, "few-seed0").path)
    other = str(table / sae_ref(planted.pipeline, "few-seed1").path)
    assert "  field seed: 0 -> 1" in diff(folder, other)
    assert "They are the same: no field, text, weight or version differs." in diff(folder, folder)
    for wrong, said in (("none", "is no SAE of"), (str(tmp_path), "neither an artifact nor a pipeline")):
        with pytest.raises(InputError, match=said):
            diff(wrong, "few-seed0")
    with pytest.raises(InputError, match="of two sorts"):
        diff(str(table), "few-seed0")
    remove_artifact(planted.store, evaluation_ref(planted.pipeline, "few-seed1").path)
    half = diff("few-seed1", "many-seed0")
    assert half[half.index("They differ in") + 1 :][:2] == ["  field k: 2 -> 8", "  field seed: 1 -> 0"]
    assert any(f"measured on no and {len(planted.rows):,} held-out rows" in line for line in half)
