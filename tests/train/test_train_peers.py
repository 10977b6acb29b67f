"""What we export is opened by the tools themselves, and what they save is opened by us: encodings are equal to 1e-5.

`INTERP_PEERS_PYTHON` names the interpreter of an environment with `sae-lens`, `eai-sparsify` and `dictionary-learning`; without it, and
without these packages beside ours, the tests that need a tool are skipped. Those of names, shapes and keys always run.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from interp_assets.errors import InputError
from interp_assets.planning.pipeline import save_plan
from interp_assets.storage.store import open_store
from interp_assets.terminal.cli import app
from interp_assets.terminal.web import SAE_FORMATS as COMMAND_FORMATS
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.exchange.folders import SAE_FORMATS, export_sae, read_foreign
from interp_assets.train.loop import train_saes
from interp_assets.train.sae import Sae

SCRIPT = Path(__file__).parents[1] / "support" / "peer_saes.py"
HOOK, OTHER = "resid_post.0", "mlp_out.0"
TINY: dict[str, Any] = {"d_sae": 48, "k": 3, "n_rows": 2000, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 500}
SAES: list[dict[str, Any]] = [
    *({"name": name, "architecture": name} for name in ("relu", "topk", "batch_topk", "matryoshka_batch_topk", "gated", "jump_relu")),
    {"name": "transcoder", "architecture": "relu", "task": "transcoder", "target_hook_point": OTHER},
    {"name": "batch_topk_transcoder", "architecture": "batch_topk", "task": "transcoder", "target_hook_point": OTHER},
    {"name": "relu_skip", "architecture": "relu", "task": "skip_transcoder", "target_hook_point": OTHER},
    {"name": "batch_topk_skip", "architecture": "batch_topk", "task": "skip_transcoder", "target_hook_point": OTHER},
    {"name": "topk_skip", "architecture": "topk", "task": "skip_transcoder", "target_hook_point": HOOK},
    {"name": "topk_transcoder", "architecture": "topk", "task": "transcoder", "target_hook_point": HOOK},
]
EXPORTED: list[tuple[str, str]] = [
    *(("saelens", sae["name"]) for sae in SAES if not sae["name"].startswith("topk_")),
    *(("sparsify", name) for name in ("topk", "topk_skip", "topk_transcoder")),
    *(("dictionary_learning", name) for name in ("relu", "topk", "batch_topk", "matryoshka_batch_topk", "gated", "jump_relu")),
]
SAVED: list[tuple[str, str]] = [
    *(("saelens", what) for what in ("standard", "gated", "topk", "topk+rescale", "jumprelu")),
    *(("saelens", what) for what in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")),
    *(("sparsify", what) for what in ("sae", "transcoder", "skip_transcoder")),
    *(("dictionary_learning", what) for what in ("AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder")),
    *(("dictionary_learning", what) for what in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "MatryoshkaBatchTopKSAE")),
]
PACKAGES = ("sae_lens", "sparsify", "dictionary_learning")


class Answers(NamedTuple):
    """Our SAEs and exported folders, and what the tools said of the rows."""

    folder: Path
    rows: torch.Tensor
    saes: dict[str, Sae]


def find_peers() -> str | None:
    """Return the interpreter that has the tools."""
    chosen = os.environ.get("INTERP_PEERS_PYTHON")
    return chosen or (sys.executable if all(importlib.util.find_spec(name) for name in PACKAGES) else None)


@pytest.fixture(scope="module")
def exported(make_planted, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Train the SAEs and export each into every folder of `EXPORTED`."""
    folder = tmp_path_factory.mktemp("peers")
    planted = make_planted([{**TINY, **sae} for sae in SAES])
    names = [sae["name"] for sae in SAES]
    train_saes(planted.pipeline, planted.store, names)
    for tool, name in EXPORTED:
        export_sae(planted.pipeline, planted.store, name, tool, open_store(str(folder / tool / name)))
    rows = planted.rows[:500].float()
    np.save(folder / "rows.npy", rows.numpy())
    return Answers(folder, rows, {name: load_sae(planted.pipeline, planted.store, name) for name in names})


@pytest.fixture(scope="module")
def answers(exported: Answers) -> Answers:
    """Let the tools open all folders and save some of their own, in one process of theirs."""
    python = find_peers()
    if python is None:
        pytest.skip(f"needs {', '.join(PACKAGES)}: install them here, or name an interpreter that has them in INTERP_PEERS_PYTHON")
    jobs = [{"do": "load", "tool": tool, "folder": str(exported.folder / tool / name)} for tool, name in EXPORTED]
    jobs += [{"do": "save", "tool": tool, "folder": str(exported.folder / "theirs" / tool / what), "what": what} for tool, what in SAVED]
    (exported.folder / "jobs.json").write_text(json.dumps([{**job, "answer": job["folder"] + "-answer"} for job in jobs]))
    done = subprocess.run([python, str(SCRIPT), str(exported.folder / "jobs.json")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return exported


def compare(sae: Sae, answers: Answers, answer: Path) -> None:
    """Compare latents and reconstruction with what the tool said."""
    latents, output = (torch.from_numpy(np.load(f"{answer}-answer.{name}.npy")) for name in ("latents", "output"))
    own = sae.encode(answers.rows)
    assert int((latents > 0).sum()) > 0
    torch.testing.assert_close(own, latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.reconstruct(answers.rows, own), output, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("tool", "name"), EXPORTED)
def test_a_tool_opens_our_folder_and_encodes_alike(answers: Answers, tool: str, name: str) -> None:
    """`SAE.load_from_disk`, `SparseCoder.load_from_disk` and `load_dictionary`: calibrated thresholds, transcoders and skips included."""
    compare(answers.saes[name], answers, answers.folder / tool / name)


@pytest.mark.slow
@pytest.mark.parametrize(("tool", "what"), SAVED)
def test_we_open_what_a_tool_saved_and_encode_alike(answers: Answers, tool: str, what: str) -> None:
    """Whoever trained it: encoders that see x - b_dec, gates, decoder norms in the competition."""
    folder = answers.folder / "theirs" / tool / what
    compare(read_foreign(open_store(str(folder))).sae, answers, folder)


@pytest.mark.parametrize(("tool", "name"), EXPORTED)
def test_our_own_folders_come_back(exported: Answers, tool: str, name: str) -> None:
    """Export and import are inverse functions."""
    sae, x = exported.saes[name], exported.rows
    again = read_foreign(open_store(str(exported.folder / tool / name))).sae
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.reconstruct(x, again.encode(x)), sae.reconstruct(x, sae.encode(x)), rtol=1e-4, atol=1e-4)


GOLDEN: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("saelens", "batch_topk"): {"W_enc": (16, 48), "b_enc": (48,), "W_dec": (48, 16), "b_dec": (16,), "threshold": (48,)},
    ("saelens", "relu_skip"): {"W_enc": (16, 48), "b_enc": (48,), "W_dec": (48, 8), "b_dec": (8,), "W_skip": (8, 16)},
    ("sparsify", "topk"): {"encoder.weight": (48, 16), "encoder.bias": (48,), "W_dec": (48, 16), "b_dec": (16,)},
    ("sparsify", "topk_skip"): {"encoder.weight": (48, 16), "encoder.bias": (48,), "W_dec": (48, 16), "b_dec": (16,), "W_skip": (16, 16)},
    ("dictionary_learning", "topk"): {
        "encoder.weight": (48, 16),
        "encoder.bias": (48,),
        "decoder.weight": (16, 48),
        "b_dec": (16,),
        "k": (),
        "threshold": (),
    },
    ("dictionary_learning", "gated"): {"W_enc": (16, 48), "b_enc": (48,), "W_dec": (48, 16), "b_dec": (16,), "threshold": (48,)},
}
FILES = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors", "dictionary_learning": "ae.pt"}
KEYS = {
    "saelens": {
        "architecture",
        "d_in",
        "d_sae",
        "dtype",
        "device",
        "apply_b_dec_to_input",
        "normalize_activations",
        "reshape_activations",
        "metadata",
    },
    "sparsify": {
        *("activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk", "skip_connection", "transcode", "d_in"),
    },
    "dictionary_learning": {"trainer"},
}


@pytest.mark.parametrize(("tool", "name"), list(GOLDEN))
def test_files_have_the_names_shapes_and_keys_that_the_tools_read(exported: Answers, tool: str, name: str) -> None:
    """Taken from the tools' own classes, so that a change here is noticed without them."""
    folder = exported.folder / tool / name
    path = folder / FILES[tool]
    tensors = torch.load(path, weights_only=True) if tool == "dictionary_learning" else load_file(path)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == GOLDEN[tool, name]
    assert all(value.dtype == torch.float32 for key, value in tensors.items() if key != "k")
    config = json.loads((folder / ("config.json" if tool == "dictionary_learning" else "cfg.json")).read_text())
    assert set(config) == KEYS[tool] | ({"d_out"} if (tool, name) == ("saelens", "relu_skip") else set())
    if tool == "dictionary_learning":
        trainer = {"activation_dim": 16, "dict_size": 48, "lm_name": "builtin:pystdlib_gpt2", "layer": 0}
        trainer |= {"submodule_name": "resid_post_layer_0", "hook_point": "resid_post.0"}
        kind = {"dict_class": "AutoEncoderTopK", "k": 3} if name == "topk" else {"dict_class": "JumpReluAutoEncoder"}
        assert config["trainer"] == {**trainer, **kind}
    if tool == "saelens":
        sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
        assert sparsity.shape == (48,)
        assert float(sparsity.max()) <= 0
        assert float(sparsity.double().pow(1).max()) > -3


def test_an_export_that_a_format_cannot_hold_is_refused(exported: Answers, make_planted, tmp_path: Path) -> None:
    """Before a file is written, with the format that can."""
    planted = make_planted([{**TINY, **sae} for sae in SAES])
    names = ["relu", "batch_topk_transcoder", "topk_transcoder"]
    train_saes(planted.pipeline, planted.store, names)
    for tool, name, message in (
        ("sparsify", "relu", "sparsify holds TopK SAEs only, this one is 'relu'. Export it as saelens or dictionary_learning"),
        ("dictionary_learning", "batch_topk_transcoder", r"hook points of two widths: this one reads 16 values and writes 8. Export it as saelens"),
        ("saelens", "topk_transcoder", "SAELens has no TopK transcoders. Export this one as sparsify"),
        ("gguf", "relu", f"No format of SAEs is called 'gguf'; there are {', '.join(SAE_FORMATS)}"),
    ):
        with pytest.raises(InputError, match=message):
            export_sae(planted.pipeline, planted.store, name, tool, open_store(str(tmp_path / tool)))
        assert not list((tmp_path / tool).rglob("*.*"))


def test_the_command_exports_an_sae(make_planted, tmp_path: Path) -> None:
    """One SAE needs no name, of several one is asked for, and the folder is the one that the function writes."""
    planted = make_planted([{**TINY, **SAES[1]}, {**TINY, **SAES[2]}], root=str(tmp_path / "data"))
    train_saes(planted.pipeline, planted.store, ["topk"])
    save_plan(planted.store, planted.pipeline.plan)
    config = tmp_path / "pipeline.yaml"
    config.write_text(planted.pipeline.config.model_dump_json())
    command = ["export", "sparsify", str(tmp_path / "out"), "--config", str(config)]
    done = CliRunner().invoke(app, [*command, "--sae", "topk"], catch_exceptions=False)
    assert " ".join(done.output.split()).startswith("SAE topk: cfg.json, sae.safetensors,")
    sae, x = load_sae(planted.pipeline, planted.store, "topk"), planted.rows[:50].float()
    torch.testing.assert_close(read_foreign(open_store(str(tmp_path / "out"))).sae.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"There are 2 SAEs: topk, batch_topk. Name one with --sae."):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert COMMAND_FORMATS == SAE_FORMATS


def test_a_folder_that_is_no_sae_says_what_was_expected(tmp_path: Path) -> None:
    """And a file that could run code is not loaded."""
    store = open_store(str(tmp_path))
    store.put("readme.md", b"")
    with pytest.raises(InputError, match=r"holds no SAE: expected cfg.json and sae_weights.safetensors \(SAELens\).*found \['readme.md'\]"):
        read_foreign(store)
    store.put("config.json", b'{"trainer": {"dict_class": "AutoEncoderTopK"}}')
    store.put("ae.pt", b"\x80\x04cposix\nsystem\n\x85R.")
    with pytest.raises(InputError, match=r"ae.pt is no file of tensors alone"):
        read_foreign(store)
    store.put("cfg.json", b'{"architecture": "temporal", "d_in": 4, "d_sae": 8, "dtype": "float32"}')
    store.put("sae_weights.safetensors", b"")
    with pytest.raises(InputError, match=r"cannot be read \(cfg.json, sae_weights.safetensors: SafetensorError.*Copy it again"):
        read_foreign(store)
