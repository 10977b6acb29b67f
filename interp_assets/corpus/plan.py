"""A configuration and the world become the plan: which documents make which shard, and what the tokenizer and the model are.

Everything that every stage must agree on before it starts is decided here, and what can be refused cheaply is refused here: text that is
no text, a hook point that does not exist, a context longer than the model's, a tokenizer that is another model's. The model is built on
the `meta` device, without its weights, so planning for a large model costs no memory; its local weights are read once for their hash.
"""

from interp_assets.config import PipelineConfig
from interp_assets.corpus.sources import plan_sources
from interp_assets.errors import InputError
from interp_assets.garcon.locate import fingerprint_model, fingerprint_tokenizer
from interp_assets.garcon.subject import SubjectModel, make_meta_model
from interp_assets.garcon.tokenizer import load_tokenizer
from interp_assets.pipeline import Pipeline, PipelinePlan, save_plan
from interp_assets.store import Store


def plan_corpus(config: PipelineConfig, store: Store) -> Pipeline:
    """Plan a pipeline and save the plan; an unchanged world gives the same plan, and then nothing is written.

    Raises `InputError` or `ConfigError` for text, tokenizer, model, hook points and lengths that do not fit.
    """
    subject = make_meta_model(config.model)
    widths = {hook_point: subject.d_in(hook_point) for hook_point in config.harvest.hook_points}
    _check_model(config, subject)
    plan = PipelinePlan(
        shards=plan_sources(config.corpus, config.seed),
        tokenizer_fingerprint=fingerprint_tokenizer(config.model),
        model_fingerprint=fingerprint_model(config.model),
        hook_widths=widths,
        vocabulary_size=subject.vocabulary_size,
        max_context=subject.max_context,
    )
    save_plan(store, plan)
    return Pipeline(config, plan)


def _check_model(config: PipelineConfig, subject: SubjectModel) -> None:
    if config.corpus.context_length > subject.max_context:
        raise InputError(
            f"corpus.context_length is {config.corpus.context_length:,}, but {config.model.name} takes at most {subject.max_context:,} tokens: "
            "lower it."
        )
    if not subject.is_causal and config.corpus.contexts == "packed":
        raise InputError(
            f"{config.model.name} is an encoder ({subject.net.config.model_type}), which reads one document at a time: "
            "set corpus.contexts to per_document."
        )
    tokenizer = load_tokenizer(config.model)
    if tokenizer.vocab_size > subject.vocabulary_size:
        raise InputError(
            f"The tokenizer of {config.model.name} has {tokenizer.vocab_size:,} tokens, the model only {subject.vocabulary_size:,} embeddings: "
            "they do not belong together. Use the tokenizer that the model was trained with."
        )
