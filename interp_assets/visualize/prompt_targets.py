"""The targets of a configured prompt become what adds to them: columns, scales and terms, as an asset, for pages without a model.

    columns.bin     float16 [heads, targets, keys], which stand behind a prompt's own in a bundle of heads
    targets.json, scales.bin, terms.bin     as of a text of one's own

The sums are `garcon/patterns/targets.py`'s, the bytes `harvest/heads/prompts.py`'s; the format is docs/formats/prompt_targets.md.
"""

from typing import Any, Final

import numpy as np

from interp_assets.errors import InputError
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.patterns.targets import Latent, Logit, Target, explain_targets
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.heads.prompts import COLUMNS, SCALES, TARGETS, TERMS, pack_columns, pack_targets, target_columns
from interp_assets.harvest.heads.refs import head_counts, heads_of
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import Produced, timed
from interp_assets.storage.store import Store
from interp_assets.train.checkpoint import load_sae
from interp_assets.visualize.refs import prompt_targets_lineage, prompt_targets_ref

FILES: Final = (COLUMNS, TARGETS, SCALES, TERMS)


@timed
def keep_targets(pipeline: Pipeline, store: Store, model: SubjectModel, tokenizer: Any, name: str) -> Produced:
    """Publish what adds to the targets of the prompt called `name`. Raises `InputError` for a logit of no single token, and what has no such sum."""
    ref, kept = prompt_targets_ref(pipeline, name), trace(Digests(store), prompt_targets_lineage(pipeline, name))
    if current := find_current(store, ref, kept):
        return Produced(ref, current, is_cached=True)
    prompt, heads = heads_of(pipeline).prompt(name), head_counts(pipeline)
    targets: list[Target] = [Logit(_token_of(tokenizer, text, name)) for text in prompt.logits]
    targets += [Latent(sae, latent) for sae, latent in prompt.wanted]
    saes = {sae: _attach(pipeline, store, model, sae) for sae, _ in prompt.wanted}
    row = [int(token) for token in tokenizer(prompt.text)["input_ids"]]
    terms = explain_targets(model, row, targets, saes)
    files = {COLUMNS: pack_columns(np.stack(list(target_columns(terms, heads).values()), axis=1))}
    files |= pack_targets(terms, heads, lambda token: str(tokenizer.decode([token])))
    with create_current(store, ref, kept) as art:
        for file in FILES:
            art.put(file, files[file])
        art.facts |= {"n_tokens": len(row), "targets": [each.name for each in terms]}
    return art.produced


def _token_of(tokenizer: Any, text: str, name: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [str(tokenizer.decode([token])) for token in ids]
        raise InputError(
            f"`heads.prompts.{name}.logits`: {text!r:.80} is {len(ids)} tokens, {pieces!r:.200}. Name one; most words begin with their space."
        )
    return int(ids[0])


def _attach(pipeline: Pipeline, store: Store, model: SubjectModel, name: str) -> AttachedSae:
    config = pipeline.config.sae(name)
    return AttachedSae(load_sae(pipeline, store, name).to(model.device), config.hook_point)
