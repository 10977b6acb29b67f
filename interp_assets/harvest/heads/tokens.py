"""The first token shard becomes the list of tokens that masses are told apart by: its most frequent ones.

They are chosen from one shard and not from all, so that text which is added later leaves the statistics of earlier shards as they are. Any other
token counts as one of the last class.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from interp_assets.corpus.tokens import TokenShard, context_offsets, load_tokens
from interp_assets.harvest.heads.refs import first_shard, heads_of, tokens_lineage, tokens_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import ArtifactRef, Manifest, Produced, load_manifest, timed
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import load_tensors, save_tensors

TOKENS: Final = "tokens.safetensors"


@timed
def choose_tokens(pipeline: Pipeline, store: Store) -> Produced:
    """Publish the most frequent tokens of the first shard, equal counts by id."""
    ref = tokens_ref(pipeline)
    kept = trace(Digests(store), tokens_lineage(pipeline))
    if current := find_current(store, ref, kept):
        return Produced(ref, current, is_cached=True)
    counts = np.bincount(load_tokens(pipeline, store, first_shard(pipeline)).token_ids)
    chosen = np.argsort(-counts, kind="stable")[: heads_of(pipeline).key_tokens]
    chosen = chosen[counts[chosen] > 0].astype(np.uint32)
    with create_current(store, ref, kept) as art:
        save_tensors(art, TOKENS, {"token_ids": chosen}, n_rows=len(chosen))
        art.facts |= {"n_tokens": len(chosen), "share": round(float(counts[chosen].sum() / max(1, counts.sum())), 4)}
    return art.produced


def load_chosen(pipeline: Pipeline, store: Store) -> NDArray[np.uint32]:
    """Read the tokens, the most frequent first."""
    ref: ArtifactRef = tokens_ref(pipeline)
    manifest: Manifest = load_manifest(store, ref)
    return load_tensors(store, ref.path, manifest, TOKENS)["token_ids"].numpy()


def classify(token_ids: NDArray[np.uint32], chosen: NDArray[np.uint32]) -> NDArray[np.int32]:
    """Return the class of each token: its place among the chosen ones, or their number."""
    order = np.argsort(chosen)
    places = np.minimum(np.searchsorted(chosen[order], token_ids), max(0, len(chosen) - 1))
    found = order[places]
    return np.where(chosen[found] == token_ids, found, len(chosen)).astype(np.int32)


def find_earlier(tokens: TokenShard) -> NDArray[np.int32]:
    """Return of each row the last earlier place of the same token in its context, counted from the context's first; -1 where there is none."""
    starts = np.repeat(context_offsets(tokens.contexts)[:-1], np.diff(context_offsets(tokens.contexts)))
    keys = tokens.contexts.astype(np.uint64) << np.uint64(32) | tokens.token_ids.astype(np.uint64)
    order = np.argsort(keys, kind="stable")
    earlier = np.full(len(keys), -1, np.int32)
    is_again = keys[order][1:] == keys[order][:-1]
    again = order[1:][is_again]
    earlier[again] = order[:-1][is_again] - starts[again]
    return earlier


def find_documents(tokens: TokenShard) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return of each row where its document starts and stops inside its context, counted from the context's first."""
    n, starts = tokens.n_rows, np.repeat(context_offsets(tokens.contexts)[:-1], np.diff(context_offsets(tokens.contexts)))
    is_new = np.ones(n, np.bool_)
    is_new[1:] = (tokens.contexts[1:] != tokens.contexts[:-1]) | (tokens.documents[1:] != tokens.documents[:-1])
    bounds = np.append(np.flatnonzero(is_new), n)
    piece = np.cumsum(is_new) - 1
    return (bounds[piece] - starts).astype(np.int32), (bounds[piece + 1] - starts).astype(np.int32)
