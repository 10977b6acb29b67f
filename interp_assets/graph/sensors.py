"""A sensor that notices new text: landed files become a new plan, and new shards are tokenized and harvested.

    tick: has the listing of the corpus folder changed?  -> materialize `corpus_plan`, which registers the new shards
          are there shards whose documents have no token shard yet?  -> materialize them, and their activations

Both requests carry a run key made of what they answer to, so a restarted daemon asks for nothing twice. The sensor is off until it is
switched on in the UI, and it only serves the corpus source `files`: other sources do not change under a running pipeline.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from interp_assets.errors import ArtifactError
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import ShardSource
from resources.world import World

CHECK_EVERY_S = 30


def make_sensor(config: PipelineConfig) -> dg.SensorDefinition:
    """Make the sensor of a pipeline."""
    corpus = config.corpus

    @dg.sensor(
        target=["corpus_plan", "token_shards", "activations"],
        minimum_interval_seconds=CHECK_EVERY_S,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Landed text files become shards, token shards and activations. Works for the corpus source `files`.",
    )
    def landed_text(context: dg.SensorEvaluationContext, world: dg.ResourceParam[World]) -> Iterator[dg.RunRequest | dg.SkipReason]:
        if corpus.source != "files":
            yield dg.SkipReason(f"The corpus source is {corpus.source!r}; only 'files' can change under a running pipeline.")
            return
        listing = fingerprint_listing(Path(corpus.path).expanduser())
        if listing != context.cursor:
            context.update_cursor(listing)
            yield dg.RunRequest(run_key=f"plan-{listing}", asset_selection=[dg.AssetKey("corpus_plan")])
            return
        try:
            pipeline, _ = world.open()
        except ArtifactError as error:
            yield dg.SkipReason(str(error))
            return
        done = context.instance.get_materialized_partitions(dg.AssetKey("token_shards"))
        yield from (request_shard(shard) for shard in pipeline.plan.shards if shard.key not in done)

    return landed_text


def request_shard(shard: ShardSource) -> dg.RunRequest:
    """Ask for the tokens and activations of one shard, once for each content of its documents."""
    assets = [dg.AssetKey("token_shards"), dg.AssetKey("activations")]
    return dg.RunRequest(run_key=f"{shard.key}-{shard.fingerprint}", asset_selection=assets, partition_key=shard.key)


def fingerprint_listing(folder: Path) -> str:
    """Hash names, sizes and times of the files under a folder (or of one file): cheap, and changed by any landing."""
    hasher = hashlib.blake2b(digest_size=12)
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if path.is_file():
            facts = path.stat()
            hasher.update(f"{path.name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return hasher.hexdigest()
