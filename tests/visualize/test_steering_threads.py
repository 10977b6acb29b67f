"""Steering and patching as assets have the same bytes on a machine of another size."""

from typing import Any

import pytest
import torch
from tiny_models import make_tiny_config, make_tokenizer, write_texts
from transformers import AutoModelForCausalLM, GPT2Config

from interp_assets.corpus.plan import plan_corpus
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import Job
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, open_pipeline_store
from interp_assets.storage.manifest import remove_artifact
from interp_assets.storage.store import Store
from resources.world import World

WIDTH = 1024
"""Sums of so many, over few rows, are what libraries divide among threads."""
PAIR = {"clean": "Mary gave", "corrupted": "Anna gave", "answer": "M", "other": "A"}
SECTIONS: dict[str, Any] = {
    "shuffle": {"passes": 1, "fan_out": 1},
    "execution": {"device": "cpu", "tokens_per_batch": 512, "rows_per_block": 256},
    "saes": [{"name": "demo", "hook_point": "resid_post.0", "d_sae": 24, "k": 3, "n_rows": 256, "batch_rows": 128, "dead_after_rows": 256}],
    "features": {"saes": ["demo"], "latent_slices": 1, "top_k": 4, "n_random": 8, "window": 4, "n_intervals": 2, "examples_per_interval": 2},
    "steering": {
        "prompts": ["word1 word", "word5", "a", "word word"],
        "strengths": [4.0],
        "new_tokens": 3,
        "unit": "raw",
        "recipes": {"first": [{"sae": "demo", "latent": 0, "clamp": "1 raw"}]},
        "search": {"candidates": 2, "strength": 3, "shown": 1},
    },
    "patching": [
        {"name": "stream", "pairs": [PAIR], "points": ["resid_post.*", "mlp_out.1"]},
        {"name": "slopes", "pairs": [PAIR], "points": ["resid_post.*", "z.0"], "method": "gradient"},
    ],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[PipelineConfig, Pipeline, Store]:
    """Make what steering reads, of a model whose products are divided."""
    root, tokenizer = tmp_path_factory.mktemp("wide"), make_tokenizer()
    torch.manual_seed(0)
    shape = GPT2Config(n_embd=WIDTH, n_inner=1536, n_layer=2, n_head=8, n_positions=64, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    config = make_tiny_config(root / "model", write_texts(root / "texts", n_files=3), root=str(root / "data"), **SECTIONS)
    store = open_pipeline_store(config)
    pipeline = plan_corpus(config, store)
    for asset in make_road(config):
        if not asset.plan and asset.group != "steer" and asset.stage != "web":
            keys = tuple(asset.partition_keys(pipeline))
            make = asset.make(Job(World(config), pipeline, store, keys))
            for key in keys:
                make(key)
    return config, pipeline, store


@pytest.mark.parametrize("name", ["steering_sweep", "steering_search", "patching_sweep"])
def test_an_artifact_of_steering_does_not_depend_on_threads(made: tuple[PipelineConfig, Pipeline, Store], name: str) -> None:
    """Texts, scores, effects and derivatives: "same inputs, same bytes" held for what is harvested, and not for what is written or patched."""
    config, pipeline, store = made
    asset = make_road(config).get((name,))
    keys = tuple(asset.partition_keys(pipeline))
    found: dict[str, set[str]] = {key: set() for key in keys}
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        make = asset.make(Job(World(config), pipeline, store, keys))
        for key in keys:
            (produced,) = make(key)
            found[key].add(produced.manifest.digest)
            remove_artifact(store, produced.ref.path)
    assert {key: len(digests) for key, digests in found.items()} == dict.fromkeys(keys, 1)
