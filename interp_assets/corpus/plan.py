"""A configuration and the world become the plan: which documents make which shard, and what the tokenizer and the model are.

Everything that every stage must agree on before it starts is decided here, and what can be refused cheaply is refused here: text that is
no text, a hook point that does not exist, a context longer than the model's, a tokenizer that is another model's. The model is built on
the `meta` device, without its weights, so planning for a large model costs no memory. Local text and weights are read once; files that
have not changed since are known (`storage/seen.py`).
"""

from pathlib import Path

from interp_assets.corpus.files import fingerprint_listing
from interp_assets.corpus.sources import survey_sources
from interp_assets.errors import ArtifactError, InputError
from interp_assets.garcon.facts import ModelFacts, find_facts
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource, load_pipeline, save_plan
from interp_assets.storage.seen import open_seen
from interp_assets.storage.store import Store

_SHOWN_FILES = 5


def plan_corpus(config: PipelineConfig, store: Store) -> Pipeline:
    """Plan a pipeline and save the plan; an unchanged world gives the same plan, and then nothing is written.

    Raises `InputError` or `ConfigError` for text, tokenizer, model, hook points and lengths that do not fit.
    """
    listing = fingerprint_listing(Path(config.corpus.path).expanduser()) if config.corpus.source == "files" else ""
    old = _find_grown(config, store)
    with open_seen(read_again=config.execution.read_again) as seen:
        facts = find_facts(config.model, config.harvest.hook_points, seen)
        _check_model(config, facts)
        shards, empty = survey_sources(config.corpus, config.seed, [shard.n_documents for shard in old.shards] if old else (), seen)
    plan = PipelinePlan(
        shards=shards,
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        model_fingerprint=facts.model_fingerprint,
        hook_widths=facts.hook_widths,
        vocabulary_size=facts.vocabulary_size,
        max_context=facts.max_context,
        generations=carry_generations(old, shards) if config.retrain.after_tokens else [],
    )
    save_plan(store, plan, config.execution.plan)
    return Pipeline(config, plan, empty, listing)


def carry_generations(old: PipelinePlan | None, shards: list[ShardSource]) -> list[int]:
    """Return the generations of a new plan: those of the old one while its shards are what they were, else all shards as one."""
    if old is None:
        return [len(shards)]
    kept = old.generations or [len(old.shards)]
    is_same = [shard.fingerprint for shard in shards[: kept[-1]]] == [shard.fingerprint for shard in old.shards[: kept[-1]]]
    return kept if is_same else [len(shards)]


def describe_empty(pipeline: Pipeline) -> str:
    """Say which files the planning skipped because they hold no text; nothing when there are none, or the plan was only loaded."""
    n_files, shown = len(pipeline.empty_files), pipeline.empty_files[:_SHOWN_FILES]
    if not n_files:
        return ""
    rest = n_files - len(shown)
    noun = "empty file" if n_files == 1 else "empty files"
    return f"{n_files:,} {noun} skipped: {', '.join(shown)}" + (f" and {rest:,} more" if rest else "")


def _find_grown(config: PipelineConfig, store: Store) -> PipelinePlan | None:
    """Return the plan that new text is added to, if the pipeline retrains on new text and has one."""
    if not config.retrain.after_tokens:
        return None
    try:
        return load_pipeline(config, store).plan
    except ArtifactError:
        return None


def _check_model(config: PipelineConfig, model: ModelFacts) -> None:
    if config.corpus.context_length > model.max_context:
        raise InputError(
            f"corpus.context_length is {config.corpus.context_length:,}, but {config.model.name} takes at most {model.max_context:,} tokens: "
            "lower it."
        )
    if not model.is_causal and config.corpus.contexts == "packed":
        raise InputError(
            f"{config.model.name} is an encoder ({model.model_type}), which reads one document at a time: set corpus.contexts to per_document."
        )
    if model.tokenizer_size > model.vocabulary_size:
        raise InputError(
            f"The tokenizer of {config.model.name} has {model.tokenizer_size:,} tokens, the model only {model.vocabulary_size:,} embeddings: "
            "they do not belong together. Use the tokenizer that the model was trained with."
        )
    if config.corpus.text_kind == "messages":
        from interp_assets.garcon.chat import check_template  # noqa: PLC0415 - takes transformers, and most corpora do without
        from interp_assets.garcon.tokenizer import load_tokenizer  # noqa: PLC0415 - as above

        check_template(load_tokenizer(config.model), config.model.name)
