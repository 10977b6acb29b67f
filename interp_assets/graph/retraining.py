"""A sensor that notices enough new tokens, and the asset it asks for: append, retrain, compare, promote or keep back.

    tick      new harvested tokens since the last training >= retrain.after_tokens?  -> one run of `retraining`
    run  1.   a candidate plan with one more generation (train/growth.py)
         2.   its shuffle, merge, certificate, statistics, warm-started SAEs and evaluations: the road, under the candidate plan
         3.   each SAE beside the one before it, on the held-out shards
         4.   promoted: the generation enters the plan, and feature records are made anew; kept back: said so, and everything stays

The run makes its partitions by Dagster runs of their own, one for each range, as `interp run` does: lineage, plots and checks are
those of every other run. **Once per threshold**: the run key says how often the threshold has been passed since which generation, and
Dagster starts one run for one key, whatever restarts or ticks come; what the run does is a pure function of the plan, so a run that
died and is retried finds what it had finished. Only a pipeline with `retrain.after_tokens` has this asset and its sensor.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import dagster as dg
from pydantic import Field

from interp_assets.errors import ArtifactError, InterpError
from interp_assets.graph.backfill import run_backfill
from interp_assets.graph.factory import OWNERS, kinds_of
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.shuffle.generations import before
from interp_assets.storage.manifest import Produced, read_file
from interp_assets.storage.store import Store
from interp_assets.train.growth import COMPARISON, compare, made_by_candidate, make_candidate, measure_growth, promote
from resources.world import World

CHECK_EVERY_S: Final = 10
NAME: Final = "retraining"


class RetrainingConfig(dg.Config):
    """What a retraining takes in."""

    stop: int = Field(description="The first shard index that is not taken in. The sensor says it; 0 takes all harvested shards.", default=0)


class Retrained(NamedTuple):
    """What a retraining came to."""

    comparison: Produced
    n_made: int
    """Partitions made, by the candidate and after it."""


def make_retraining(config: PipelineConfig) -> dg.AssetsDefinition:
    """Make the asset of a pipeline that retrains."""

    @dg.asset(
        name=NAME,
        deps=[dg.AssetDep("activations", partition_mapping=dg.AllPartitionMapping()), dg.AssetDep("corpus_plan")],
        group_name="train",
        owners=OWNERS,
        kinds=kinds_of(["pytorch"], config),
        code_version="1",
        description=(
            "New text taken in: its rows are shuffled and merged into the mixed shards, every SAE is trained on from its last state, measured on the "
            "held-out shards and compared. Only an SAE that is not worse by more than the set margin takes the place of the old one. "
            "Look at the comparison and at whether it was promoted."
        ),
    )
    def retraining(context: dg.AssetExecutionContext, config: RetrainingConfig, world: dg.ResourceParam[World]) -> dg.MaterializeResult:
        done = retrain(world.config, context.instance, config.stop)
        return dg.MaterializeResult(metadata=describe(done, world.store()), data_version=dg.DataVersion(done.comparison.manifest.digest))

    return retraining


def make_retraining_sensor() -> dg.SensorDefinition:
    """Make the sensor of a pipeline that retrains. It is on from the start: the configuration has asked for it."""

    @dg.sensor(
        name="enough_new_tokens",
        target=[NAME],
        minimum_interval_seconds=CHECK_EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Starts one retraining each time that enough new tokens have been harvested since the last one.",
    )
    def enough_new_tokens(world: dg.ResourceParam[World]) -> Iterator[dg.RunRequest | dg.SkipReason]:
        try:
            pipeline, store = world.open()
        except ArtifactError as error:
            yield dg.SkipReason(str(error))
            return
        growth, threshold = measure_growth(pipeline, store), pipeline.config.retrain.after_tokens
        if growth.n_tokens < threshold:
            yield dg.SkipReason(f"{growth.n_tokens:,} new tokens since the last training; a retraining starts at {threshold:,}.")
            return
        generation, times = len(pipeline.plan.generations), growth.n_tokens // threshold
        run_config = dg.RunConfig(ops={NAME: RetrainingConfig(stop=growth.stop)})
        tags = {"interp/generation": str(generation), "interp/new_tokens": str(growth.n_tokens)}
        yield dg.RunRequest(run_key=f"generation-{generation}-passed-{times}", run_config=run_config, tags=tags)

    return enough_new_tokens


def retrain(config: PipelineConfig, instance: dg.DagsterInstance, stop: int = 0) -> Retrained:
    """Take in the harvested shards before `stop` (0: all): append, train, compare, and promote or keep back. May be repeated.

    Raises `InputError` when there is nothing to take in, and `InterpError` with the first message when a partition failed.
    """
    store = open_pipeline_store(config)
    stop = stop or measure_growth(load_pipeline(config, store), store).stop
    candidate_config = make_candidate(config, store, stop)
    candidate = load_pipeline(candidate_config, store)
    n_made = _make(candidate_config, instance, made_by_candidate(config))
    comparison = compare(config, before(candidate), candidate, store)
    if comparison.manifest.facts["promoted"]:
        promote(config, candidate, store)
    return Retrained(comparison, n_made + _make(config, instance, []))


def describe(done: Retrained, store: Store) -> dict[str, dg.MetadataValue | int | str]:
    """Return a retraining's metadata: the verdict, why, and each SAE beside the one before it."""
    ref, manifest, *_ = done.comparison
    rows = json.loads(read_file(store, ref.path, manifest, COMPARISON))
    records = [dg.TableRecord({key: "" if value is None else value for key, value in row.items()}) for row in rows]
    facts = manifest.facts
    return {
        "promoted": dg.MetadataValue.bool(bool(facts["promoted"])),
        "verdict": f"kept back: {facts['why']}" if facts["why"] else "promoted",
        "generation": int(facts["generation"]),
        "shards": int(facts["shards"]),
        "partitions_made": done.n_made,
        "comparison": dg.MetadataValue.table(records),
    }


def _make(config: PipelineConfig, instance: dg.DagsterInstance, select: Sequence[str]) -> int:
    """Make what is due under a configuration's plan; return the number of partitions made. Raises `InterpError` when some failed."""
    done = list(run_backfill(config, instance, select=select))
    for item in done:
        if item.message:
            raise InterpError(f"{item.name}: {item.message}")
    return sum(item.n_made for item in done)
