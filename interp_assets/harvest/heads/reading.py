"""Contexts of a token shard run through the subject model, layer by layer handed to who wants their attention.

As many contexts run together as their padded length says, always: where a batch would be short, empty contexts fill it. A matrix product may
round differently for another number of rows, and what is counted here must not depend on how text was cut into shards. Where a token's way depends
on others' (a mixture of experts multiplies what was sent to an expert, together), each context runs alone. A forward ends at the last layer
that is asked for; no logits are made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.corpus.tokens import TokenShard, context_offsets
from interp_assets.errors import InputError, NonFiniteError
from interp_assets.garcon.attention import Attended, AttentionLayer, attention_heard, list_attention, runs_together
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.activations import PADDING_STEP, Batch, make_batches
from interp_assets.planning.pipeline import shard_key
from interp_assets.planning.progress import choose_word

FORWARD_TOKENS: Final = 2048
"""Token positions of a forward, padding and empty contexts included."""
QUERIES: Final = 128
"""Queries whose scores are in memory at once."""


class Place(NamedTuple):
    """One context: its place in the batch, its first row in the shard, its length and what it is padded to."""

    place: int
    first_row: int
    length: int
    padded: int


Hear = Callable[[AttentionLayer, Attended, Sequence[Place]], None]
"""Is handed one layer's attention of one batch, and the contexts in it."""


def chosen_layers(model: SubjectModel, layers: Sequence[int]) -> list[AttentionLayer]:
    """Return the attending modules of some layers. Raises `InputError` for a layer that does not attend."""
    found = {layer.layer: layer for layer in list_attention(model.net)}
    if missing := [layer for layer in layers if layer not in found]:
        named = f"{choose_word(len(missing), 'layer')} {', '.join(map(str, missing))}"
        raise InputError(f"{model.name} has no attention in {named}; those that attend are {sorted(found)}. Mend `heads.layers`.")
    return [found[layer] for layer in layers]


def hear_shard(
    model: SubjectModel, layers: Sequence[AttentionLayer], tokens: TokenShard, index: int, hear: Hear, contexts: NDArray[np.int64] | None = None
) -> Iterator[int]:
    """Run the contexts of a shard, or some of them, and hand each layer's attention on; yields the rows of each finished batch.

    Raises `NonFiniteError` that names layer, head, context, position and token where a query, key or value is not finite, and `InputError` for
    a context that is longer than the model takes.
    """
    offsets = context_offsets(tokens.contexts)
    lengths = np.diff(offsets)
    chosen = np.arange(len(lengths)) if contexts is None else contexts
    rows = np.concatenate([np.arange(offsets[c], offsets[c + 1]) for c in chosen.tolist()]) if len(chosen) else np.empty(0, np.int64)
    n_tokens = FORWARD_TOKENS if runs_together(model.net) else 1
    batches = make_batches(
        tokens.token_ids[rows],
        np.concatenate([[0], np.cumsum(lengths[chosen])]),
        n_tokens,
        max_context=model.max_context,
        must_see_mask=not model.is_causal,
        step=1 if model.follows_length else PADDING_STEP,
    )
    for batch in batches:
        places = _places(batch, rows)
        listeners = {layer.module: partial(_listen, tokens, index, layer, places, hear, layer is layers[-1]) for layer in layers}
        _run(model, _fill(batch, n_tokens), listeners)
        yield len(batch.rows)


def _places(batch: Batch, rows: NDArray[np.int64]) -> list[Place]:
    lengths = batch.attention_mask.sum(dim=1).tolist()
    firsts = rows[batch.rows.numpy()[np.cumsum([0, *lengths[:-1]])]].tolist()
    return [Place(place, first, length, batch.token_ids.shape[1]) for place, (first, length) in enumerate(zip(firsts, lengths, strict=True))]


def _fill(batch: Batch, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask with empty contexts up to the number that the padded length says."""
    n_contexts, length = batch.token_ids.shape
    n_missing = max(1, n_tokens // length) - n_contexts
    is_masked = not bool(batch.attention_mask.all())
    mask = torch.cat([batch.attention_mask, torch.ones((n_missing, length), dtype=torch.bool)])
    if is_masked:  # an encoder's empty contexts have padding, too, so that none is the odd one out
        mask[n_contexts:, -1] = False
    return torch.cat([batch.token_ids, torch.zeros((n_missing, length), dtype=torch.int64)]), mask


class _HeardError(Exception):
    """Ends a forward whose last layer has been heard."""


def _run(model: SubjectModel, batch: tuple[Tensor, Tensor], listeners: Mapping[torch.nn.Module, Callable[[Attended], None]]) -> None:
    token_ids, mask = batch
    arguments = model.arguments(token_ids, None if bool(mask.all()) else mask)
    with attention_heard(listeners), suppress(_HeardError), torch.no_grad():
        model.net.base_model(**arguments)


def _listen(tokens: TokenShard, index: int, layer: AttentionLayer, places: Sequence[Place], hear: Hear, is_last: bool, attended: Attended) -> None:  # noqa: FBT001
    for name, state in (("query", attended.query), ("key", attended.key), ("value", attended.value)):
        if not bool(torch.isfinite(state.sum())):  # one fast reading; a sum that overflows is looked at closely, too
            _refuse(tokens, index, layer, places, name, state)
    hear(layer, attended, places)
    if is_last:
        raise _HeardError


def _refuse(tokens: TokenShard, index: int, layer: AttentionLayer, places: Sequence[Place], name: str, state: Tensor) -> None:
    """Raise `NonFiniteError` for the first position that is not finite; padding may be what it likes."""
    for place in places:
        bad = (~torch.isfinite(state[place.place, :, : place.length])).any(dim=2).nonzero()
        if len(bad):
            head, position = bad[bad[:, 1].argmin()].tolist()
            row = place.first_row + position
            raise NonFiniteError(
                f"A {name} of layer {layer.layer}, head {head}, is not finite: {shard_key(index)}, context {int(tokens.contexts[row])}, position "
                f"{position}, token id {int(tokens.token_ids[row])}. Nothing of the shard was published. Run the model in float32 or bfloat16, or "
                "take the document out of the corpus."
            )
