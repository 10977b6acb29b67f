"""The frozen SAE and its exchange files."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from interp_assets.errors import ArtifactMissingError
from interp_assets.planning.config import PipelineConfig, SaeConfig, ShuffleConfig
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.storage.manifest import create_artifact, load_manifest, read_file
from interp_assets.storage.store import Store, open_store
from interp_assets.train.checkpoint import load_sae, save_sae
from interp_assets.train.refs import sae_ref
from interp_assets.train.sae import Sae, SaeKind

D_IN, D_SAE, K = 6, 16, 3


def make_pipeline() -> Pipeline:
    """Plan one shard and one SAE."""
    shard = ShardSource(index=0, fingerprint="a", n_documents=1, n_bytes=10, spec={})
    plan = PipelinePlan(
        shards=[shard], tokenizer_fingerprint="t", model_fingerprint="m", hook_widths={"resid_post.2": D_IN}, vocabulary_size=10, max_context=16
    )
    return Pipeline(PipelineConfig(saes=[SaeConfig(d_sae=D_SAE, k=K)], shuffle=ShuffleConfig(passes=2)), plan)


def make_sae(kind: SaeKind) -> Sae:
    """Draw a small SAE."""
    generator = torch.Generator().manual_seed(1)
    threshold = torch.rand(D_SAE, generator=generator) if kind == "jump_relu" else torch.zeros(D_SAE)
    return Sae(
        kind=kind,
        W_enc=torch.randn(D_IN, D_SAE, generator=generator),
        b_enc=torch.randn(D_SAE, generator=generator),
        W_dec=torch.randn(D_SAE, D_IN, generator=generator),
        b_dec=torch.randn(D_IN, generator=generator),
        threshold=threshold,
        k=K if kind == "topk" else 0,
    )


def plain_encode(sae: Sae, x: Tensor) -> Tensor:
    """The formula of the exchange table, one row and one latent at a time."""
    latents = torch.zeros(len(x), sae.d_sae)
    for row in range(len(x)):
        pre = x[row] @ sae.W_enc + sae.b_enc
        allowed = set(pre.argsort(descending=True)[: sae.k].tolist()) if sae.kind == "topk" else set(range(sae.d_sae))
        for latent in allowed:
            if pre[latent] > 0 and pre[latent] > sae.threshold[latent]:
                latents[row, latent] = pre[latent]
    return latents


@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk"])
def test_encode_equals_the_formula_of_the_exchange_table(kind: SaeKind) -> None:
    """Every later stage trusts the firing rule."""
    sae = make_sae(kind)
    x = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(sae.encode(x), plain_encode(sae, x))
    torch.testing.assert_close(sae.decode(sae.encode(x)), plain_encode(sae, x) @ sae.W_dec + sae.b_dec)


def test_bfloat16_rows_are_encoded_in_float32() -> None:
    """Stored rows are bfloat16; the arithmetic is not."""
    sae = make_sae("relu")
    x = torch.randn(5, D_IN).to(torch.bfloat16)
    assert sae.encode(x).dtype == torch.float32
    torch.testing.assert_close(sae.encode(x), sae.encode(x.float()))


def test_topk_with_as_many_latents_as_k_is_relu() -> None:
    """There is no (k+1)-th pre-activation to take a midpoint with."""
    sae = make_sae("topk")
    wide = Sae(**{**sae.__dict__, "k": D_SAE})
    x = torch.randn(5, D_IN)
    torch.testing.assert_close(wide.encode(x), wide.pre_activations(x).relu())


@pytest.mark.parametrize("kind", ["relu", "jump_relu"])
def test_a_slice_of_latents_encodes_like_the_whole(kind: SaeKind) -> None:
    """The feature passes work on slices."""
    sae = make_sae(kind)
    x = torch.randn(9, D_IN)
    torch.testing.assert_close(sae.narrow(3, 9).encode(x), sae.encode(x)[:, 3:9])


@pytest.mark.parametrize(("kind", "architecture"), [("relu", "standard"), ("jump_relu", "jumprelu"), ("topk", "topk")])
def test_the_files_hold_exactly_what_saelens_loads(kind: SaeKind, architecture: str) -> None:
    """SAELens refuses a state dict with one tensor more or less."""
    pipeline, store, sae = make_pipeline(), open_store("memory://"), make_sae(kind)
    ref = sae_ref(pipeline, "demo")
    with create_artifact(store, ref) as art:
        save_sae(art, sae, pipeline, pipeline.config.sae("demo"), l0=2.5)
    manifest = load_manifest(store, ref)
    cfg = json.loads(read_file(store, ref.path, manifest, "cfg.json"))
    assert cfg["architecture"] == architecture
    assert (cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == (D_IN, D_SAE, "float32")
    assert (cfg["apply_b_dec_to_input"], cfg["normalize_activations"]) == (False, "none")
    assert cfg["metadata"]["sae_lens_version"] == "6.0.0"
    assert cfg["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
    assert cfg.get("k") == (K if kind == "topk" else None)
    from safetensors.torch import load

    tensors = load(read_file(store, ref.path, manifest, "sae_weights.safetensors"))
    expected = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    if kind == "jump_relu":
        expected["threshold"] = (D_SAE,)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == expected
    loaded = load_sae(pipeline, store, "demo")
    x = torch.randn(9, D_IN)
    assert torch.equal(loaded.encode(x), sae.encode(x))


def test_an_sae_that_was_never_trained_is_a_clear_error() -> None:
    """The message must say what to do."""
    with pytest.raises(ArtifactMissingError, match="Materialize it first"):
        load_sae(make_pipeline(), open_store("memory://"), "demo")


def test_hook_points_get_the_names_of_transformer_lens_in_this_model() -> None:
    """Other tools look the hook up by this name; queries and keys have another one where there is no RoPE."""
    pipeline = make_pipeline()
    assert pipeline.alias("mlp_out.11") == "blocks.11.hook_mlp_out"
    assert pipeline.alias("module:model.layers.3") == "module:model.layers.3"
    assert pipeline.alias("q.1") == "blocks.1.attn.hook_rot_q"
    without_rope = replace(pipeline, plan=replace(pipeline.plan, hook_aliases={"q.1": "blocks.1.attn.hook_q"}))
    assert without_rope.alias("q.1") == "blocks.1.attn.hook_q"


def test_only_an_sae_at_a_renamed_hook_point_has_another_id(memory_store: Store) -> None:
    """Its `cfg.json` has other bytes; all others keep their ids, and their training."""
    pipeline = make_pipeline()
    renamed = replace(pipeline, plan=replace(pipeline.plan, hook_aliases={"resid_post.2": "elsewhere"}))
    other = replace(pipeline, plan=replace(pipeline.plan, hook_aliases={"q.2": "blocks.2.attn.hook_q"}))
    assert sae_ref(other, "demo") == sae_ref(pipeline, "demo") != sae_ref(renamed, "demo")
    ref = sae_ref(renamed, "demo")
    with create_artifact(memory_store, ref) as art:
        save_sae(art, make_sae("relu"), renamed, renamed.config.sae("demo"), l0=None)
    cfg = json.loads(read_file(memory_store, ref.path, load_manifest(memory_store, ref), "cfg.json"))
    assert cfg["metadata"]["hook_name"] == "elsewhere"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk"])
def test_saelens_itself_loads_the_folder_and_encodes_alike(kind: SaeKind, local_store: Store) -> None:
    """Runs where SAELens is installed; it is no dependency."""
    sae_lens = pytest.importorskip("sae_lens")
    pipeline, sae = make_pipeline(), make_sae(kind)
    ref = sae_ref(pipeline, "demo")
    with create_artifact(local_store, ref) as art:
        save_sae(art, sae, pipeline, pipeline.config.sae("demo"), l0=2.5)
    theirs = sae_lens.SAE.load_from_disk(local_store.local_path(ref.path))
    x = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(theirs.encode(x), sae.encode(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs(x), sae.decode(sae.encode(x)), rtol=0, atol=1e-5)
    assert theirs.cfg.metadata.hook_name == "blocks.2.hook_resid_post"


@pytest.mark.parametrize(
    ("pre", "k", "fires"),
    [
        ([3, 2, 2, 2, 1], 2, [0, 1]),
        ([2, 3, 1, 2], 2, [0, 1]),
        ([1, 1, 1, 1], 3, [0, 1, 2]),
        ([5, 1 + 2**-23, 1, 0.5], 2, [0, 1]),
        ([5, 1, 1 + 2**-23, 0.5], 2, [0, 2]),
        ([5, 1 + 2**-22, 1 + 2**-23, 1], 2, [0, 1]),
        ([2**-149, 2**-148, -1, 0], 1, [1]),
        ([0, 0, 0, -1], 2, []),
        ([3, -1, -2, -3], 2, [0]),
        ([0, 4, 4, 4], 9, [1, 2, 3]),
    ],
)
def test_topk_fires_the_k_largest_and_of_equal_ones_the_first(pre: list[float], k: int, fires: list[int]) -> None:
    """Where latents tied at place k, or were one step of float32 apart, all of them stayed silent, or one too many did."""
    n = len(pre)
    sae = Sae(kind="topk", W_enc=torch.eye(n), b_enc=torch.zeros(n), W_dec=torch.eye(n), b_dec=torch.zeros(n), threshold=torch.zeros(n), k=k)
    x = torch.tensor([pre, [9.0 - i for i in range(n)]], dtype=torch.float32)
    latents = sae.encode(x)
    assert latents[0].nonzero()[:, 0].tolist() == fires
    assert torch.equal(latents[0, fires], x[0, fires])
    assert latents[1].nonzero()[:, 0].tolist() == list(range(min(k, n)))
