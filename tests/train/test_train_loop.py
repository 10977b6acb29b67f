"""Training as a whole: it finds planted features, resumes bit for bit, and does not care about its company."""

import io
import json

import polars as pl
import pytest
import torch
from planned import executing

from interp_assets.errors import InputError, InterpError, NonFiniteError, PlanError
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline
from interp_assets.shuffle.mixed import open_mixed
from interp_assets.storage.manifest import Manifest, find_manifest, load_manifest, read_file
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import load_tensors
from interp_assets.train.batches import make_row_order
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.loop import raise_if_out_of_memory, train_saes, training_rows
from interp_assets.train.losses.topk import auxk_count
from interp_assets.train.recipes import RECIPES, make_weights
from interp_assets.train.refs import sae_ref
from interp_assets.train.resume import checkpoint_ref
from interp_assets.train.trainer import Trainer

TINY = {"d_sae": 48, "k": 2, "n_rows": 2000, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 500}
ARCHITECTURES = list(RECIPES)


def train(pipeline: Pipeline, store: Store, name: str = "a", **kwargs) -> Manifest:
    """Train one SAE and return its manifest."""
    return train_saes(pipeline, store, [name], **kwargs)[name].manifest


class KilledError(Exception):
    """Stands for a killed process."""


def kill_after(n_batches: int, batch_rows: int):
    """Return a progress callable that raises after some batches."""
    seen = [0]

    def progress(n: int) -> None:
        seen[0] += n
        if seen[0] >= n_batches * batch_rows:
            raise KilledError

    return progress


@pytest.mark.parametrize(
    ("architecture", "share"), [("gated", 0.9), ("topk", 0.9), ("batch_topk", 0.9), ("matryoshka_batch_topk", 0.6), ("jump_relu", 0.8)]
)
def test_training_finds_the_planted_directions(make_planted, architecture: str, share: float) -> None:
    """The one property that an SAE is trained for. A Matryoshka SAE's first groups, of 3 latents, must mix features."""
    fields = {"name": "a", "architecture": architecture, "d_sae": 48, "k": 2, "batch_rows": 256, "n_rows": 80_000, "learning_rate": 8e-3}
    planted = make_planted([{**fields, "dead_after_rows": 10_000, "sparsity_coefficient": 4.0}], n_rows=20_000)
    manifest = train(planted.pipeline, planted.store)
    sae = load_sae(planted.pipeline, planted.store, "a")
    cosine = (sae.W_dec @ planted.directions.T).max(0).values
    found = float((cosine > 0.9).double().mean())
    assert found >= share, (found, manifest.facts["fvu"], manifest.facts["l0"], manifest.facts["dead_share"])
    assert manifest.facts["fvu"] < 0.3


@pytest.mark.parametrize(
    ("architecture", "dtype"), [*((architecture, "float32") for architecture in ARCHITECTURES), ("gated", "bfloat16"), ("jump_relu", "bfloat16")]
)
def test_a_killed_and_resumed_training_equals_an_uninterrupted_one(make_planted, architecture: str, dtype: str) -> None:
    """Weights, log and digest: all bytes of the artifact."""
    saes = [{"name": "a", "architecture": architecture, "product_dtype": dtype, **TINY}]
    whole, killed = make_planted(saes), make_planted(saes)
    expected = train(whole.pipeline, whole.store)
    for n_batches in (1, 9, 8):
        with pytest.raises(KilledError):
            train(executing(killed.pipeline, checkpoint_steps=4), killed.store, progress=kill_after(n_batches, 100))
    found = train(executing(killed.pipeline, checkpoint_steps=4), killed.store)
    assert found.digest == expected.digest


def test_the_same_inputs_give_the_same_bytes(make_planted) -> None:
    """In two stores, whatever the clock says."""
    saes = [{"name": "a", **TINY}]
    digests = [train(planted.pipeline, planted.store).digest for planted in (make_planted(saes), make_planted(saes))]
    assert digests[0] == digests[1]


def test_saes_trained_in_one_pass_equal_each_trained_alone(make_planted) -> None:
    """Identical batches, no crosstalk: a sweep is a set of single trainings."""
    saes = [
        {"name": "a", **TINY},
        {"name": "b", **TINY, "architecture": "topk", "d_sae": 20, "n_rows": 1200},
        {"name": "c", **TINY, "batch_rows": 50, "seed": 5},
    ]
    together, alone = make_planted(saes), make_planted(saes)
    in_one_pass = train_saes(together.pipeline, together.store, ["a", "b", "c"])
    for name, item in in_one_pass.items():
        assert train(alone.pipeline, alone.store, name).digest == item.manifest.digest


def test_saes_that_stopped_at_different_steps_resume_together(make_planted) -> None:
    """One of them had been trained further: it waits until the other has caught up."""
    saes = [{"name": "a", **TINY}, {"name": "b", **TINY, "seed": 3}]
    whole, killed = make_planted(saes), make_planted(saes)
    expected = train_saes(whole.pipeline, whole.store, ["a", "b"])
    with pytest.raises(KilledError):
        train(executing(killed.pipeline, checkpoint_steps=5), killed.store, "b", progress=kill_after(12, 100))
    found = train_saes(killed.pipeline, killed.store, ["a", "b"])
    assert {name: item.manifest.digest for name, item in found.items()} == {name: item.manifest.digest for name, item in expected.items()}


def test_checkpoints_are_pruned_and_go_when_the_sae_is_published(make_planted) -> None:
    """They are several times the size of the SAE."""
    planted = make_planted([{"name": "a", **TINY}])
    ref = sae_ref(planted.pipeline, "a")
    folder = f"{ref.path}.checkpoints"
    with pytest.raises(KilledError):
        train(executing(planted.pipeline, checkpoint_steps=2), planted.store, progress=kill_after(15, 100))
    kept = {item.path.split("/")[2].split("-")[1] for item in planted.store.list(folder)}
    assert kept == {"00000012", "00000014"}
    train(planted.pipeline, planted.store)
    assert list(planted.store.list(folder)) == []


def test_a_damaged_checkpoint_is_passed_over(make_planted) -> None:
    """The one before it is as good, only older."""
    saes = [{"name": "a", **TINY}]
    planted, whole = make_planted(saes), make_planted(saes)
    with pytest.raises(KilledError):
        train(executing(planted.pipeline, checkpoint_steps=2), planted.store, progress=kill_after(15, 100))
    path = checkpoint_ref(sae_ref(planted.pipeline, "a"), 14).path + "/state.safetensors"
    data = bytearray(planted.store.get(path))
    data[-1] ^= 1
    planted.store.put(path, bytes(data))
    assert train(planted.pipeline, planted.store).digest == train(whole.pipeline, whole.store).digest


@pytest.mark.parametrize("architecture", ["batch_topk", "matryoshka_batch_topk"])
def test_the_calibrated_threshold_gives_a_mean_l0_of_k(make_planted, architecture: str) -> None:
    """A running mean that starts at zero would be far too low after so short a training."""
    planted = make_planted([{"name": "a", "architecture": architecture, **TINY}])
    manifest = train(planted.pipeline, planted.store)
    sae = load_sae(planted.pipeline, planted.store, "a")
    assert sae.kind == "jump_relu"
    assert manifest.facts["l0"] == pytest.approx(2, abs=0.01)
    assert manifest.facts["threshold"] == pytest.approx(float(sae.threshold[0]))
    l0 = float((sae.encode(planted.rows.float()) > 0).sum(1).double().mean())
    assert l0 == pytest.approx(2, abs=0.1)


def test_the_artifact_holds_its_files_and_facts(make_planted) -> None:
    """Plots, tables and later stages read these names (docs/formats/sae.md)."""
    planted = make_planted([{"name": "a", **TINY}])
    manifest = train(planted.pipeline, planted.store)
    ref = sae_ref(planted.pipeline, "a")
    names = ["cfg.json", "firing_frequency.safetensors", "sae_weights.safetensors", "times.json", "training.parquet"]
    assert [entry.name for entry in manifest.files] == names
    assert manifest.timed == ["times.json"]
    log = pl.read_parquet(io.BytesIO(read_file(planted.store, ref.path, manifest, "training.parquet")))
    assert log["step"].to_list() == list(range(1, 21))
    assert log["n_rows"].to_list()[-1] == 2000
    assert log["l0"].to_list() == pytest.approx([2.0] * 20)
    assert log["fvu"][-1] < log["fvu"][0]
    tensors = load_tensors(planted.store, ref.path, manifest, "firing_frequency.safetensors")
    assert float(tensors["firing_frequency"].sum()) == pytest.approx(manifest.facts["l0"])
    cfg = json.loads(read_file(planted.store, ref.path, manifest, "cfg.json"))
    assert cfg["metadata"]["training_architecture"] == "batch_topk"
    assert cfg["metadata"]["l0"] == manifest.facts["l0"]
    assert manifest.facts["n_rows"] == 2000
    assert manifest.facts["normalization_scale"] > 0


def test_finished_saes_are_not_trained_again(make_planted) -> None:
    """And progress still adds up, so that a bar ends full."""
    planted = make_planted([{"name": "a", **TINY}, {"name": "b", **TINY, "d_sae": 16}])
    train(planted.pipeline, planted.store)
    seen: list[int] = []
    produced = train_saes(planted.pipeline, planted.store, ["b", "a"], seen.append)
    assert [(name, item.is_cached) for name, item in produced.items()] == [("b", False), ("a", True)]
    assert sum(seen) == training_rows(planted.pipeline, ["a", "b"]) == 4000


def test_metrics_are_heard_while_training(make_planted) -> None:
    """Rates are for listeners only: they are in no artifact."""
    planted = make_planted([{"name": "a", **TINY}])
    heard = []
    train(planted.pipeline, planted.store, on_metrics=heard.append)
    assert [item.row.step for item in heard] == list(range(1, 21))
    assert (heard[0].rows_per_s, heard[0].input_wait_share) == (None, None)
    assert heard[-1].rows_per_s > 0
    assert 0 <= heard[-1].input_wait_share < 1
    assert (heard[0].name, heard[0].n_steps) == ("a", 20)


def test_a_loss_that_is_not_finite_names_step_and_rows(make_planted) -> None:
    """One NaN row would silently destroy every weight."""
    planted = make_planted([{"name": "a", **TINY}], nan_row=1234)
    with pytest.raises(NonFiniteError, match=r"The loss of SAE 'a' is nan at step 12, on rows .*bucket-00001.*epoch 0"):
        train(planted.pipeline, planted.store)


def test_one_bad_sae_drops_out_and_the_others_are_as_without_it(make_planted) -> None:
    """A learning rate that is too high cost all SAEs of its group: twelve hours of eleven others. It was the longest, too."""
    good = [{"name": "a", **TINY}, {"name": "c", **TINY, "architecture": "relu", "batch_rows": 50}]
    bad = {"name": "b", **TINY, "learning_rate": 1e25, "n_rows": 5000}
    mixed, alone = make_planted([good[0], bad, good[1]]), make_planted(good)
    failed: dict[str, InterpError] = {}
    n_rows: list[int] = []
    found = train_saes(mixed.pipeline, mixed.store, ["b", "a", "c"], n_rows.append, on_failure=failed.setdefault)
    expected = train_saes(alone.pipeline, alone.store, ["a", "c"])
    assert {name: item.manifest.digest for name, item in found.items()} == {name: item.manifest.digest for name, item in expected.items()}
    assert list(failed) == ["b"]
    assert isinstance(failed["b"], NonFiniteError)
    assert sum(n_rows) == training_rows(mixed.pipeline, ["a", "b", "c"])
    assert find_manifest(mixed.store, sae_ref(mixed.pipeline, "b")) is None
    with pytest.raises(NonFiniteError, match="The loss of SAE 'b'"):
        train_saes(mixed.pipeline, mixed.store, ["a", "b", "c"])


def test_an_sae_that_no_memory_holds_keeps_no_other_from_training(make_planted) -> None:
    """Its weights cannot be made; the other's are."""
    planted = make_planted([{"name": "a", **TINY}, {"name": "b", **TINY, "d_sae": 1 << 44}])
    failed: dict[str, InterpError] = {}
    assert list(train_saes(planted.pipeline, planted.store, ["b", "a"], on_failure=failed.setdefault)) == ["a"]
    assert isinstance(failed["b"], PlanError)


def test_a_batch_that_is_too_large_fails_its_own_group_only(make_planted) -> None:
    """Other SAEs of the sweep take smaller batches."""
    planted = make_planted([{"name": "a", **TINY}, {"name": "b", **TINY, "batch_rows": 4000}, {"name": "c", **TINY, "batch_rows": 4000, "seed": 2}])
    failed: dict[str, InterpError] = {}
    assert list(train_saes(planted.pipeline, planted.store, ["b", "c", "a"], on_failure=failed.setdefault)) == ["a"]
    assert {name: type(error) for name, error in failed.items()} == {"b": InputError, "c": InputError}


@pytest.mark.parametrize(
    ("fields", "d_in", "d_out"),
    [
        ({"task": "transcoder", "target_hook_point": "mlp_out.0"}, 16, 8),
        ({"task": "skip_transcoder", "target_hook_point": "mlp_out.0", "architecture": "topk"}, 16, 8),
        ({"task": "skip_transcoder", "target_hook_point": "mlp_out.0", "architecture": "jump_relu_tanh"}, 16, 8),
        ({"task": "crosscoder", "more_hook_points": ["mlp_out.0"]}, 24, 24),
    ],
)
def test_other_tasks_train_and_come_back(make_planted, fields: dict, d_in: int, d_out: int) -> None:
    """Rows of several hook points stay aligned through two epochs, and the saved SAE reconstructs what it was trained for."""
    planted = make_planted([{"name": "a", **TINY, "n_rows": 6000, **fields}])
    manifest = train(planted.pipeline, planted.store)
    sae = load_sae(planted.pipeline, planted.store, "a")
    assert (sae.d_in, sae.d_out) == (d_in, d_out) == (manifest.facts["d_in"], manifest.facts["d_out"])
    assert (sae.W_skip is not None) == (fields["task"] == "skip_transcoder")
    assert manifest.facts["fvu"] < 0.75
    assert manifest.facts["task"] == fields["task"]


def test_rows_of_two_widths_stay_aligned_in_every_epoch(make_planted) -> None:
    """A transcoder fed with another row's target learns the mean."""
    planted = make_planted([{"name": "a", **TINY}])
    shards = {name: open_mixed(planted.pipeline, planted.store, name) for name in ("resid_post.0", "mlp_out.0")}
    orders = [make_row_order(shards[name], 0, planted.pipeline.d_in(name), name) for name in shards]
    assert orders[0] == orders[1]


def test_fewer_rows_than_a_batch_are_refused(make_planted) -> None:
    """A batch would hold rows twice."""
    planted = make_planted([{"name": "a", **TINY, "batch_rows": 4000}])
    with pytest.raises(InputError, match=r"hold 3,000 rows, less than one batch of SAE 'a' \(batch_rows = 4,000\).*Lower batch_rows"):
        train(planted.pipeline, planted.store)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_memory_that_runs_out_names_the_knobs(error: Exception) -> None:
    """An allocator's own message says nothing about batches or latents."""
    config = make_config({"saes": [{"name": "demo", "d_sae": 4, "k": 1}]}).saes[0]
    with pytest.raises(PlanError, match=r"ran out while SAE 'demo' was trained .*batch_rows.*d_sae.*execution.latent_processes"):
        raise_if_out_of_memory(error, config, torch.device("cpu"))
    raise_if_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), config, torch.device("cpu"))


def test_an_sae_that_no_memory_holds_is_refused_with_the_knobs(make_planted) -> None:
    """A real allocation that the system refuses, while the weights are made: before the first step."""
    planted = make_planted([{"name": "a", **TINY, "d_sae": 1 << 44}])
    with pytest.raises(PlanError, match=r"ran out while SAE 'a' was trained \(d_sae 17,592,186,044,416.*Lower batch_rows first"):
        train(planted.pipeline, planted.store)


def test_a_checkpoint_of_another_configuration_is_passed_over(make_planted) -> None:
    """Somebody copies a folder: weights of another learning rate must not be taken for this one's."""
    saes = [{"name": "a", **TINY}, {"name": "b", **TINY, "learning_rate": 1e-3}]
    planted, whole = make_planted(saes), make_planted(saes)
    with pytest.raises(KilledError):
        train(executing(planted.pipeline, checkpoint_steps=5), planted.store, progress=kill_after(15, 100))
    source, target = (checkpoint_ref(sae_ref(planted.pipeline, name), 10).path for name in ("a", "b"))
    for name in ("state.safetensors", "log.json", "manifest.json"):
        planted.store.put(f"{target}/{name}", planted.store.get(f"{source}/{name}"))
    assert train(planted.pipeline, planted.store, "b").digest == train(whole.pipeline, whole.store, "b").digest


def test_dead_latents_are_counted_in_rows() -> None:
    """A latent is dead once it has not fired for dead_after_rows rows of the global batch, and alive again when it fires."""
    config = make_config({"saes": [{"name": "demo", "d_sae": 4, "k": 1, "batch_rows": 10, "dead_after_rows": 20, "n_rows": 100}]}).saes[0]
    weights = {"W_enc_T": torch.eye(4), "b_enc": torch.zeros(4), "W_dec": torch.eye(4), "b_dec": torch.zeros(4)}
    trainer = Trainer(config, weights, torch.device("cpu"))
    first, last = torch.zeros(10, 4), torch.zeros(10, 4)
    first[:, 0], last[:, 3] = 5.0, 5.0
    for _ in range(2):
        trainer.train_step(first)
    assert trainer.rows_since_fired.tolist() == [0, 20, 20, 20]
    assert trainer.is_dead.tolist() == [False, True, True, True]
    trainer.train_step(last)
    assert trainer.is_dead.tolist() == [False, True, True, False]
    assert auxk_count(4) == 2


def test_the_manifest_can_be_loaded_by_reference(make_planted) -> None:
    """Downstream stages find the SAE by configuration alone."""
    planted = make_planted([{"name": "a", **TINY}])
    manifest = train(planted.pipeline, planted.store)
    assert load_manifest(planted.store, sae_ref(planted.pipeline, "a")).digest == manifest.digest


def test_thresholds_move_by_less_than_bfloat16_could_hold() -> None:
    """Kept in bfloat16 they would stay where they are for ever: a step of Adam is smaller than its rounding."""
    sae = {"name": "demo", "architecture": "jump_relu", "d_sae": 16, "k": 2, "batch_rows": 50, "n_rows": 5000, "product_dtype": "bfloat16"}
    config = make_config({"saes": [sae]}).saes[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=generator)
    trainer = Trainer(config, make_weights(config, x, 8, generator), torch.device("cpu"))
    before = trainer.weights["log_threshold"].clone()
    for _ in range(3):
        trainer.train_step(x)
    after = trainer.weights["log_threshold"]
    assert {value.dtype for value in trainer.weights.values()} == {torch.float32}
    assert {value.dtype for state in trainer.optimizer.state.values() for name, value in state.items() if name != "step"} == {torch.float32}
    moved = after != before
    assert bool(moved.any())
    assert bool(((after - before).abs() < before.abs() * 2**-8)[moved].all())
    assert torch.equal(after.bfloat16()[moved], before.bfloat16()[moved])


def test_a_threshold_near_0_gets_somewhere() -> None:
    """Its logarithm under Adam does not: after a hundred steps it would be within a tenth of where it began, whatever the penalty."""
    sae = {"name": "demo", "architecture": "jump_relu_step", "d_sae": 16, "k": 2, "batch_rows": 200, "n_rows": 20_000, "learning_rate": 1e-3}
    config = make_config({"saes": [{**sae, "sparsity_coefficient": 1.0}]}).saes[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator)
    trainer = Trainer(config, make_weights(config, x, 8, generator), torch.device("cpu"))
    before = trainer.weights["threshold"].clone()
    for _ in range(100):
        trainer.train_step(x)
    after = trainer.weights["threshold"]
    assert float(after.min()) >= 0
    assert float((after / before).max()) > 2
