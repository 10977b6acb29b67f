"""SAEs of other tools become SAEs of a pipeline: by their formulas, with their origin, and refused with the next step where they do not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from interp_assets.errors import ConfigError, InputError
from interp_assets.planning.config import load_config, make_config
from interp_assets.planning.pipeline import Pipeline, ShardSource, save_plan
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.store import open_store
from interp_assets.terminal.cli import app
from interp_assets.terminal.starter import make_starter
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.exchange.folders import export_sae, read_foreign, translate_hook
from interp_assets.train.exchange.imported import import_sae
from interp_assets.train.launch import run_training
from interp_assets.train.loop import training_rows
from interp_assets.train.refs import evaluation_ref, sae_ref
from interp_assets.visualize.refs import candidates_ref, examples_ref

D_IN, D_SAE = 6, 16
GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(40, D_IN, generator=GENERATOR)
HOOK = "resid_post.0"
LEGACY = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
}


def draw(*shape: int) -> torch.Tensor:
    """Draw values that matter."""
    return torch.randn(*shape, generator=GENERATOR) * 0.5


def save_saelens(folder: Path, *, config: dict[str, Any], **tensors: torch.Tensor) -> Path:
    """Write the folder of an SAE with random weights; `tensors` replace some."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    weights = {"W_enc": draw(D_IN, D_SAE), "b_enc": draw(D_SAE), "W_dec": draw(D_SAE, D_IN), "b_dec": draw(D_IN), **tensors}
    save_file({name: value for name, value in weights.items() if value.ndim}, folder / "sae_weights.safetensors")
    return folder


def save_dictionary(folder: Path, kind: str, tensors: dict[str, torch.Tensor], **trainer: Any) -> Path:
    """Write the folder of a dictionary_learning class."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, **trainer}, "buffer": {"ctx_len": 128}}))
    torch.save(tensors, folder / "ae.pt")
    return folder


def invoke(*arguments: str) -> Result:
    """Run a command; errors come through."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_a_folder_of_saelens_before_6_is_the_same_function(tmp_path: Path, activation: str) -> None:
    """Most SAEs on the hub are of those years: keys at the top, b_dec subtracted, the activation function by name."""
    config = {
        **LEGACY,
        "activation_fn_str": activation,
        "activation_fn_kwargs": {"k": 3} if activation == "topk" else {},
        "normalize_activations": False,
    }
    foreign = read_foreign(open_store(str(save_saelens(tmp_path / "sae", config=config))))
    w = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    pre = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    if activation == "topk":
        pre = torch.zeros_like(pre).scatter(1, pre.topk(3).indices, pre.topk(3).values)
    torch.testing.assert_close(foreign.sae.encode(X), pre, rtol=1e-5, atol=1e-5)
    assert (foreign.origin.hook_point, foreign.origin.model, foreign.origin.tool) == ("resid_pre.8", "gpt2-small", "saelens")


def test_the_arrays_of_gemma_scope_are_a_jump_relu(tmp_path: Path) -> None:
    """Layer and L0 are in its path only."""
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    arrays = {"W_enc": draw(D_IN, D_SAE), "b_enc": draw(D_SAE), "W_dec": draw(D_SAE, D_IN), "b_dec": draw(D_IN), "threshold": draw(D_SAE).abs()}
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in arrays.items()})
    foreign = read_foreign(open_store(str(folder)))
    pre = X @ arrays["W_enc"] + arrays["b_enc"]
    torch.testing.assert_close(foreign.sae.encode(X), pre * (pre > arrays["threshold"]))
    assert (foreign.origin.hook_point, foreign.origin.l0) == ("resid_post.20", 71.0)


def test_the_classes_of_dictionary_learning_are_the_same_functions(tmp_path: Path) -> None:
    """Each subtracts its bias or does not; the loader of AutoEncoder moves decoder norms into the encoder."""
    W_enc, W_dec, b_enc, b_dec, r_mag, b_mag = draw(D_SAE, D_IN), draw(D_IN, D_SAE), draw(D_SAE), draw(D_IN), draw(D_SAE), draw(D_SAE)
    linear = {"encoder.weight": W_enc, "decoder.weight": W_dec}
    gated = {**linear, "gate_bias": b_enc, "mag_bias": b_mag, "r_mag": r_mag, "decoder_bias": b_dec}
    plain = {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec.T, "b_dec": b_dec, "k": torch.tensor(3), "threshold": torch.tensor(0.4)}
    projected = (X - b_dec) @ W_enc.T
    expected = {
        "AutoEncoder": ({**linear, "encoder.bias": b_enc, "bias": b_dec}, (projected + b_enc).relu() * W_dec.norm(dim=0)),
        "AutoEncoderNew": ({**linear, "encoder.bias": b_enc, "decoder.bias": b_dec}, (X @ W_enc.T + b_enc).relu()),
        "GatedAutoEncoder": (gated, (projected + b_enc > 0) * (r_mag.exp() * projected + b_mag).relu()),
        "MatryoshkaBatchTopKSAE": (plain, (projected + b_enc) * (projected + b_enc > 0.4)),
    }
    for kind, (tensors, latents) in expected.items():
        sae = read_foreign(open_store(str(save_dictionary(tmp_path / kind, kind, tensors)))).sae
        torch.testing.assert_close(sae.encode(X), latents, rtol=1e-5, atol=1e-5)
        decoder = W_dec.T / W_dec.norm(dim=0)[:, None] if kind == "AutoEncoder" else W_dec.T
        torch.testing.assert_close(sae.reconstruct(X, sae.encode(X)), latents @ decoder + b_dec, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.20.hook_resid_post", "resid_post.20"),
        ("blocks.3.hook_mlp_out", "mlp_out.3"),
        ("resid_post_layer_12", "resid_post.12"),
        ("resid_out_layer3", "resid_post.3"),
        ("layers.20", ""),
        ("model.layers.7.mlp", ""),
        ("mlp_out_layer_3", ""),
        ("input of resid_post_layer_3", ""),
        ("blocks.3.hook_resid_mid", "resid_mid.3"),
        ("blocks.2.attn.hook_z", "z.2"),
        ("blocks.2.attn.hook_q", ""),
        ("layers.2.self_attn.q_proj", ""),
        ("unembed", ""),
    ],
)
def test_hook_points_of_other_tools_have_our_names(name: str, expected: str) -> None:
    """A place that has no name here, or whose name depends on the model, must not be taken for another one."""
    assert translate_hook(name) == expected


STANDARD = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": {"sae_lens_version": "6.0.0"}}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (STANDARD, {"W_dec": draw(D_SAE, D_IN)[:-1]}, r"tensor W_dec of this SAELens SAE has the shape \[15, 6\]; .* \[d_sae, d_out\] = \[16, 6\]"),
        (STANDARD, {"b_enc": draw(1, D_SAE)}, r"b_enc of this SAELens SAE has the shape \[1, 16\]; .*\[d_sae\]"),
        (STANDARD, {"b_enc": torch.full((D_SAE,), torch.nan)}, "b_enc of this SAELens SAE holds NaN or infinity. Take another checkpoint"),
        (STANDARD, {"scaling_factor": torch.full((D_SAE,), 2.0)}, "has a scaling_factor of its latents"),
        ({**STANDARD, "normalize_activations": "constant_norm_rescale"}, {}, "normalize_activations 'constant_norm_rescale'"),
        ({**STANDARD, "normalize_activations": "layer_norm"}, {}, "row by row, which no weights can hold"),
        ({**STANDARD, "architecture": "topk"}, {}, r"cfg.json of this SAELens SAE has no 'k'; it has \['architecture', .*Copy or save it again"),
        ({**STANDARD, "architecture": "temporal"}, {}, r"is of architecture 'temporal'; \['gated', "),
        ({**LEGACY, "activation_fn_str": "tanh-relu"}, {}, "activation function 'tanh-relu'; relu and topk are read"),
        ({**STANDARD, "architecture": "jumprelu"}, {}, r"\['threshold'\] missing, found \['W_dec', "),
        ([1], {}, "cfg.json holds a list, expected keys and values"),
    ],
)
def test_what_would_be_another_function_is_refused(tmp_path: Path, config: Any, tensors: dict[str, torch.Tensor], message: str) -> None:
    """With folder, file, key or tensor, what was expected and found, and what to do."""
    folder = save_saelens(tmp_path / "sae", config=config, **tensors)
    with pytest.raises(InputError, match=rf"The SAE in {folder} cannot be used: .*{message}"):
        read_foreign(open_store(str(folder)))


@pytest.mark.parametrize(
    ("config", "missing"), [({}, "config.json of .* no 'trainer'"), ({"trainer": {}}, r"config.json \(trainer\) .* no 'dict_class'")]
)
def test_a_key_that_is_missing_is_named(tmp_path: Path, config: dict[str, Any], missing: str) -> None:
    """Not as a KeyError."""
    torch.save({}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=missing):
        read_foreign(open_store(str(tmp_path)))


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (torch.zeros(D_SAE - 1), r"has the shape \[15\] and holds .*, up to 1; expected \[d_sae\] = \[16\], from 0 to 1. Copy .* or delete it"),
        (torch.full((D_SAE,), 0.5), r"has the shape \[16\] and holds .*, up to 3.16; expected"),
        (torch.full((D_SAE,), torch.nan), r"has .*, up to nan; expected"),
    ],
)
def test_firing_frequencies_that_are_none_are_refused(tmp_path: Path, sparsity: torch.Tensor, message: str) -> None:
    """They are published, and shown; a file of another SAE is easily copied beside."""
    folder = save_saelens(tmp_path / "sae", config=STANDARD)
    save_file({"sparsity": sparsity}, folder / "sparsity.safetensors")
    with pytest.raises(InputError, match=rf"The SAE in {folder} cannot be used: The tensor sparsity of sparsity.safetensors {message}"):
        read_foreign(open_store(str(folder)))


def test_the_digest_covers_the_firing_frequencies(tmp_path: Path) -> None:
    """They are in the artifact, so the same id must mean the same ones; 1 itself is a frequency, and what never fired has none."""
    folder = save_saelens(tmp_path / "sae", config=STANDARD)
    digests = [read_foreign(open_store(str(folder))).digest]
    for last in (-1.0, 1e-8):
        save_file({"sparsity": torch.tensor([-10.0] * (D_SAE - 1) + [last])}, folder / "sparsity.safetensors")
        foreign = read_foreign(open_store(str(folder)))
        assert foreign.firing_frequency is not None
        assert foreign.firing_frequency.tolist() == pytest.approx([0.0] * (D_SAE - 1) + [min(1, 10**last)])
        assert float(foreign.firing_frequency.max()) <= 1
        digests.append(foreign.digest)
    assert len(set(digests)) == 3


@pytest.mark.parametrize("content", [b"", b"PK", "half"])
def test_a_file_of_arrays_that_is_cut_off_is_named(tmp_path: Path, content: bytes | str) -> None:
    """A download that broke off is the commonest of all; it is no bug of ours."""
    arrays = {"W_enc": draw(D_IN, D_SAE), "b_enc": draw(D_SAE), "W_dec": draw(D_SAE, D_IN), "b_dec": draw(D_IN), "threshold": draw(D_SAE).abs()}
    file = tmp_path / "params.npz"
    np.savez(file, **{name: value.numpy() for name, value in arrays.items()})
    file.write_bytes(content if isinstance(content, bytes) else file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"The SAE in {tmp_path} cannot be read \(params.npz: \w+: .*\). Copy it again."):
        read_foreign(open_store(str(tmp_path)))


@pytest.mark.parametrize(
    ("told", "read"),
    [
        (64, (64, 64.0)),
        ("64", (64, 64.0)),
        ("12.5", (12, 12.5)),
        ("many", (None, None)),
        (True, (None, None)),
        ([3], (None, None)),
        ("nan", (None, None)),
    ],
)
def test_numbers_that_only_explain_may_be_text(tmp_path: Path, told: Any, read: tuple[int | None, float | None]) -> None:
    """Nothing is computed from them, so one that cannot be read tells nothing, and does not keep the SAE out."""
    metadata = {"sae_lens_version": "6.0.0", "hook_name": "blocks.0.hook_resid_post", "context_size": told, "l0": told}
    folder = save_saelens(tmp_path / "sae", config={**STANDARD, "metadata": metadata})
    origin = read_foreign(open_store(str(folder))).origin
    assert (origin.context_length, origin.l0) == read
    assert invoke("import", str(folder), "--config", str(write_yaml(tmp_path))).exit_code == 0


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
@pytest.mark.parametrize("threshold", [torch.nan, torch.inf])
def test_a_threshold_that_is_no_number_is_refused(tmp_path: Path, kind: str, threshold: float) -> None:
    """NaN became 0, and every latent fired at any positive value."""
    names = ("W_enc", "b_enc", "W_dec") if kind.startswith("Matryoshka") else ("encoder.weight", "encoder.bias", "decoder.weight")
    shapes = ((D_IN, D_SAE), (D_SAE,), (D_SAE, D_IN)) if kind.startswith("Matryoshka") else ((D_SAE, D_IN), (D_SAE,), (D_IN, D_SAE))
    tensors = {name: draw(*shape) for name, shape in zip(names, shapes, strict=True)} | {"b_dec": draw(D_IN)}
    folder = save_dictionary(tmp_path / "sae", kind, {**tensors, "threshold": torch.tensor(threshold)})
    with pytest.raises(InputError, match=rf"threshold of this dictionary_learning SAE is {threshold}. Take another checkpoint"):
        read_foreign(open_store(str(folder)))


@pytest.fixture
def foreign_pipeline(make_planted, tmp_path: Path) -> Pipeline:
    """Return a pipeline with a trained SAE and the same one imported from the folder that it was exported to, which has moved since."""
    trained = {"name": "own", "architecture": "batch_topk", "d_sae": 24, "k": 3, "n_rows": 1000, "batch_rows": 100, "learning_rate": 5e-3}
    planted = make_planted([trained], root=str(tmp_path / "data"))
    run_training(planted.pipeline, planted.store, ["own"])
    save_plan(planted.store, planted.pipeline.plan)
    folder = tmp_path / "theirs"
    export_sae(planted.pipeline, planted.store, "own", "saelens", open_store(str(folder)))
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(planted.pipeline.config.model_dump(mode="json")))
    done = invoke("import", str(folder), "--config", str(tmp_path / "pipeline.yaml"), "--name", "foreign", "--add")
    assert done.exit_code == 0
    return Pipeline(load_config(tmp_path / "pipeline.yaml"), planted.pipeline.plan)


def test_an_imported_sae_is_published_in_the_place_of_a_training(foreign_pipeline: Pipeline, tmp_path: Path) -> None:
    """Bit for bit the weights of the folder; progress is that of the trained SAEs alone."""
    store = open_store(foreign_pipeline.config.root).child(foreign_pipeline.config.name)
    seen: list[int] = []
    produced = run_training(foreign_pipeline, store, ["foreign", "own"], seen.append).made
    assert (list(produced), produced["foreign"].is_cached, produced["own"].is_cached) == (["foreign", "own"], False, True)
    assert sum(seen) == training_rows(foreign_pipeline, ["foreign", "own"]) == 1000
    own, foreign = load_sae(foreign_pipeline, store, "own"), load_sae(foreign_pipeline, store, "foreign")
    assert own.kind == foreign.kind
    assert all(torch.equal(getattr(own, name), getattr(foreign, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"))
    facts = produced["foreign"].manifest.facts
    assert (facts["d_sae"], facts["imported"]["tool"], facts["imported"]["hook"]) == (24, "saelens", "blocks.0.hook_resid_post")
    export_sae(foreign_pipeline, store, "foreign", "saelens", open_store(str(tmp_path / "again")))
    before, after = (load_file(tmp_path / name / "sparsity.safetensors")["sparsity"] for name in ("theirs", "again"))
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)
    assert run_training(foreign_pipeline, store, ["foreign"]).made["foreign"].is_cached


def test_the_digest_identifies_an_imported_sae_not_its_folder(foreign_pipeline: Pipeline, tmp_path: Path) -> None:
    """A folder may move, a file in it must not change; a field of training that is set beside changes nothing."""
    moved = tmp_path / "elsewhere"
    (tmp_path / "theirs").rename(moved)
    config = foreign_pipeline.config
    entry = config.sae("foreign").model_copy(update={"imported": str(moved), "learning_rate": 0.5})
    again = Pipeline(config.model_copy(update={"saes": [config.sae("own"), entry]}), foreign_pipeline.plan)
    assert sae_ref(again, "foreign") == sae_ref(foreign_pipeline, "foreign")
    assert evaluation_ref(again, "foreign") == evaluation_ref(foreign_pipeline, "foreign")
    cfg = json.loads((moved / "cfg.json").read_text())
    (moved / "cfg.json").write_text(json.dumps({**cfg, "neuronpedia_id": "another file"}))
    store = open_store(config.root).child(config.name)
    with pytest.raises(
        InputError, match=r"have the digest [0-9a-f]{32}, imported_digest says [0-9a-f]{32}: they are not the ones .* `interp import`"
    ):
        import_sae(again, store, "foreign")
    with pytest.raises(InputError, match=r"The folder .*theirs of an imported SAE is not there"):
        import_sae(foreign_pipeline, store, "foreign")


def test_the_same_id_means_the_same_bytes(foreign_pipeline: Pipeline, tmp_path: Path) -> None:
    """What the id does not cover is not written: the pipeline's text and context length, the name of a folder that tools tell layers by."""
    config = foreign_pipeline.config
    corpus = config.corpus.model_copy(update={"context_length": config.corpus.context_length // 2})
    changed = Pipeline(config.model_copy(update={"corpus": corpus}), foreign_pipeline.plan)
    made = [import_sae(pipeline, open_store("memory://"), "foreign") for pipeline in (foreign_pipeline, changed)]
    assert sae_ref(changed, "foreign") == sae_ref(foreign_pipeline, "foreign")
    assert [item.is_cached for item in made] == [False, False]
    assert made[0].manifest.digest == made[1].manifest.digest
    arrays = {"W_enc": draw(16, 24), "b_enc": draw(24), "W_dec": draw(24, 16), "b_dec": draw(16), "threshold": draw(24).abs()}
    facts: list[Any] = []
    for place in ("gemma-scope-2b-pt-res/layer_0/width_16k/average_l0_71", "elsewhere/mine"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **{name: value.numpy() for name, value in arrays.items()})
        update = {"imported": str(folder), "imported_digest": read_foreign(open_store(str(folder))).digest}
        entry = config.sae("foreign").model_copy(update=update)
        moved = Pipeline(config.model_copy(update={"saes": [entry]}), foreign_pipeline.plan)
        manifest = import_sae(moved, open_store("memory://"), "foreign").manifest
        facts.append((manifest.artifact_id, manifest.digest, manifest.facts))
    assert facts[0] == facts[1]


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"architecture": "relu"}, r"architecture is jump_relu, expected relu \(the configuration\)"),
        ({"architecture": "topk"}, r"architecture is jump_relu, expected topk"),
    ],
)
def test_an_entry_that_calls_it_something_else_is_refused(foreign_pipeline: Pipeline, update: dict[str, Any], message: str) -> None:
    """Tables would show an architecture that it is not."""
    config = foreign_pipeline.config
    wrong = Pipeline(config.model_copy(update={"saes": [config.sae("foreign").model_copy(update=update)]}), foreign_pipeline.plan)
    with pytest.raises(InputError, match=rf"does not fit: {message}.* `interp import` says what its folder tells, and writes the entry"):
        import_sae(wrong, open_store("memory://"), "foreign")


def test_an_entry_with_another_k_is_refused(foreign_pipeline: Pipeline, tmp_path: Path) -> None:
    """A TopK SAE's k is in its folder; cost estimates and tables would go by another one."""
    weights = {"W_enc": draw(16, 24), "b_enc": draw(24), "W_dec": draw(24, 16), "b_dec": draw(16)}
    folder = save_saelens(tmp_path / "topk", config={**STANDARD, "architecture": "topk", "k": 3}, **weights)
    config = foreign_pipeline.config
    update = {"imported": str(folder), "imported_digest": read_foreign(open_store(str(folder))).digest, "architecture": "topk", "k": 5}
    wrong = Pipeline(config.model_copy(update={"saes": [config.sae("foreign").model_copy(update=update)]}), foreign_pipeline.plan)
    with pytest.raises(InputError, match=r"does not fit: k is 3, expected 5 \(the configuration\)"):
        import_sae(wrong, open_store("memory://"), "foreign")


def test_new_text_measures_and_shows_an_imported_sae_again(foreign_pipeline: Pipeline) -> None:
    """Its weights stay, but the mean behind FVU and the origin of histograms are those of the statistics, which no other input of it covers."""
    plan = foreign_pipeline.plan
    more = ShardSource(index=len(plan.shards), fingerprint="new text", n_documents=2, n_bytes=100, spec={})
    grown = Pipeline(foreign_pipeline.config, replace(plan, shards=[*plan.shards, more]))
    assert sae_ref(grown, "foreign") == sae_ref(foreign_pipeline, "foreign")
    assert evaluation_ref(grown, "foreign") != evaluation_ref(foreign_pipeline, "foreign")
    assert candidates_ref(grown, "foreign", 0, 0) != candidates_ref(foreign_pipeline, "foreign", 0, 0)
    for pipeline in (foreign_pipeline, grown):
        refs = (evaluation_ref(pipeline, "own"), candidates_ref(pipeline, "own", 0, 0), examples_ref(pipeline, "own", 0))
        assert not any("statistics" in role for ref in refs for role in ref.inputs)  # it was trained with them


def test_trained_saes_keep_their_ids(make_planted) -> None:
    """The fields of imported ones are no part of the identity of the others: nothing is trained again after an upgrade."""
    planted = make_planted([{"name": "own"}])
    config = planted.pipeline.config.sae("own")
    assert set(config.model_dump()) - set(config.identity()) == {"imported", "imported_digest", "accepts_misfit"}
    assert config.described() == config.identity()


def test_an_sae_of_another_size_is_refused_when_it_is_published(foreign_pipeline: Pipeline) -> None:
    """A configuration may be older than the plan, or written by hand."""
    config = foreign_pipeline.config
    entry = config.sae("foreign").model_copy(update={"hook_point": "mlp_out.0", "d_sae": 25})
    wrong = Pipeline(config.model_copy(update={"saes": [entry]}), foreign_pipeline.plan)
    message = (
        r"d_in is 16, expected 8 \(the width of mlp_out.0\); d_out is 16, expected 8 .*; d_sae is 24, expected 25 \(d_sae of the configuration\)"
    )
    with pytest.raises(InputError, match=message):
        import_sae(wrong, open_store(config.root).child(config.name), "foreign")


@pytest.mark.parametrize(
    "fields",
    [
        {"imported": "folder"},
        {"imported_digest": "12"},
        {"imported": "a", "imported_digest": "b", "task": "crosscoder", "more_hook_points": ["mlp_out.0"]},
    ],
)
def test_half_an_entry_is_refused(fields: dict[str, Any]) -> None:
    """The command writes whole ones."""
    with pytest.raises(ConfigError, match=r"an imported SAE has both fields and is no crosscoder. `interp import` writes the entry"):
        make_config({"harvest": {"hook_points": [HOOK, "mlp_out.0"]}, "saes": [{"name": "demo", "hook_point": HOOK, **fields}]})


YAML = """\
name: planted
root: {root}   # here
harvest: {{hook_points: [resid_post.0, mlp_out.0]}}
saes:
  # the one we train
  - name: demo
    hook_point: resid_post.0
    k: 4

features:   # what is shown
  saes: [demo]
"""


def write_yaml(tmp_path: Path, text: str = YAML) -> Path:
    """Write a pipeline with comments."""
    path = tmp_path / "pipeline.yaml"
    path.write_text(text.format(root=tmp_path / "data"))
    return path


def test_the_command_shows_what_it_found_and_adds_an_entry(tmp_path: Path) -> None:
    """Comments and order of the file stay; what is odd is said, and what is to be pasted is on standard output alone."""
    path = write_yaml(tmp_path)
    metadata = {"sae_lens_version": "6.54", "hook_name": "blocks.0.hook_resid_post", "model_name": "gpt2", "context_size": 128, "l0": 2.6}
    folder = save_saelens(tmp_path / "My SAE", config={**STANDARD, "metadata": metadata})
    done = invoke("import", str(folder), "--config", str(path))
    entry = yaml.safe_load(done.stdout)[0]
    assert entry == {
        "name": "My-SAE-resid_post.0",
        "imported": str(folder),
        "imported_digest": read_foreign(open_store(str(folder))).digest,
        "hook_point": "resid_post.0",
        "architecture": "relu",
        "d_sae": 16,
        "k": 3,
    }
    told = " ".join(done.stderr.split())
    for part in (
        "6 x 16",
        "blocks.0.hook_resid_post",
        "no plan yet",
        "the folder says model 'gpt2', the pipeline's is",
        "contexts of 128 tokens, the pipeline's have 256",
    ):
        assert part in told
    done = invoke("import", str(folder), "--config", str(path), "--name", "theirs", "--add")
    assert done.exit_code == 0
    assert [sae.name for sae in load_config(path).saes] == ["demo", "theirs"]
    text = path.read_text()
    assert text.replace(text[text.index("  - name: theirs") : text.index("\nfeatures:")], "") == YAML.format(root=tmp_path / "data")
    with pytest.raises(InputError, match=r"has an SAE .theirs. already. Give this one another name with --name"):
        invoke("import", str(folder), "--config", str(path), "--name", "theirs")


def test_the_command_says_what_does_not_fit(make_planted, tmp_path: Path) -> None:
    """Hook points, widths and files that cannot be changed: each with what there is."""
    path = write_yaml(tmp_path)
    silent = save_saelens(tmp_path / "silent", config=STANDARD)
    with pytest.raises(InputError, match=r"does not tell its hook point. Name one of harvest.hook_points with --hook-point: resid_post.0, mlp_out.0"):
        invoke("import", str(silent), "--config", str(path))
    config = {**STANDARD, "metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.9.hook_resid_post"}}
    deep = save_saelens(tmp_path / "deep", config=config)
    with pytest.raises(InputError, match=r"belongs to resid_post.9 \(its folder says 'blocks.9.hook_resid_post'\), .* Add resid_post.9 to them"):
        invoke("import", str(deep), "--config", str(path))
    done = invoke("import", str(deep), "--config", str(path), "--hook-point", "resid_post.0")
    assert "folder says hook point blocks.9.hook_resid_post (resid_post.9); here it becomes one of resid_post.0" in " ".join(done.stderr.split())
    planted = make_planted([{"name": "demo"}], root=str(tmp_path / "data"))
    save_plan(planted.store, planted.pipeline.plan)
    with pytest.raises(InputError, match=r"d_in is 6, expected 16 \(the width of resid_post.0\)"):
        invoke("import", str(silent), "--config", str(path), "--hook-point", "resid_post.0")
    with pytest.raises(InputError, match="--add puts the entry into a file: name it with --config"):
        invoke("import", str(silent), "--add")
    with pytest.raises(InputError, match="is a file: name the folder it lies in"):
        invoke("import", str(silent / "cfg.json"), "--config", str(path))


def test_a_file_without_a_list_of_saes_is_left_alone(tmp_path: Path) -> None:
    """An entry in the wrong place would be worse than one that people paste."""
    for text in ("root: {root}\n", "root: {root}\nsaes: [{{name: demo}}]\n"):
        path = write_yaml(tmp_path, text)
        before = path.read_text()
        folder = save_saelens(tmp_path / f"layers.2.{len(text)}", config=STANDARD)
        with pytest.raises(ConfigError, match="has no list `saes:` with one item a line; put the entry below into it yourself"):
            invoke("import", str(folder), "--config", str(path), "--hook-point", "resid_post.2", "--add")
        assert path.read_text() == before
        assert not list(tmp_path.glob(".*"))


def test_the_entry_stays_above_the_comment_of_the_next_section(tmp_path: Path) -> None:
    """In the file that `interp init` writes, every section begins with one."""
    path = tmp_path / "pipeline.yaml"
    path.write_text(make_starter(path.name))
    before = path.read_text()
    folder = save_saelens(tmp_path / "theirs", config=STANDARD)
    assert invoke("import", str(folder), "--config", str(path), "--hook-point", "resid_post.2", "--name", "foreign", "--add").exit_code == 0
    text = path.read_text()
    start, stop = text.index("  - name: foreign\n"), text.index("\n# Which SAEs are shown")
    assert text[:start] + text[stop:] == before
    assert "#" not in text[start:stop].replace("# expected L0", "")
    assert [sae.name for sae in load_config(path).saes] == ["demo", "foreign"]


def test_the_file_stays_a_link_with_its_line_ends_and_rights(tmp_path: Path) -> None:
    """People keep configurations in a repository and link to them, and some of them write on Windows."""
    real = tmp_path / "repository" / "real.yaml"
    real.parent.mkdir()
    real.write_bytes(YAML.format(root=tmp_path / "data").replace("\n", "\r\n").encode())
    real.chmod(0o640)
    link = tmp_path / "pipeline.yaml"
    link.symlink_to(real)
    folder = save_saelens(tmp_path / "theirs", config=STANDARD)
    assert invoke("import", str(folder), "--config", str(link), "--hook-point", "resid_post.0", "--name", "foreign", "--add").exit_code == 0
    assert link.is_symlink()
    data = real.read_bytes()
    assert b"name: foreign\r\n" in data
    assert data.count(b"\n") == data.count(b"\r\n")
    assert real.stat().st_mode & 0o777 == 0o640
    assert not list(tmp_path.glob("**/.*"))


@pytest.mark.parametrize("name", ["true", "null", "on", "yes", "nan", "12", "1e3", "plain_name"])
def test_a_name_that_yaml_takes_for_something_else_is_quoted(tmp_path: Path, name: str) -> None:
    """A file that says `name: true` is not read any more."""
    path = write_yaml(tmp_path)
    folder = save_saelens(tmp_path / "theirs", config=STANDARD)
    done = invoke("import", str(folder), "--config", str(path), "--hook-point", "resid_post.0", "--name", name, "--add")
    assert yaml.safe_load(done.stdout)[0]["name"] == name
    assert load_config(path).sae(name).imported == str(folder)


def test_a_transcoder_keeps_both_hook_points(make_planted, tmp_path: Path) -> None:
    """Its target is in the folder as the source is."""
    fields = {"name": "own", "architecture": "relu", "task": "skip_transcoder", "target_hook_point": "mlp_out.0", "d_sae": 24, "k": 3}
    planted = make_planted([{**fields, "n_rows": 500, "batch_rows": 100}], root=str(tmp_path / "data"))
    run_training(planted.pipeline, planted.store, ["own"])
    save_plan(planted.store, planted.pipeline.plan)
    export_sae(planted.pipeline, planted.store, "own", "saelens", open_store(str(tmp_path / "theirs")))
    path = write_yaml(tmp_path)
    done = invoke("import", str(tmp_path / "theirs"), "--config", str(path), "--name", "foreign", "--add")
    assert done.exit_code == 0
    pipeline = Pipeline(load_config(path), planted.pipeline.plan)
    entry = pipeline.config.sae("foreign")
    assert (entry.task, entry.hook_point, entry.target_hook_point) == ("skip_transcoder", HOOK, "mlp_out.0")
    import_sae(pipeline, planted.store, "foreign")
    own, foreign = load_sae(planted.pipeline, planted.store, "own"), load_sae(pipeline, planted.store, "foreign")
    rows = planted.rows[:50].float()
    torch.testing.assert_close(foreign.reconstruct(rows, foreign.encode(rows)), own.reconstruct(rows, own.encode(rows)))
    assert load_manifest(planted.store, sae_ref(pipeline, "foreign")).facts["d_out"] == 8
