"""A sensor that notices new text: landed files become a new plan, and new shards are tokenized and harvested.

    tick: is the listing of the corpus folder another than the plan was made from?  -> materialize `corpus_plan`, which registers new shards
          are there shards whose documents have no token shard yet?  -> materialize them, and their activations

What counts is the listing that a plan saw, not the one that a tick saw: files come and go between the two, and back. Requests carry a run key
made of what they answer to and how often, so a restarted daemon asks for nothing twice, and a state that comes back is asked for again. A plan
that failed is not asked for again before the listing changes. The sensor is off until it is switched on in the UI, and it only serves the
corpus source `files`: other sources do not change under a running pipeline.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import dagster as dg
from dagster._core.storage.tags import RUN_KEY_TAG

from interp_assets.corpus.files import fingerprint_listing
from interp_assets.errors import ArtifactError
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, ShardSource
from interp_assets.storage.manifest import MANIFEST
from interp_assets.storage.store import Store
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
        listing, planned = fingerprint_listing(Path(corpus.path).expanduser()), planned_listing(context.instance)
        asked = _Asked.decode(context.cursor)
        if listing != planned and (listing != asked.listing or _has_planned(context.instance, asked)):
            asked = _Asked(asked.n + 1, listing)
            context.update_cursor(asked.encode())
            yield dg.RunRequest(run_key=asked.run_key, asset_selection=[dg.AssetKey("corpus_plan")])
            return
        try:
            pipeline, store = world.open()
        except ArtifactError as error:
            yield dg.SkipReason(str(error))
            return
        yield from request_shards(pipeline, store, context.instance)

    return landed_text


class _Asked(NamedTuple):
    """What the sensor has asked for last: the cursor."""

    n: int
    """Plans that it has asked for so far: listings may come back, run keys must not."""
    listing: str

    @property
    def run_key(self) -> str:
        """Name the request."""
        return f"plan-{self.n}-{self.listing}"

    def encode(self) -> str:
        """Write it as a cursor."""
        return f"{self.n}:{self.listing}"

    @classmethod
    def decode(cls, cursor: str | None) -> "_Asked":
        """Read a cursor; one of an earlier release is a listing alone."""
        n, _, listing = (cursor or "").rpartition(":")
        return cls(int(n) if n.isdecimal() else 0, listing)


def planned_listing(instance: dg.DagsterInstance) -> str:
    """Return the listing that the latest plan was made from; empty when there is no plan, or one that does not say."""
    event = instance.get_latest_materialization_event(dg.AssetKey("corpus_plan"))
    said = event.asset_materialization.metadata.get("listing") if event and event.asset_materialization else None
    return str(said.value) if said else ""


def _has_planned(instance: dg.DagsterInstance, asked: _Asked) -> bool:
    """Say whether the plan that was asked for was made: then from another listing, because files came or went before it was."""
    runs = instance.get_runs(dg.RunsFilter(tags={RUN_KEY_TAG: asked.run_key}, statuses=[dg.DagsterRunStatus.SUCCESS]), limit=1)
    return bool(runs)


def request_shards(pipeline: Pipeline, store: Store, instance: dg.DagsterInstance) -> Iterator[dg.RunRequest]:
    """Ask for the tokens and activations of the shards whose documents have none, once for each content that follows another."""
    asset = make_road(pipeline.config).find("token_shards")
    made = instance.event_log_storage.get_latest_storage_id_by_partition(dg.AssetKey(list(asset.key)), dg.DagsterEventType.ASSET_MATERIALIZATION)
    refs = {shard.key: asset.artifacts(pipeline, store, shard.key) for shard in pipeline.plan.shards}
    folders = {ref.path.partition("/")[0] for found in refs.values() for ref in found}
    there = {item.path for folder in folders for item in store.list(folder)}
    for shard in pipeline.plan.shards:
        if shard.key not in made or not all(f"{ref.path}/{MANIFEST}" in there for ref in refs[shard.key]):
            yield _request(shard, made.get(shard.key))


def _request(shard: ShardSource, after: int | None) -> dg.RunRequest:
    """Ask for a shard; `after` is the event of the content that it had before."""
    assets = [dg.AssetKey("token_shards"), dg.AssetKey("activations")]
    run_key = f"{shard.key}-{shard.fingerprint}" + (f"-after-{after}" if after else "")
    return dg.RunRequest(run_key=run_key, asset_selection=assets, partition_key=shard.key)
