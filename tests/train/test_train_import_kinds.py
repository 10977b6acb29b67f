"""What changes an imported SAE's function or place is understood or refused by its name; and what no name tells, held-out rows do."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_models import save_model
from typer.testing import CliRunner, Result

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import InputError
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.harvest.rows import ROWS
from interp_assets.planning.config import PipelineConfig, load_config, make_config
from interp_assets.planning.pipeline import Pipeline, save_plan
from interp_assets.storage.manifest import create_artifact
from interp_assets.storage.store import Store, open_store
from interp_assets.storage.tensors import save_tensors
from interp_assets.terminal.cli import app
from interp_assets.terminal.importing import Place, plan_import
from interp_assets.train.exchange.fit import Claims, Fit, explain_misfit
from interp_assets.train.exchange.folders import export_sae, read_foreign
from interp_assets.train.launch import run_training
from interp_assets.train.sae import Sae

D_IN, D_SAE = 16, 24
SCALER = Path(__file__).parents[1] / "golden" / "saelens_scaler.json"
"""`scaled` of `rows`; `unscaled` of twice that plus `shift`."""
GENERATOR = torch.Generator().manual_seed(11)
X = torch.randn(30, D_IN, generator=GENERATOR)


def draw(*shape: int) -> torch.Tensor:
    """Draw values that matter."""
    return torch.randn(*shape, generator=GENERATOR) * 0.5


WEIGHTS = {"W_enc": draw(D_IN, D_SAE), "b_enc": draw(D_SAE), "W_dec": draw(D_SAE, D_IN), "b_dec": draw(D_IN)}
MODERN = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": {"sae_lens_version": "6.54.0"}}
SPARSIFY = {"activation": "topk", "k": 3, "d_in": D_IN, "num_latents": D_SAE, "multi_topk": False, "transcode": False, "skip_connection": False}


def save_saelens(folder: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Path:
    """Write a folder as SAELens does."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({**WEIGHTS, **tensors}, folder / "sae_weights.safetensors")
    return folder


def save_sparsify(folder: Path, **config: Any) -> Path:
    """Write a folder as sparsify does."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps({**SPARSIFY, **config}))
    weights = {
        "encoder.weight": WEIGHTS["W_enc"].T.contiguous(),
        "encoder.bias": WEIGHTS["b_enc"],
        "W_dec": WEIGHTS["W_dec"],
        "b_dec": WEIGHTS["b_dec"],
    }
    save_file({**weights, **({"W_skip": draw(D_IN, D_IN)} if config.get("skip_connection") else {})}, folder / "sae.safetensors")
    return folder


def save_dictionary(folder: Path, trainer: dict[str, Any], buffer: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    """Write a folder as dictionary_learning does, of a TopK."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK", **trainer}, "buffer": buffer or {}}))
    weights = {
        "encoder.weight": WEIGHTS["W_enc"].T,
        "encoder.bias": WEIGHTS["b_enc"],
        "decoder.weight": WEIGHTS["W_dec"].T,
        "b_dec": WEIGHTS["b_dec"],
    }
    torch.save({**weights, **tensors}, folder / "ae.pt")
    return folder


def read(folder: Path) -> Sae:
    """Read the SAE of a folder."""
    return read_foreign(open_store(str(folder))).sae


def configure(model: Path, hook_points: list[str]) -> PipelineConfig:
    """Make a pipeline over a model that harvests these hook points."""
    saes = [{"name": "own", "hook_point": hook_points[0]}]
    sections = {"model": {"name": str(model)}, "harvest": {"hook_points": hook_points}, "saes": saes, "features": {"saes": []}}
    return make_config({**sections, "root": str(model.parent / "data")})


def invoke(*arguments: str) -> Result:
    """Run a command; errors come through."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


# places

RAW, ADDED = "module:model.layers.1.mlp", "mlp_out.1"
PLACES = [
    ("gemma2", "layers.1.mlp", RAW),
    ("gemma3_text", "layers.1.self_attn", "module:model.layers.1.self_attn"),
    ("olmo2", "model.layers.1.mlp", RAW),
    ("gemma2", "layers.1.post_feedforward_layernorm", ADDED),
    ("gemma2", "layers.1", "resid_post.1"),
    ("llama", "layers.1.mlp", ADDED),
    ("llama", "layers.1.mlp.down_proj", "module:model.layers.1.mlp.down_proj"),
    ("gpt2", "h.1.attn", "attn_out.1"),
]


@pytest.mark.parametrize(("kind", "path", "place"), PLACES)
def test_a_modules_output_is_what_the_model_says_it_is(kind: str, path: str, place: str, tmp_path: Path) -> None:
    """Sparsify calls its folders after modules. What follows a norm in Gemma 2 and OLMo 2 is another tensor than the module's: FVU 9.8, not 0.3."""
    harvested = ["resid_post.1", ADDED, place] if kind in ("llama", "gpt2") else ["resid_post.1", RAW, ADDED, place]
    config = configure(save_model(tmp_path / "model", kind), list(dict.fromkeys(harvested)))
    found = plan_import(config, Place(str(save_sparsify(tmp_path / path))))
    assert found.entry.hook_point == place
    assert found.entry.name == path


@pytest.mark.parametrize(
    ("kind", "name", "place"), [("gemma2", "mlp_out_layer_1", RAW), ("llama", "mlp_out_layer_1", ADDED), ("gpt2", "attn_layer_0", "attn_out.0")]
)
def test_dictionary_learnings_names_mean_the_modules_output_too(kind: str, name: str, place: str, tmp_path: Path) -> None:
    """Its users hook `model.layers[1].mlp`; only an export of ours says which of the two it is."""
    config = configure(save_model(tmp_path / "model", kind), [place, *({ADDED, "attn_out.0"} - {place})])
    told = {"k": 3, "submodule_name": name}
    assert plan_import(config, Place(str(save_dictionary(tmp_path / "theirs", told)))).entry.hook_point == place
    ours = save_dictionary(tmp_path / "ours", {**told, "hook_point": ADDED})
    assert plan_import(config, Place(str(ours))).entry.hook_point == ADDED


@pytest.mark.parametrize("told", ["", "blocks.1.hook_mlp_out"])
def test_a_module_path_that_is_chosen_is_kept(told: str, tmp_path: Path) -> None:
    """Whoever names one means it; the canonical name was put in its place."""
    config = configure(save_model(tmp_path / "model", "gemma2"), [ADDED, RAW])
    folder = save_saelens(tmp_path / "theirs", {**MODERN, "metadata": {"sae_lens_version": "6.0.0", "hook_name": told}})
    assert plan_import(config, Place(str(folder), hook_point=RAW)).entry.hook_point == RAW
    assert plan_import(config, Place(str(folder), hook_point="layers.1.mlp")).entry.hook_point == RAW
    assert plan_import(config, Place(str(folder), hook_point="blocks.1.hook_mlp_out")).entry.hook_point == ADDED


def test_the_name_that_is_harvested_is_taken_where_two_mean_the_same(tmp_path: Path) -> None:
    """In a Llama `module:model.layers.1.mlp` is `mlp_out.1`."""
    config = configure(save_model(tmp_path / "model", "llama"), [RAW])
    found = plan_import(config, Place(str(save_sparsify(tmp_path / "layers.1.mlp"))))
    assert (found.entry.hook_point, found.entry.name) == (RAW, "layers.1.mlp")
    assert not any("the folder says hook point" in warning for warning in found.warnings)


def test_a_place_that_is_not_harvested_or_not_there_is_said(tmp_path: Path) -> None:
    """With the very name to add; and a transcoder's input is the module's input, which has no name."""
    config = configure(save_model(tmp_path / "model", "gemma2"), [ADDED])
    with pytest.raises(InputError, match=r"belongs to mlp_raw.1 \(its folder says 'layers.1.mlp'\).* Add mlp_raw.1 to them"):
        plan_import(config, Place(str(save_sparsify(tmp_path / "layers.1.mlp"))))
    with pytest.raises(InputError, match=r"calls its hook point 'h.1.mlp', which has no name here"):
        plan_import(config, Place(str(save_sparsify(tmp_path / "h.1.mlp"))))
    with pytest.raises(InputError, match=r"calls its hook point 'input of layers.1.mlp', which has no name here"):
        plan_import(config, Place(str(save_sparsify(tmp_path / "transcoder" / "layers.1.mlp", transcode=True))))
    with pytest.raises(InputError, match=r"calls its hook point 'input of mlp_layer_1'"):
        plan_import(config, Place(str(save_dictionary(tmp_path / "in", {"k": 3, "submodule_name": "mlp_layer_1"}, {"io": "in"}))))


@pytest.mark.parametrize(("family", "hook"), [("gpt2", "blocks.0.attn.hook_q"), ("llama", "blocks.0.attn.hook_rot_q")])
def test_queries_are_found_by_the_name_they_have_in_the_model(tmp_path: Path, family: str, hook: str) -> None:
    """`hook_q` is read before RoPE where there is one, and is `q.0` where there is none."""
    config = configure(save_model(tmp_path / "model", family), ["q.0"])
    folder = save_saelens(tmp_path / "sae", {**MODERN, "metadata": {"sae_lens_version": "6.54.0", "hook_name": hook}})
    assert plan_import(config, Place(str(folder))).entry.hook_point == "q.0"


# scaling


def whitening() -> dict[str, torch.Tensor]:
    """Draw an invertible whitening."""
    matrix = torch.linalg.qr(draw(D_IN, D_IN).double()).Q * (0.5 + torch.rand(D_IN, generator=GENERATOR).double())
    return {"mean": draw(D_IN).double(), "matrix": matrix.contiguous(), "inverse_matrix": torch.linalg.inv(matrix).contiguous()}


@pytest.mark.parametrize("architecture", ["standard", "topk+rescale", "jumprelu", "gated"])
@pytest.mark.parametrize("scaling", ["expected_average_only_in", "covariance_whitening"])
def test_a_checkpoint_that_scales_its_rows_is_the_same_function(scaling: str, architecture: str, tmp_path: Path) -> None:
    """SAELens keeps the scale beside the weights until the training ends. The oracle scales rows, runs the unscaled SAE, and scales back."""
    kind, _, rescale = architecture.partition("+")
    extra = {"threshold": draw(D_SAE).abs()} if kind == "jumprelu" else {}
    if kind == "gated":
        extra = {"b_gate": draw(D_SAE), "b_mag": draw(D_SAE), "r_mag": draw(D_SAE)}
    fields = {"k": 4, "rescale_acts_by_decoder_norm": bool(rescale)} if kind == "topk" else {}
    config = {**MODERN, **fields, "architecture": kind}
    weights = {name: value for name, value in WEIGHTS.items() if kind != "gated" or name != "b_enc"}
    folders = [tmp_path / "plain", tmp_path / "scaled"]
    for folder, told in zip(folders, ("none", scaling), strict=True):
        folder.mkdir()
        (folder / "cfg.json").write_text(json.dumps({**config, "normalize_activations": told}))
        save_file({**weights, **extra}, folder / "sae_weights.safetensors")
    statistics = whitening() if scaling == "covariance_whitening" else None
    factor = None if statistics else 7.3
    scaler = {"scaling_factor": factor, "has_whitening": statistics is not None}
    (folders[1] / "activation_scaler.json").write_text(json.dumps(scaler))
    if statistics:
        save_file(statistics, folders[1] / "activation_whitening.safetensors")
    plain, scaled = read(folders[0]), read(folders[1])
    z = ((X.double() - statistics["mean"]) @ statistics["matrix"]).float() if statistics else X * 7.3
    latents = plain.encode(z)
    z_hat = plain.reconstruct(z, latents)
    x_hat = (z_hat.double() @ statistics["inverse_matrix"] + statistics["mean"]).float() if statistics else z_hat / 7.3
    assert int((latents > 0).sum()) > 0
    torch.testing.assert_close(scaled.encode(X), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.reconstruct(X, scaled.encode(X)), x_hat, rtol=1e-5, atol=1e-5)
    assert read_foreign(open_store(str(folders[0]))).digest != read_foreign(open_store(str(folders[1]))).digest


def test_scaled_rows_are_those_of_saelens_own_class(tmp_path: Path) -> None:
    """The numbers are what `ActivationScaler` of SAELens made of these rows (float64): it scales first and then whitens, and back again."""
    golden = {name: torch.tensor(value, dtype=torch.float64) for name, value in json.loads(SCALER.read_text()).items()}
    n = len(golden["mean"])
    both = torch.cat([torch.eye(n), -torch.eye(n)])
    weights = {"W_enc": both.T.contiguous(), "b_enc": torch.zeros(2 * n), "W_dec": 2 * both, "b_dec": golden["shift"].float()}
    config = {**MODERN, "d_in": n, "d_sae": 2 * n, "apply_b_dec_to_input": False, "normalize_activations": "covariance_whitening"}
    folder = save_saelens(tmp_path / "sae", config, **weights)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": float(golden["scaling_factor"])}))
    save_file({name: golden[name] for name in ("mean", "matrix", "inverse_matrix")}, folder / "activation_whitening.safetensors")
    sae, x = read(folder), golden["rows"].float()
    latents = sae.encode(x)
    torch.testing.assert_close((latents[:, :n] - latents[:, n:]).double(), golden["scaled"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.reconstruct(x, latents).double(), golden["unscaled"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "files", "message"),
    [
        ("none", {"activation_scaler.json": '{"scaling_factor": 2.0}'}, "says normalize_activations none, and activation_scaler.json"),
        ("expected_average_only_in", {}, "is expected_average_only_in, and its statistics are not beside it"),
        ("expected_average_only_in", {"activation_scaler.json": '{"scaling_factor": null}'}, "its statistics are not beside it"),
        ("covariance_whitening", {}, "is covariance_whitening, and its statistics are not beside it"),
        ("expected_average_only_in", {"activation_scaler.json": '{"scaling_factor": 0}'}, "scaling_factor in activation_scaler.json is 0, expected"),
        ("expected_average_only_in", {"activation_scaler.json": '{"scaling_factor": "NaN"}'}, "is 'NaN', expected a number above 0"),
        ("expected_average_only_in", {"activation_scaler.json": '{"scaling_factor": 2.0, "shift": 1}'}, "has shift, which is not known here"),
        ("covariance_whitening", {"activation_scaler.json": '{"scaling_factor": null, "has_whitening": true}'}, "safetensors is not beside it"),
    ],
)
def test_a_scale_that_is_not_told_is_refused(scaling: str, files: dict[str, str], message: str, tmp_path: Path) -> None:
    """Half of a scale is another function; unscaled, reconstructions were off by 4.9 of 39."""
    folder = save_saelens(tmp_path / "sae", {**MODERN, "normalize_activations": scaling})
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read(folder)


def test_what_was_folded_in_already_stays_as_it_is(tmp_path: Path) -> None:
    """The last checkpoint of a training: the scale is in the weights, its file says so."""
    folder = save_saelens(tmp_path / "sae", {**MODERN, "normalize_activations": "none"})
    before = read(folder)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": null, "has_whitening": false}')
    assert torch.equal(read(folder).W_enc, before.W_enc)


# keys, files, tensors


def test_an_sae_of_centred_rows_is_refused_with_the_way_to_fold_it(tmp_path: Path) -> None:
    """What the message advises gives the latents of centred rows on raw ones."""
    options = {"center_writing_weights": True, "fold_ln": True}
    metadata = {"sae_lens_version": "6.0.0", "model_from_pretrained_kwargs": options}
    with pytest.raises(InputError, match=r"has center_writing_weights true: .* subtract its mean from each column of W_enc"):
        read(save_saelens(tmp_path / "centred", {**MODERN, "metadata": metadata}))
    with pytest.raises(InputError, match="has center_writing_weights true"):
        read(save_saelens(tmp_path / "old", {"d_in": D_IN, "d_sae": D_SAE, "model_from_pretrained_kwargs": options}))
    theirs = read(save_saelens(tmp_path / "theirs", MODERN))
    advised = {**metadata, "model_from_pretrained_kwargs": {**options, "center_writing_weights": False}}
    folded = read(save_saelens(tmp_path / "folded", {**MODERN, "metadata": advised}, W_enc=WEIGHTS["W_enc"] - WEIGHTS["W_enc"].mean(0)))
    centred = X - X.mean(1, keepdim=True)
    # b_dec of a centred stream has no mean either; here it has, so it is taken out by hand
    shift = WEIGHTS["b_dec"].mean() * WEIGHTS["W_enc"].sum(0)
    expected = (centred @ theirs.W_enc + theirs.b_enc + shift).relu()
    torch.testing.assert_close(folded.encode(X), expected, rtol=1e-5, atol=1e-5)


HARMLESS = {"fold_ln": True, "center_unembed": True, "fold_value_biases": True, "dtype": "bfloat16", "n_devices": 2, "revision": None}


def test_options_that_leave_the_stream_alone_are_taken(tmp_path: Path) -> None:
    """TransformerLens folds them into weights inside attention and the unembedding."""
    metadata = {"sae_lens_version": "6.0.0", "model_from_pretrained_kwargs": HARMLESS, "seqpos_slice": [None], "prepend_bos": False}
    assert read(save_saelens(tmp_path / "sae", {**MODERN, "metadata": metadata})).d_sae == D_SAE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**MODERN, "input_shift": 0.5}, "cfg.json of this SAELens SAE has input_shift, which is not known here and may change .* delete it"),
        ({**MODERN, "metadata": {"sae_lens_version": "6.0.0", "norm": 2}}, "metadata in cfg.json of this SAELens SAE has norm"),
        ({**MODERN, "hook_head_index": 3}, "hook_head_index in cfg.json is 3: this SAE reads a single attention head"),
        ({**MODERN, "metadata": {"hook_head_index": 0}}, "hook_head_index in cfg.json is 0"),
        ({**MODERN, "model_kwargs": {"output_attentions": True}}, "model_kwargs in cfg.json are"),
        (
            {**MODERN, "metadata": {"model_from_pretrained_kwargs": {"checkpoint_index": 7}}},
            "has checkpoint_index 7: it may have been trained on another",
        ),
        ({**MODERN, "metadata": {"model_from_pretrained_kwargs": {"revision": "step1000"}}}, "has revision 'step1000'"),
        ({"d_in": D_IN, "d_sae": D_SAE, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2, "postact_fn": "x"}}, "has postact_fn"),
        ({**MODERN, "metadata": [1]}, "metadata in cfg.json of this SAELens SAE holds a list"),
    ],
)
def test_a_key_of_saelens_that_is_not_known_is_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Each loader drops what it does not know."""
    with pytest.raises(InputError, match=message):
        read(save_saelens(tmp_path / "sae", config))


def test_a_key_or_a_tensor_of_sparsify_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    """A skip that the configuration does not tell too."""
    with pytest.raises(InputError, match=r"cfg.json of this sparsify SAE has jump, which"):
        read(save_sparsify(tmp_path / "a", jump=1))
    with pytest.raises(InputError, match="negative latents"):
        read(save_sparsify(tmp_path / "b", signed=True))
    folder = save_sparsify(tmp_path / "c", transcode=True, skip_connection=True)
    assert read(folder).W_skip is not None
    (folder / "cfg.json").write_text(json.dumps({**SPARSIFY, "transcode": True}))
    with pytest.raises(InputError, match="the weights of this sparsify SAE hold W_skip, which its architecture does not have"):
        read(folder)


@pytest.mark.parametrize(
    ("trainer", "buffer", "tensors", "message"),
    [
        ({"k": 3, "input_scale": 2}, {}, {}, r"trainer in config.json of this dictionary_learning SAE has input_scale"),
        ({"k": 3}, {"io": "in_and_out"}, {}, "io of buffer in config.json is 'in_and_out'"),
        ({"k": 3}, {"centre": True}, {}, "buffer in config.json of this dictionary_learning SAE has centre"),
        ({"k": 3}, {}, {"scale": torch.ones(3)}, "hold scale, which its architecture does not have"),
        ({"k": 3}, {}, {"k": torch.tensor(4)}, "is 4 in ae.pt and 3 in config.json: the two files are not of one training"),
        ({}, {}, {}, r"config.json \(trainer\) of this dictionary_learning SAE has no 'k'"),
    ],
)
def test_a_key_or_a_tensor_of_dictionary_learning_that_is_not_known_is_refused_by_name(
    trainer: dict[str, Any], buffer: dict[str, Any], tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    """And k in two places must be one."""
    with pytest.raises(InputError, match=message):
        read(save_dictionary(tmp_path / "sae", trainer, buffer, **tensors))


def test_a_topk_of_2024_has_its_k_in_the_configuration_only(tmp_path: Path) -> None:
    """It is what its loader takes; the refusal advised to save it again."""
    sae = read(save_dictionary(tmp_path / "sae", {"k": 3, "norm_factor": 5.0}))
    pre = ((X - WEIGHTS["b_dec"]) @ WEIGHTS["W_enc"] + WEIGHTS["b_enc"]).relu()
    expected = torch.zeros_like(pre).scatter(1, pre.topk(3).indices, pre.topk(3).values)
    torch.testing.assert_close(sae.encode(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "is_known"), [("README.md", True), ("runner_cfg.json", True), ("norm.safetensors", False), ("scale.json", False)])
def test_a_file_that_is_not_known_is_refused_by_name(name: str, is_known: bool, tmp_path: Path) -> None:
    """A scale may lie in one."""
    folder = save_saelens(tmp_path / "sae", MODERN)
    (folder / name).write_bytes(b"{}")
    (folder / "below").mkdir()
    (folder / "below" / "scale.json").write_bytes(b"{}")
    if is_known:
        read(folder)
        return
    with pytest.raises(InputError, match=f"beside cfg.json, sae_weights.safetensors lies {name}, which is not known here"):
        read(folder)


# quality


@pytest.fixture
def trained(make_planted, tmp_path: Path) -> Path:
    """Return a folder with a pipeline that has rows, and a trained SAE of it in `theirs`."""
    recipe = {"architecture": "batch_topk", "d_sae": 24, "k": 3, "n_rows": 2000, "batch_rows": 100, "learning_rate": 5e-3}
    planted = make_planted([{"name": "own", **recipe}], root=str(tmp_path / "data"))
    run_training(planted.pipeline, planted.store, ["own"])
    save_plan(planted.store, planted.pipeline.plan)
    export_sae(planted.pipeline, planted.store, "own", "saelens", open_store(str(tmp_path / "theirs")))
    save_held_out(planted.pipeline, planted.store, planted.rows)
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(planted.pipeline.config.model_dump(mode="json")))
    return tmp_path


def save_held_out(pipeline: Pipeline, store: Store, rows: torch.Tensor) -> None:
    """Publish rows as those of the held-out shard, every tenth of them of a special token."""
    n_rows = len(rows)
    columns = {"token_id": np.zeros(n_rows, np.uint32), "context": np.arange(n_rows, dtype=np.uint32) // 100}
    table = io.BytesIO()
    pq.write_table(pa.table({**columns, "document": columns["context"], "valid": np.arange(n_rows) % 10 > 0}), table)
    with create_artifact(store, token_shard_ref(pipeline, 0)) as art:
        art.put("tokens.parquet", table.getvalue())
    with create_artifact(store, activation_shard_ref(pipeline, "resid_post.0", 0)) as art:
        save_tensors(art, ROWS, {"rows": rows})


def test_an_import_shows_what_it_measures_beside_what_the_folder_claims(trained: Path) -> None:
    """Where the numbers come from is said."""
    told = " ".join(invoke("import", str(trained / "theirs"), "--config", str(trained / "pipeline.yaml")).stderr.split())
    assert "by sparsity.safetensors" in told
    assert "held-out rows" in told
    measured = float(told.split(" FVU ")[1].split()[0])
    assert 0 < measured < 0.5


def test_a_wild_one_is_refused_with_the_likely_cause_and_taken_in_on_request(trained: Path, tmp_path: Path) -> None:
    """Rows tell what no key does: here the SAE is of other rows."""
    folder = tmp_path / "wild"
    metadata = {"sae_lens_version": "6.0.0", "hook_name": "blocks.0.hook_resid_post", "l0": 3.0}
    save_saelens(folder, {**MODERN, "metadata": metadata}, b_dec=draw(D_IN) * 100)
    command = ["import", str(folder), "--config", str(trained / "pipeline.yaml")]
    with pytest.raises(
        InputError, match=r"does not fit resid_post.0: on [\d,]+ held-out rows the median row's squared error is .* more than 1: .* Likely"
    ):
        invoke(*command)
    done = invoke(*command, "--accept-misfit", "--add")
    assert "the mean alone would do better" in " ".join(done.stderr.split())
    assert load_config(trained / "pipeline.yaml").sae("wild-resid_post.0").accepts_misfit


@pytest.mark.parametrize(
    ("fit", "claims", "part"),
    [
        (Fit(100, 30.0, 0.2, 0.2), Claims(32.0, "cfg"), ""),
        (Fit(100, 30.0, 2.0, 0.4), Claims(), ""),
        (Fit(100, 30.0, 2.0, 1.2), Claims(), "the mean alone would do better"),
        (Fit(100, 321.0, 0.2, 0.2), Claims(32.0, "cfg"), "321 latents fire on a row, cfg says 32"),
        (Fit(100, 3.1, 0.2, 0.2), Claims(32.0, "cfg"), "more than 10 times as many or as few"),
        (Fit(100, 0.0, 0.9, 0.9), Claims(), "0 latents fire on a row, its folder says nothing"),
    ],
)
def test_what_is_wild_is_said_with_check_and_threshold(fit: Fit, claims: Claims, part: str) -> None:
    """A few rows of huge norm make FVU large, and are no reason."""
    assert part in explain_misfit(fit, claims)
    assert bool(part) == bool(explain_misfit(fit, claims))
