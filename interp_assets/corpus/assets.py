"""The corpus as assets: the documents that are there, the plan that divides them, and the token shards."""

from collections.abc import Callable
from functools import partial

from interp_assets.corpus.checks import TOKEN_COUNTS
from interp_assets.corpus.refs import TOKEN_SHARD_VERSION, read_config, token_shard_ref
from interp_assets.corpus.sizes import TEXT_BYTES_PER_S, TOKEN_BYTES, rows_of
from interp_assets.planning.asset import SHARDS, Asset, Job, Load, Observed, Shown, same, whole
from interp_assets.planning.config import PipelineConfig, code_version
from interp_assets.planning.pipeline import Pipeline, shard_index
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store

GROUP = "corpus"


def make_assets(config: PipelineConfig) -> list[Asset]:
    """List the assets of this stage."""
    return [
        Asset(
            key=("documents",),
            group=GROUP,
            kinds=("file",),
            description=(
                "The text of one shard as it lies outside: nothing of ours makes it. `corpus_plan` notes the fingerprint of its documents, so when "
                "a file changes, exactly its own shard shows as stale."
            ),
            axis=SHARDS,
            observe=_observe,
        ),
        Asset(
            key=("corpus_plan",),
            group=GROUP,
            kinds=("python", "json"),
            description=(
                "What the world answered: which documents make which shard, how wide each hook point is, and the fingerprints of tokenizer and "
                "model. Materialize it first, and again when text has come or gone: it registers the shards and the experiments as partitions, and "
                "every artifact id follows from it. Look at the number of shards and their bytes."
            ),
            plan=_plan,
            shows=_show_plan,
            is_relied_on=True,
            code_version=code_version(1, corpus=config.corpus, model=config.model, harvest=config.harvest),
        ),
        Asset(
            key=("token_shards",),
            group=GROUP,
            kinds=("python", "parquet"),
            description=(
                "The documents of one shard as token ids, in contexts of fixed length, one row per token position. The unit of work is a corpus "
                "shard. Look at the rows and at how many of them are valid (special tokens are not); documents.parquet leads each row back to its "
                "text."
            ),
            axis=SHARDS,
            reads=(same("documents"), whole("corpus_plan")),
            artifacts=lambda pipeline, _store, key: [token_shard_ref(pipeline, shard_index(key))],
            make=_tokenize,
            unit="documents",
            takes=_tokenizing,
            shows=_show_left_out,
            checks=(TOKEN_COUNTS,),
            code_version=code_version(TOKEN_SHARD_VERSION, read=read_config(config)),
        ),
    ]


def _plan(config: PipelineConfig, store: Store, tell: Callable[[str], None]) -> Pipeline:
    from interp_assets.corpus.plan import describe_empty, plan_corpus

    pipeline = plan_corpus(config, store)
    if sentence := describe_empty(pipeline):
        tell(sentence)
    return pipeline


def _observe(pipeline: Pipeline) -> dict[str, Observed]:
    return {shard.key: Observed(shard.fingerprint, {"documents": shard.n_documents, "bytes": shard.n_bytes}) for shard in pipeline.plan.shards}


def _show_plan(job: Job, _key: str, _made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.corpus.plan import describe_empty

    pipeline = job.pipeline
    shards, generations = pipeline.plan.shards, pipeline.plan.generations
    shown: dict[str, Shown] = {
        "shards": len(shards),
        "held_out_shards": len(pipeline.held_out_indices),
        "documents": sum(shard.n_documents for shard in shards),
        "text_bytes": sum(shard.n_bytes for shard in shards),
        "plan": pipeline.facts,
    }
    if sentence := describe_empty(pipeline):
        shown["empty_files"] = sentence
    if pipeline.listing:
        shown["listing"] = pipeline.listing
    if generations:
        shown |= {"generations": generations, "pending_shards": len(pipeline.pending_indices)}
    return shown


def _tokenize(job: Job) -> Callable[[str], list[Produced]]:
    if job.config.corpus.is_planted:
        from interp_assets.corpus.planted import make_planted_tokens

        return lambda key: [make_planted_tokens(job.pipeline, job.store, shard_index(key))]
    from interp_assets.corpus.tokens import describe_left_out, make_token_shard

    make = partial(make_token_shard, job.pipeline, job.store, job.world.tokenizer(), progress=job.progress.advance)

    def make_partition(key: str) -> list[Produced]:
        made = make(shard_index(key))
        if sentence := describe_left_out(made.manifest):
            job.progress.tell(f"{key}: {sentence}")
        return [made]

    return make_partition


def _show_left_out(_job: Job, _key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.corpus.tokens import describe_left_out

    sentence = describe_left_out(made[0].manifest)
    return {"left_out": sentence} if sentence else {}


def _tokenizing(pipeline: Pipeline, store: Store, key: str) -> Load:
    index = shard_index(key)
    n_rows, text_bytes = rows_of(pipeline, store, index), pipeline.source(index).n_bytes
    return Load(n_rows, 0, n_rows * TOKEN_BYTES, 2, 2, busy_s=text_bytes / TEXT_BYTES_PER_S, memory_bytes=n_rows * 100)
