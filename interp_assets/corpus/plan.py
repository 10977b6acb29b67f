"""A configuration and the world become the plan: which documents make which shard, and what the tokenizer and the model are.

Everything that every stage must agree on before it starts is decided here, and what can be refused cheaply is refused here: text that is
no text, a hook point that does not exist, a context longer than the model's, a tokenizer that is another model's. The model is built on
the `meta` device, without its weights, so planning for a large model costs no memory. Local text and weights are read once; files that
have not changed since are known (`storage/seen.py`).
"""

from dataclasses import replace
from pathlib import Path

from interp_assets.corpus.files import fingerprint_listing
from interp_assets.corpus.packing import check_room
from interp_assets.corpus.planted import plan_planted
from interp_assets.corpus.refs import token_ids
from interp_assets.corpus.sources import survey_sources
from interp_assets.errors import ArtifactError, InputError
from interp_assets.garcon.facts import ModelFacts, find_facts
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource, load_pipeline, save_configuration, save_plan
from interp_assets.storage.seen import open_seen
from interp_assets.storage.store import Store

_SHOWN_FILES = 5
_MOST_AFFIXES = 16
"""No tokenizer puts more special tokens around a text: contexts that are longer have room."""


def plan_corpus(config: PipelineConfig, store: Store) -> Pipeline:
    """Plan a pipeline and save the plan; an unchanged world gives the same plan, and then nothing is written.

    Raises `InputError` or `ConfigError` for text, tokenizer, model, hook points and lengths that do not fit.
    """
    if config.corpus.is_planted:
        return _keep(config, store, plan_planted(config), _find_plan(config, store))
    listing = fingerprint_listing(Path(config.corpus.path).expanduser()) if config.corpus.source == "files" else ""
    known = _find_plan(config, store)
    old = known if config.retrain.after_tokens else None
    with open_seen(read_again=config.execution.read_again) as seen:
        facts = find_facts(config.model, config.harvest.hook_points, seen)
        _check_model(config, facts)
        shards, empty = survey_sources(config.corpus, config.seed, [shard.n_documents for shard in old.shards] if old else (), seen)
    plan = PipelinePlan(
        shards=shards,
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        model_fingerprint=facts.model_fingerprint,
        hook_widths=facts.hook_widths,
        hook_aliases=facts.hook_aliases,
        vocabulary_size=facts.vocabulary_size,
        max_context=facts.max_context,
        generations=carry_generations(old, shards) if config.retrain.after_tokens else [],
    )
    return _keep(config, store, plan, known, empty, listing)


def _keep(
    config: PipelineConfig, store: Store, plan: PipelinePlan, known: PipelinePlan | None, empty: list[str] | None = None, listing: str = ""
) -> Pipeline:
    plan = carry_shuffle(config, known, plan)
    save_plan(store, plan, config.execution.plan)
    save_configuration(store, config)
    return Pipeline(config, plan, empty or [], listing)


def carry_shuffle(config: PipelineConfig, old: PipelinePlan | None, plan: PipelinePlan) -> PipelinePlan:
    """Return a new plan with the shuffle that the old one chose, while the tokens are those whose rows it counted."""
    chosen = old.shuffle if old and config.shuffle.stated is None else None
    pipeline = Pipeline(config, plan)
    is_same = chosen is not None and token_ids(pipeline, pipeline.first_indices) == chosen.token_shards
    return replace(plan, shuffle=chosen) if is_same else plan


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


def _find_plan(config: PipelineConfig, store: Store) -> PipelinePlan | None:
    """Return the plan that there is, if there is one."""
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
    harvest = config.harvest
    if harvest.excluded_positions >= config.corpus.context_length:
        raise InputError(
            f"harvest.excluded_positions is {harvest.excluded_positions:,}, and contexts have {config.corpus.context_length:,} tokens: none would be "
            "left. Lower it."
        )
    unknown = [token_id for token_id in harvest.excluded_token_ids if token_id >= model.vocabulary_size]
    if unknown:
        raise InputError(f"harvest.excluded_token_ids names {unknown[:5]}, but {config.model.name} has {model.vocabulary_size:,} tokens.")
    if not model.is_causal and config.corpus.contexts == "packed":
        raise InputError(
            f"{config.model.name} is an encoder ({model.model_type}), which reads one document at a time: set corpus.contexts to per_document."
        )
    if model.tokenizer_size > model.vocabulary_size:
        raise InputError(
            f"The tokenizer of {config.model.name} has {model.tokenizer_size:,} tokens, the model only {model.vocabulary_size:,} embeddings: "
            "they do not belong together. Use the tokenizer that the model was trained with."
        )
    if config.corpus.contexts == "per_document" and config.corpus.context_length <= _MOST_AFFIXES:
        from interp_assets.garcon.tokenizer import affixes, load_tokenizer  # noqa: PLC0415 - takes transformers, and most corpora do without

        check_room(config.corpus.context_length, *affixes(load_tokenizer(config.model)))
    if config.corpus.text_kind == "messages":
        from interp_assets.garcon.chat import check_template  # noqa: PLC0415 - takes transformers, and most corpora do without
        from interp_assets.garcon.tokenizer import load_tokenizer  # noqa: PLC0415 - as above

        check_template(load_tokenizer(config.model), config.model.name)
