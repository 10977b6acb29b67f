"""Architectures of one's own: a function in a file is trained like the built-in ones, and what is wrong with it is said with its line."""

import io
import os
import socket
from contextlib import chdir
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from own_files import HEAD, P_ANNEAL, RELU, SOUND, change, reading, write_file
from planned import executing

from interp_assets import lab
from interp_assets.errors import ConfigError, InterpError, NonFiniteError, OwnCodeError
from interp_assets.planning.config import find_code, load_config, make_config
from interp_assets.planning.pipeline import Pipeline, open_pipeline_store, save_configuration, save_plan
from interp_assets.storage.manifest import Manifest, create_artifact, find_manifest, load_manifest, read_file
from interp_assets.storage.verify import verify_tree
from interp_assets.train.__main__ import main
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.launch import check_processes, run_training
from interp_assets.train.loop import train_saes
from interp_assets.train.own.load import keep_code, load_recipe
from interp_assets.train.refs import CODE, code_ref, sae_ref

TINY: dict[str, Any] = {"d_sae": 48, "k": 2, "n_rows": 2000, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 500}
OWN: dict[str, Any] = {"name": "a", "architecture": "my_sae.py:p_anneal", **TINY, "sparsity_coefficient": 0.5}


def train(planted: Any, name: str = "a", **kwargs: Any) -> Manifest:
    """Train one SAE and return its manifest."""
    return train_saes(planted.pipeline, planted.store, [name], **kwargs)[name].manifest


def read_log(planted: Any, name: str = "a") -> pl.DataFrame:
    """Read the logged steps of an SAE."""
    ref = sae_ref(planted.pipeline, name)
    return pl.read_parquet(io.BytesIO(read_file(planted.store, ref.path, load_manifest(planted.store, ref), "training.parquet")))


def test_p_anneal_is_one_file_of_eight_lines(make_planted, tmp_path: Path) -> None:
    """It was a fork: 6 files, 32 lines. It trains, its `p` falls, and the folder is an SAE like any other."""
    assert len([line for line in SOUND.splitlines() if line]) == 8
    write_file(tmp_path)
    planted = reading(make_planted([{**OWN, "options": {"p_end": 0.3}}]), tmp_path)
    manifest = train(planted)
    assert (manifest.facts["kind"], manifest.facts["architecture"]) == ("relu", "my_sae.py:p_anneal")
    log = read_log(planted)
    assert log["fvu"][-1] < log["fvu"][0]
    assert log["learning_rate"].max() == pytest.approx(5e-3)
    sae = load_sae(planted.pipeline, planted.store, "a")
    assert (sae.kind, sae.d_sae) == ("relu", 48)
    assert list(verify_tree(planted.store)) == []


def test_an_own_relu_is_the_built_in_one(make_planted, tmp_path: Path) -> None:
    """Loss, sparsity, L0 and gradient norm of every step, in float32: the same recipe, and the same numbers by autograd."""
    write_file(tmp_path, HEAD + RELU)
    fields = {**TINY, "sparsity_coefficient": 1.0}
    planted = reading(
        make_planted([{"name": "a", "architecture": "my_sae.py:mine", **fields}, {"name": "b", "architecture": "relu", **fields}]), tmp_path
    )
    train_saes(planted.pipeline, planted.store, ["a", "b"])
    own, built_in = read_log(planted, "a"), read_log(planted, "b")
    assert own.columns == built_in.columns
    for column in ("loss", "sparsity_loss", "fvu", "l0", "gradient_norm"):
        torch.testing.assert_close(torch.tensor(own[column].to_list()), torch.tensor(built_in[column].to_list()), rtol=1e-3, atol=1e-6, msg=column)


def test_options_and_constants_reach_what_they_name(make_planted, tmp_path: Path) -> None:
    """Those of the function, those of the trainer, and those of the declaration."""
    write_file(tmp_path, (HEAD + RELU).replace('kind="relu"', 'kind="relu", decoder_norm=0.5, betas=(0.5, 0.9)'))
    config = find_code(
        make_config({"saes": [{"architecture": "my_sae.py:mine", "options": {"n": 3, "decay_share": 0.4}}], "features": {"saes": []}}), tmp_path
    )
    recipe = load_recipe((tmp_path / "my_sae.py").read_bytes(), config.saes[0])
    assert (recipe.decoder_norm, recipe.betas, recipe.decay_share, recipe.coefficient_warmup) == (0.5, (0.5, 0.9), 0.4, 0.05)


def test_further_terms_become_columns_and_survive_a_kill(make_planted, tmp_path: Path) -> None:
    """Bit for bit: weights, log and digest."""

    class KilledError(Exception):
        """Stands for a killed process."""

    def kill(n: int) -> None:
        seen.append(n)
        if len(seen) == 9:
            raise KilledError

    write_file(tmp_path, change("penalty=penalty)", "penalty=penalty, spread=0.1 * f.square().mean(), half=0.5)").decode())
    saes = [{**OWN, "architecture": "my_sae.py:mine"}]
    whole, killed = reading(make_planted(saes), tmp_path), reading(make_planted(saes), tmp_path)
    expected, seen = train(whole), []
    with pytest.raises(KilledError):
        train_saes(executing(killed.pipeline, checkpoint_steps=4), killed.store, ["a"], kill)
    found = train_saes(executing(killed.pipeline, checkpoint_steps=4), killed.store, ["a"])["a"].manifest
    assert found.digest == expected.digest
    log = read_log(whole)
    assert log.columns[-2:] == ["spread", "half"]
    assert log["half"].to_list() == pytest.approx([0.5] * 20)
    assert min(log["spread"]) > 0


def test_the_bytes_are_the_identity_and_the_place_is_not(make_planted, tmp_path: Path) -> None:
    """A space more is another SAE; another folder is the same one."""
    first, moved, other = (tmp_path / name for name in ("first", "moved", "other"))
    for folder, text in ((first, SOUND), (moved, SOUND), (other, SOUND + " \n")):
        write_file(folder, text)
    planted = make_planted([OWN])
    paths = [sae_ref(reading(planted, folder).pipeline, "a").path for folder in (first, moved, other)]
    assert paths[0] == paths[1] != paths[2]


BROKEN: dict[str, tuple[bytes, str]] = {
    "syntax": (change("f = torch", "f = = torch"), r"my_sae.py, line 6: it is no Python: invalid syntax \('f = = torch"),
    "import": (
        change("import torch", "import torch, nowhere"),
        r"my_sae.py, line 1, `import torch, nowhere`: ModuleNotFoundError",
    ),
    "raises": (change("torch.relu(x @ w", "torch.relu(x @ w.z @ w"), r"my_sae.py, line 6, `f = torch.relu.*`: AttributeError: .* at step 0"),
    "shape": (change('f @ w["W_dec"] + w["b_dec"]', 'f @ w["W_dec"][:, :3]'), r"returned y_hat of shape \(100, 3\), expected \(100, 16\).*at step 0"),
    "product": (change('w["W_enc_T"].T + ', 'w["W_enc_T"] + '), r"my_sae.py, line 6, `f = .*`: RuntimeError: mat1 and mat2 shapes .*at step 0"),
    "latents": (change("latents=f,", "latents=f[:, :5],"), r"returned latents of shape \(100, 5\), expected \(100, 48\)"),
    "term": (change("penalty=penalty", "penalty=penalty, more=f"), r"The term 'more' of my_sae.py:mine has the shape \(100, 48\): return its mean"),
    "detached": (change("penalty=penalty", "penalty=penalty.detach()"), r"The term 'penalty' of my_sae.py:mine has no gradient"),
    "no gradient": (change(' + w["b_enc"]', ""), r"my_sae.py:mine gives b_enc no gradient.*at step 0"),
    "taken name": (change("penalty=penalty", "penalty=penalty, fvu=penalty"), r"The term 'fvu' of .* has the name of a column"),
    "no terms": (change("    return Terms", "    Terms"), r"my_sae.py:mine has to return lab.Terms\(y_hat, latents=...\), and returned NoneType"),
    "nan": (
        change("    penalty = ", "    penalty = (f - 1).log().mean() * 0 + "),
        r"is nan at step 0: penalty is not finite, from line 7 on, on rows",
    ),
    "nan gradient": (
        change("    penalty = ", "    penalty = (f - f).sqrt().mean() + "),
        r"is nan at step 0: the gradient of penalty for W_enc_T is not finite",
    ),
    "kind": (change('kind="relu"', 'kind="rellu"'), r"my_sae.py, line 5: kind is 'rellu'; did you mean 'relu'\?"),
    "init": (change('kind="relu"', 'kind="relu", init=nothing'), r"my_sae.py, line 4, `@architecture.*`: NameError: name 'nothing' is not defined"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_what_is_wrong_is_said_with_its_line_and_others_go_on(make_planted, tmp_path: Path, what: str) -> None:
    """One arm of a sweep fails; the others are bit for bit as without it."""
    source, message = BROKEN[what]
    write_file(tmp_path, source.decode())
    good = {"name": "good", **TINY, "n_rows": 500}
    planted = reading(make_planted([good, {**OWN, "name": "bad", "architecture": "my_sae.py:mine"}]), tmp_path)
    failed: dict[str, InterpError] = {}
    made = train_saes(planted.pipeline, planted.store, ["bad", "good"], on_failure=failed.setdefault)
    assert list(made) == ["good"]
    with pytest.raises(NonFiniteError if what.startswith("nan") else OwnCodeError, match=message):
        raise failed["bad"]
    alone = make_planted([good])
    assert train(alone, "good").digest == made["good"].manifest.digest


def test_weights_of_ones_own_and_another_fold(make_planted, tmp_path: Path) -> None:
    """A gain beside the encoder: `init` makes it, `fold` puts it into what is saved."""
    own = RELU.replace('kind="relu"', 'kind="relu", init=gains, fold=put_in').replace('w["W_enc_T"].T', 'w["W_enc_T"].T * w["gain"]')
    more = """
def gains(w, z, generator, *, n):
    return {"gain": torch.full((len(w["b_enc"]),), 1.0 + n)}

def put_in(w):
    return {"W_enc_T": w["W_enc_T"] * w["gain"][:, None]}

"""
    text = HEAD + more + own
    write_file(tmp_path, text)
    planted = reading(make_planted([{**OWN, "architecture": "my_sae.py:mine", "options": {"n": 1}}]), tmp_path)
    manifest = train(planted)
    assert manifest.facts["fvu"] == pytest.approx(read_log(planted)["fvu"][-1], abs=0.1)
    assert manifest.facts["fvu"] < 0.9
    write_file(tmp_path, text.replace('w["W_enc_T"] * w["gain"][:, None]', 'w["gain"]'))
    with pytest.raises(OwnCodeError, match=r"fold= returned W_enc_T of shape \(48,\), expected \(48, 16\)"):
        train(reading(make_planted([{**OWN, "architecture": "my_sae.py:mine"}]), tmp_path))


def test_a_process_executes_what_was_named_and_not_what_lies_where_it_runs(make_planted, tmp_path: Path, capfd) -> None:
    """One of torchrun's workers, after the file was changed, in a folder that has another file of its name."""
    write_file(tmp_path)
    planted = reading(make_planted([{**OWN, "n_rows": 500}], root=str(tmp_path / "data")), tmp_path)
    save_plan(planted.store, planted.pipeline.plan)
    config = planted.pipeline.config
    assert find_manifest(planted.store, code_ref(config.saes[0].code.digest)) is None
    expected = train(reading(make_planted([{**OWN, "n_rows": 500}]), tmp_path))
    (tmp_path / "my_sae.py").rename(tmp_path / "gone.py")
    with pytest.raises(OwnCodeError, match=r"my_sae.py cannot be read \(No such file"):
        train(planted)
    (tmp_path / "gone.py").rename(tmp_path / "my_sae.py")
    recipe_file = write_file(tmp_path / "elsewhere", "raise SystemExit('executed')")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    keep_code(planted.store, config.saes[0].code, config.saes[0].architecture)
    write_file(tmp_path, "raise SystemExit('executed')")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with chdir(recipe_file.parent):
        assert main([str(tmp_path / "config.json"), "a"]) == 0
    assert load_manifest(planted.store, sae_ref(planted.pipeline, "a")).digest == expected.digest


@pytest.mark.faults
def test_processes_train_it_like_one(make_planted, tmp_path: Path) -> None:
    """Two of them, each half of the rows, from the store."""
    write_file(tmp_path)
    planted = reading(make_planted([OWN], root=str(tmp_path / "data")), tmp_path)
    save_plan(planted.store, planted.pipeline.plan)
    alone = reading(make_planted([OWN]), tmp_path)
    train(alone)
    pipeline = executing(planted.pipeline, processes=2)
    assert list(run_training(pipeline, open_pipeline_store(pipeline.config), ["a"]).made) == ["a"]
    for column in ("loss", "fvu", "gradient_norm"):
        one, two = (torch.tensor(read_log(item)[column].to_list()) for item in (alone, planted))
        torch.testing.assert_close(two, one, rtol=2e-3, atol=1e-5, msg=column)


def test_bytes_of_a_store_are_executed_only_with_the_configurations_hash(make_planted, tmp_path: Path) -> None:
    """Whoever can write into a bucket must not run code on the machines that train."""
    write_file(tmp_path)
    planted = reading(make_planted([OWN]), tmp_path)
    ref = code_ref(planted.pipeline.config.saes[0].code.digest)
    with create_artifact(planted.store, ref) as art:
        art.put(CODE, b"raise SystemExit('executed')")
    with pytest.raises(OwnCodeError, match="which has another one's bytes there"):
        train(planted)


def test_nothing_is_executed_by_reading_configurations_or_folders(make_planted, tmp_path: Path) -> None:
    """A foreign pipeline's folder names code, and has it: opening it reads SAEs and no more."""
    write_file(tmp_path, SOUND + "\nraise SystemExit('executed')\n")
    planted = reading(make_planted([OWN], root=str(tmp_path / "data")), tmp_path)
    save_plan(planted.store, planted.pipeline.plan)
    save_configuration(planted.store, planted.pipeline.config)
    (tmp_path / "pipeline.yaml").write_text('{saes: [{architecture: "my_sae.py:p_anneal"}], features: {saes: []}}')
    assert load_config(tmp_path / "pipeline.yaml").saes[0].code.digest == planted.pipeline.config.saes[0].code.digest
    assert lab.open(planted.store.url).config == planted.pipeline.config


def test_processes_that_it_cannot_be_divided_over_are_refused(make_planted, tmp_path: Path) -> None:
    """Before anything starts."""
    write_file(tmp_path)
    planted = reading(make_planted([OWN], root=str(tmp_path / "data")), tmp_path)
    with pytest.raises(ConfigError, match=r"an architecture of your own, whose latents are not divided"):
        check_processes(executing(planted.pipeline, processes=2, latent_processes=2), ["a"])


def test_built_in_trainings_have_no_file(make_planted) -> None:
    """And no column, artifact or id of one."""
    planted = make_planted([{"name": "a", **TINY, "n_rows": 300}])
    train(planted)
    assert not [item.path for item in planted.store.list("4-sae") if "/code-" in item.path]
    assert isinstance(planted.pipeline, Pipeline)
    assert P_ANNEAL.count("\n") == 6
