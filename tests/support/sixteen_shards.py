"""A pipeline of sixteen small shards, three of which can be made to fail."""

from pathlib import Path

from road_world import make_road_config

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, load_pipeline, open_pipeline_store
from interp_assets.storage.manifest import remove_artifact
from interp_assets.storage.store import Store

N_SHARDS = 16
FEATURES = {"saes": ["demo"], "latent_slices": 1, "top_k": 4, "n_random": 8, "window": 4, "n_intervals": 2, "examples_per_interval": 2}
BAD = ("shard-000003", "shard-000008", "shard-000013")


def make_sixteen(world: Path, folder: Path, n_shards: int = N_SHARDS) -> PipelineConfig:
    """Return a configuration of 16 small shards, or fewer, one file each."""
    texts = folder / "texts"
    texts.mkdir()
    for i in range(n_shards):
        (texts / f"{i:02d}.txt").write_text(" ".join(f"word{(i * 37 + j * j) % 101}" for j in range(20 + i)))
    return make_road_config(world, folder / "data", corpus={"path": str(texts), "shard_bytes": 1}, features=FEATURES)


def open_finished(config: PipelineConfig) -> tuple[Pipeline, Store]:
    """Open store and plan of a pipeline that has been run."""
    store = open_pipeline_store(config)
    return load_pipeline(config, store), store


def damage(config: PipelineConfig) -> dict[Path, bytes]:
    """Remove the activations of the bad shards and flip a byte in their tokens; return the good bytes by file."""
    pipeline, store = open_finished(config)
    good = {}
    for key in BAD:
        index = int(key[-6:])
        remove_artifact(store, activation_shard_ref(pipeline, "resid_post.0", index).path)
        path = Path(config.root) / config.name / token_shard_ref(pipeline, index).path / "tokens.parquet"
        good[path] = path.read_bytes()
        path.write_bytes(good[path][:-50] + bytes([good[path][-50] ^ 1]) + good[path][-49:])
    return good
