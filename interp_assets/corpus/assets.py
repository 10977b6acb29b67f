"""The corpus as assets: the documents that are there, the plan that divides them, and the token shards."""

from dataclasses import asdict
from functools import partial

import dagster as dg

from interp_assets.corpus.plan import describe_empty, plan_corpus
from interp_assets.corpus.refs import TOKEN_SHARD_VERSION
from interp_assets.corpus.tokens import make_token_shard
from interp_assets.graph.faces import OWNERS, RETRIES, Events, Made, code_version, hash_version, made, partition_keys, record
from interp_assets.graph.fanout import start_fanout
from interp_assets.graph.partitions import EXPERIMENTS, SHARDS, Layout, claim_history, same, set_partitions, whole
from interp_assets.planning.pipeline import Pipeline, shard_index
from interp_assets.planning.progress import Progress
from interp_assets.storage.manifest import Produced
from resources.world import World

GROUP = "corpus"


def make_assets(layout: Layout) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """Make the assets of this stage."""
    return [_documents(layout), _corpus_plan(layout), _token_shards(layout)]


def _documents(layout: Layout) -> dg.AssetSpec:
    return dg.AssetSpec(
        "documents",
        partitions_def=layout.shards,
        group_name=GROUP,
        owners=OWNERS,
        kinds={"file"},
        description=(
            "The text of one shard as it lies outside: nothing of ours makes it. `corpus_plan` notes the fingerprint of its documents, so when "
            "a file changes, exactly its own shard shows as stale."
        ),
    )


def _corpus_plan(layout: Layout) -> dg.AssetsDefinition:
    @dg.asset(
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        kinds=layout.kinds("python", "json"),
        code_version=code_version(1, layout.config.corpus, layout.config.model, layout.config.harvest),
        description=(
            "What the world answered: which documents make which shard, how wide each hook point is, and the fingerprints of tokenizer and model. "
            "Materialize it first, and again when text has come or gone: it registers the shards and the experiments as partitions, and "
            "every artifact id follows from it. Look at the number of shards and their bytes."
        ),
    )
    def corpus_plan(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        claim_history(context.instance, world.config.name)
        pipeline = plan_corpus(world.config, world.store())
        if sentence := describe_empty(pipeline):
            context.log.info(sentence)
            progress.tell(sentence)
        set_partitions(context.instance, SHARDS, [shard.key for shard in pipeline.plan.shards])
        set_partitions(context.instance, EXPERIMENTS, [sae.name for sae in pipeline.config.saes])
        for shard in pipeline.plan.shards:
            tags = {"dagster/data_version": shard.fingerprint}
            facts = {"documents": shard.n_documents, "bytes": shard.n_bytes}
            yield dg.AssetObservation("documents", partition=shard.key, metadata=facts, tags=tags)
        yield from record(context, lambda _key: _describe(pipeline), progress)

    return corpus_plan


def make_partition(config_json: str, key: str) -> list[Produced]:
    """Make one token shard, wherever this runs."""
    world = World(config_json=config_json)
    pipeline, store = world.open()
    return [make_token_shard(pipeline, store, world.tokenizer(), shard_index(key))]


def _token_shards(layout: Layout) -> dg.AssetsDefinition:
    @dg.asset(
        partitions_def=layout.shards,
        deps=[same("documents"), whole("corpus_plan")],
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        kinds=layout.kinds("python", "parquet"),
        code_version=code_version(TOKEN_SHARD_VERSION, layout.config.corpus),
        backfill_policy=layout.spread(),
        description=(
            "The documents of one shard as token ids, in contexts of fixed length, one row per token position. The unit of work is a corpus shard. "
            "Look at the rows and at how many of them are valid (special tokens are not); documents.parquet leads each row back to its text."
        ),
    )
    def token_shards(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()
        fanout = start_fanout(make_partition, world.config_json, partition_keys(context))
        tokenize = None if fanout else partial(make_token_shard, pipeline, store, world.tokenizer(), progress=progress.advance)

        def work(key: str) -> Made:
            return made(fanout.take(key) if fanout else [tokenize(shard_index(key))] if tokenize else [], store.url)

        yield from record(context, work, progress)

    return token_shards


def _describe(pipeline: Pipeline) -> Made:
    """Show the plan. Its data version leaves the shards out: their own fingerprints are the versions of `documents`."""
    plan = asdict(pipeline.plan)
    shards, generations = plan.pop("shards"), plan.pop("generations")
    metadata = {
        "shards": len(shards),
        "held_out_shards": len(pipeline.held_out_indices),
        "documents": sum(shard["n_documents"] for shard in shards),
        "text_bytes": sum(shard["n_bytes"] for shard in shards),
        "plan": dg.MetadataValue.json(plan),
    }
    if sentence := describe_empty(pipeline):
        metadata["empty_files"] = sentence
    if generations:
        metadata |= {"generations": dg.MetadataValue.json(generations), "pending_shards": len(pipeline.pending_indices)}
    return Made(hash_version({**plan, "corpus": pipeline.config.corpus.model_dump()}), metadata)
