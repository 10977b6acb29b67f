"""A configured model becomes the few numbers that planning asks of it, without its weights and, the second time, without PyTorch.

To learn them a network is built on PyTorch's `meta` device, which takes its library and some seconds. Of a local model they are noted
(`storage/seen.py`) beside its `config.json`, under everything they follow from: weights, tokenizer, hook points, the library's version.
What a hub's revision stands for is asked each time.
"""

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

from pydantic import BaseModel, ConfigDict

from interp_assets.errors import InputError
from interp_assets.garcon.locate import fingerprint_model, fingerprint_tokenizer, locate_model
from interp_assets.planning.config import ModelConfig
from interp_assets.planning.hook_names import alias_of
from interp_assets.storage.seen import SeenFiles

_VERSION: Final = 4
"""Raise it when a number is found in another way."""


class ModelFacts(BaseModel):
    """What planning knows of a model and its tokenizer."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model_fingerprint: str
    tokenizer_fingerprint: str
    model_type: str
    hook_widths: dict[str, int]
    """`d_in` of each hook point that was asked for."""
    hook_aliases: dict[str, str]
    """TransformerLens' names of those that have another one in this model than in most."""
    vocabulary_size: int
    tokenizer_size: int
    """Tokens of the tokenizer, without those that were added to it."""
    max_context: int
    is_causal: bool
    n_parameters: int
    heads: dict[int, int]
    """Number of heads of each layer that attends; nothing where heads cannot be shown."""
    other_layers: dict[int, str]
    """What stands in each layer that does not attend, beside layers that do."""
    heads_refused: str
    """Why heads cannot be shown; empty where they can."""


def find_facts(model: ModelConfig, hook_points: Sequence[str], seen: SeenFiles) -> ModelFacts:
    """Return a model's facts. Raises `InputError` for a model, tokenizer or hook point that is not there."""
    folder = locate_model(model).folder
    if folder is None:
        return _measure(model, hook_points, fingerprint_model(model), fingerprint_tokenizer(model))
    fingerprints = fingerprint_model(model, seen), fingerprint_tokenizer(model)
    question = f"model facts {json.dumps([_VERSION, version('transformers'), model.trust_remote_code, fingerprints, hook_points])}"
    answer = seen.answer(folder / "config.json", question, lambda: _measure(model, hook_points, *fingerprints).model_dump_json().encode())
    return ModelFacts.model_validate_json(answer)


def _measure(model: ModelConfig, hook_points: Sequence[str], model_fingerprint: str, tokenizer_fingerprint: str) -> ModelFacts:
    from interp_assets.garcon.attention import list_attention, list_other_layers  # noqa: PLC0415 - takes PyTorch and transformers
    from interp_assets.garcon.points import find_point  # noqa: PLC0415 - as above
    from interp_assets.garcon.subject import make_meta_model  # noqa: PLC0415 - as above
    from interp_assets.garcon.tokenizer import load_tokenizer  # noqa: PLC0415

    subject, tokenizer = make_meta_model(model), load_tokenizer(model)
    aliases = {hook_point: find_point(subject.net, hook_point).alias for hook_point in hook_points}
    heads, others, refused = {}, {}, ""
    try:
        heads = {layer.layer: layer.n_heads for layer in list_attention(subject.net)}
        others = list_other_layers(subject.net)
    except InputError as error:
        refused = str(error)
    return ModelFacts(
        model_fingerprint=model_fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint,
        model_type=subject.net.config.model_type,
        hook_widths={hook_point: subject.d_in(hook_point) for hook_point in hook_points},
        hook_aliases={name: alias for name, alias in aliases.items() if alias != alias_of(name)},
        vocabulary_size=subject.vocabulary_size,
        tokenizer_size=tokenizer.vocab_size,
        max_context=subject.max_context,
        is_causal=subject.is_causal,
        n_parameters=sum(weight.numel() for weight in subject.net.parameters()),
        heads=heads,
        other_layers=others,
        heads_refused=refused,
    )
