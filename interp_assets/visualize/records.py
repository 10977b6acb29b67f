"""Pass D: examples, windows and statistics of one latent slice become the records that a browser shows, one gzip member of JSON each.

1. Compute what needs the weights (logit effects, decoder neighbours) and the sampled firings of all slices (co-activation).
2. Latent group by latent group, read the examples of the slice and their windows, which lie with the dataset shards.
3. Write `records.bin`, `records.idx`, `features.parquet`, and the tokens by frequency, by whose ranks records name them (packing.py).

A record holds its windows' tokens, so one range request opens one feature. Shown are all top examples, all interval examples and the first
`SHOWN_RANDOM` random ones; the others stay in `examples.parquet`. Memory: the token shards (13 bytes a token), the sampled firings of the SAE,
and one latent group. A gzip member carries no time, so equal inputs give equal bytes. The format is described in docs/formats/feature_record.md.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from interp_assets.corpus.tokens import load_documents, load_tokens
from interp_assets.errors import InputError
from interp_assets.garcon.points import MODULE
from interp_assets.garcon.subject import Unembedding
from interp_assets.planning.hook_names import STREAM_KINDS
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import Produced, timed
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import load_tensors
from interp_assets.train.checkpoint import check_sae
from interp_assets.train.sae import Sae
from interp_assets.visualize.candidates import SAMPLE, STATISTICS, in_sample
from interp_assets.visualize.digits import round_significant
from interp_assets.visualize.examples import EXAMPLES
from interp_assets.visualize.lineage import candidates_lineage, examples_lineage, load_current, records_lineage, windows_lineage
from interp_assets.visualize.logits import LogitEffects, measure_logits, used_token_ids
from interp_assets.visualize.neighbours import Coactivations, FiringSample, Neighbours, find_coactivations, find_neighbours, make_sample
from interp_assets.visualize.packing import ORDER, RECORD_VERSION, TokenOrder, order_tokens, pack_record
from interp_assets.visualize.record_windows import SHOWN_RANDOM, DatasetShard, Example, read_examples
from interp_assets.visualize.refs import examples_ref, records_ref, slice_bounds
from interp_assets.visualize.selection import INTERVAL, RANDOM, TOP
from interp_assets.visualize.statistics import LatentStatistics, as_statistics, bin_edges
from interp_assets.visualize.tables import LatentTable, TableWriter, create_table
from interp_assets.visualize.windows import WINDOWS

RECORDS: Final = "records.bin"
INDEX: Final = "records.idx"
FEATURES: Final = "features.parquet"
COACTIVATION_ROWS: Final = 1 << 17
"""Rows of the whole data set that co-activation is counted on, in the mean."""
GROUP_LATENTS: Final = 512
FEATURE_SCHEMA: Final = pa.schema(
    [
        ("latent", pa.uint32()),
        ("is_dead", pa.bool_()),
        ("count", pa.int64()),
        ("frequency", pa.float64()),
        ("mean", pa.float32()),
        ("max", pa.float32()),
        ("top_token", pa.string()),
        ("top_tokens", pa.list_(pa.string())),
        ("top_logits", pa.list_(pa.string())),
        ("bottom_logits", pa.list_(pa.string())),
        ("n_examples", pa.uint32()),
        ("decoder_norm", pa.float32()),
    ]
)


@timed
def write_records(
    pipeline: Pipeline,
    store: Store,
    name: str,
    sae: Sae,
    latent_slice: int,
    tokenizer: PreTrainedTokenizerBase,
    unembedding: Unembedding,
    progress: Callable[[int], None] | None = None,
) -> Produced:
    """Run pass D for one latent slice of the SAE called `name`; `progress` is advanced by latents.

    Raises `ArtifactMissingError` or `ArtifactForeignError` that names every partition of an earlier pass that is missing or of an earlier
    training, and `InputError` when no latent of the whole SAE fires.
    """
    ref = records_ref(pipeline, name, latent_slice)
    known = Digests(store)
    kept = trace(known, records_lineage(pipeline, name, latent_slice))
    if current := find_current(store, ref, kept):
        return Produced(ref, current, is_cached=True)
    check_sae(pipeline, sae, name)
    evidence = _load_evidence(pipeline, store, name, latent_slice, known)
    sample = _load_sample(pipeline, store, name, known, evidence.n_valid)
    start, stop = slice_bounds(pipeline, name, latent_slice)
    relations = _relate(sae, start, stop, sample, tokenizer, _at(unembedding, pipeline.config.sae(name).targets[0]))
    tokens = TokenOrder(order_tokens((shard.tokens.token_ids for shard in evidence.shards), len(tokenizer)))
    offsets, n_examples = [0], 0
    with create_current(store, ref, kept) as art:
        with art.open(RECORDS, n_rows=stop - start) as sink, create_table(art, FEATURES, FEATURE_SCHEMA) as table, ThreadPoolExecutor() as pool:
            for first in range(start, stop, GROUP_LATENTS):
                last = min(first + GROUP_LATENTS, stop)
                groups = read_examples(evidence.examples, evidence.shards, first, last)
                records = [_make_record(evidence, relations, latent, examples) for latent, examples in enumerate(groups, first)]
                for data in pool.map(partial(pack_record, tokens=tokens), records):
                    sink.write(data)
                    offsets.append(offsets[-1] + len(data))
                n_examples += _append_rows(table, records, evidence, relations)
                if progress:
                    progress(last - first)
        art.put(ORDER, tokens.order.astype("<u4").tobytes(), n_rows=len(tokens.order))
        art.put(INDEX, np.array(offsets, "<u8").tobytes(), n_rows=stop - start + 1)
        art.facts |= {
            "start": start,
            "stop": stop,
            "n_live": int((evidence.statistics.count > 0).sum()),
            "n_rows": evidence.n_valid,
            "n_examples": n_examples,
            "bytes_per_feature": round(offsets[-1] / max(1, stop - start), 1),
            "logits_reason": relations.logits_reason,
            "coactivation_rows": len(sample.offsets) - 1,
        }
    return art.produced


class _Evidence(NamedTuple):
    """What the earlier passes found about the latents of one slice."""

    statistics: LatentStatistics
    quantiles: NDArray[np.float64]
    """Rounded; NaN for dead latents."""
    edges: list[float]
    """Edges of the histogram's bins."""
    n_valid: int
    examples: LatentTable
    shards: list[DatasetShard]


class _Relations(NamedTuple):
    """What weights and co-firing tell about the latents of one slice."""

    start: int
    effects: LogitEffects | None
    logits_reason: str | None
    neighbours: Neighbours
    coactivations: Coactivations
    decoder_norms: NDArray[np.float32]
    token_text: Callable[[int], str]


def _load_evidence(pipeline: Pipeline, store: Store, name: str, latent_slice: int, known: Digests) -> _Evidence:
    ref = examples_ref(pipeline, name, latent_slice)
    manifest = load_current(store, [examples_lineage(pipeline, name, latent_slice)], known)[0]
    tensors = load_tensors(store, ref.path, manifest, STATISTICS)
    lineages = [windows_lineage(pipeline, name, index) for index in pipeline.shard_indices]
    found = load_current(store, lineages, known)
    windows = [LatentTable(store, item[0].ref.path, each, WINDOWS) for item, each in zip(lineages, found, strict=True)]
    shards = [
        DatasetShard(index, load_tokens(pipeline, store, index), load_documents(pipeline, store, index).sources, table)
        for index, table in zip(pipeline.shard_indices, windows, strict=True)
    ]
    return _Evidence(
        as_statistics(manifest.facts["start"], tensors),
        round_significant(tensors["quantiles"].numpy()),
        round_significant(bin_edges(manifest.facts["histogram_origin"])).tolist(),
        manifest.facts["n_valid"],
        LatentTable(store, ref.path, manifest, EXAMPLES),
        shards,
    )


def _load_sample(pipeline: Pipeline, store: Store, name: str, known: Digests, n_valid: int) -> FiringSample:
    """Read the sampled firings of all slices and shards, at the rate that every shard offers. Raises `InputError` when nothing fires."""
    slices = range(pipeline.config.features.latent_slices)
    lineages = [candidates_lineage(pipeline, name, index, latent_slice) for index in pipeline.shard_indices for latent_slice in slices]
    manifests = load_current(store, lineages, known)
    config = pipeline.config.sae(name)
    if not any(manifest.facts["n_firings"] for manifest in manifests):
        raise InputError(
            f"No latent of SAE {name!r} fires on any of the {n_valid:,} valid rows: there is nothing to show. Train it again with a lower "
            f"sparsity_coefficient (now {config.sparsity_coefficient:g}), a larger k (now {config.k}) or a lower learning_rate."
        )
    rate = min([COACTIVATION_ROWS / max(1, n_valid), *(manifest.facts["sample_rate"] for manifest in manifests)])
    latents, row_ids = [], []
    for item, manifest in zip(lineages, manifests, strict=True):
        columns = LatentTable(store, item[0].ref.path, manifest, SAMPLE).read(0, config.d_sae)
        is_kept = in_sample(columns["row_id"], rate, pipeline.config.seed)
        latents.append(columns["latent"][is_kept].astype(np.int64))
        row_ids.append(columns["row_id"][is_kept])
    return make_sample(np.concatenate(latents), np.concatenate(row_ids), config.d_sae)


def _at(unembedding: Unembedding, hook_point: str) -> Unembedding:
    """Return the way from a hook point to the logits: none from a module that is not known to write to the residual stream, whatever its width."""
    path = hook_point.removeprefix(MODULE)
    is_on_stream = hook_point.partition(".")[0] in STREAM_KINDS if path == hook_point else path in unembedding.residual_modules
    if unembedding.matrix is None or is_on_stream:
        return unembedding
    return Unembedding(None, f"a direction moves the logits only on the residual stream, and {path} is not known to write to it")


def _relate(sae: Sae, start: int, stop: int, sample: FiringSample, tokenizer: PreTrainedTokenizerBase, unembedding: Unembedding) -> _Relations:
    reason, effects = unembedding.reason or None, None
    if unembedding.matrix is not None and unembedding.matrix.shape[0] != sae.d_out:
        reason = f"the hook point has {sae.d_out} dimensions, the residual stream {unembedding.matrix.shape[0]}"
    elif unembedding.matrix is not None:
        used = used_token_ids(tokenizer, unembedding.matrix.shape[1])
        effects = measure_logits(sae.W_dec[start:stop], unembedding.matrix, used)
    return _Relations(
        start,
        effects,
        reason,
        find_neighbours(sae.W_dec, start, stop),
        find_coactivations(sample, start, stop),
        torch.linalg.vector_norm(sae.W_dec[start:stop], dim=1).numpy(),
        lru_cache(maxsize=None)(lambda token_id: str(tokenizer.decode([token_id]))),
    )


def _make_record(evidence: _Evidence, relations: _Relations, latent: int, examples: list[Example]) -> dict[str, Any]:
    """Return the record of one latent, as in docs/formats/feature_record.md."""
    i = latent - relations.start
    count = int(evidence.statistics.count[i])
    mean, maximum, frequency = round_significant(
        np.array([evidence.statistics.mean[i], evidence.statistics.maximum[i], count / max(1, evidence.n_valid)])
    ).tolist()
    quantiles = evidence.quantiles[i].tolist() if count else []
    return {
        "version": RECORD_VERSION,
        "latent": latent,
        "is_dead": count == 0,
        "statistics": {
            "count": count,
            "frequency": frequency,
            "mean": mean,
            "max": maximum,
            "quantiles": quantiles,
            "histogram": _make_histogram(evidence, i),
        },
        "examples": {
            "top": _list_windows(examples, TOP, by_strength=True),
            "intervals": [
                {"low": low, "high": high, "examples": _list_windows(inside, INTERVAL)}
                for j, (low, high) in enumerate(pairwise(quantiles))
                if (inside := [example for example in examples if example.interval == j])
            ],
            "random": _list_windows(examples, RANDOM)[:SHOWN_RANDOM],
        },
        "logits": _make_logits(relations.effects, i),
        "logits_reason": relations.logits_reason,
        "neighbours": _pairs(relations.neighbours.latents[i], relations.neighbours.cosines[i]),
        "coactivations": _make_coactivations(relations.coactivations, i),
    }


def _list_windows(examples: list[Example], kind: int, *, by_strength: bool = False) -> list[dict[str, Any]]:
    chosen = [example for example in examples if example.kind & kind]
    return [example.window for example in sorted(chosen, key=lambda example: (-example.activation if by_strength else 0.0, example.rank))]


def _make_histogram(evidence: _Evidence, i: int) -> dict[str, Any]:
    counts = evidence.statistics.histogram[i]
    occupied = np.flatnonzero(counts)
    if len(occupied) == 0:
        return {"edges": [], "counts": []}
    low, high = int(occupied[0]), int(occupied[-1]) + 1
    return {"edges": evidence.edges[low : high + 1], "counts": counts[low:high].tolist()}


def _make_logits(effects: LogitEffects | None, i: int) -> dict[str, Any] | None:
    if effects is None:
        return None
    low, high = round_significant(np.array([effects.low[i], effects.high[i]])).tolist()
    return {
        "top": _pairs(effects.top_ids[i], effects.top[i]),
        "bottom": _pairs(effects.bottom_ids[i], effects.bottom[i]),
        "histogram": {"low": low, "high": high, "counts": effects.histogram[i].tolist()},
    }


def _make_coactivations(found: Coactivations, i: int) -> list[list[Any]]:
    mine = slice(found.offsets[i], found.offsets[i + 1])
    columns = (found.partners[mine].tolist(), round_significant(found.cosines[mine]).tolist(), found.rows[mine].tolist())
    return [list(entry) for entry in zip(*columns, strict=True)]


def _pairs(indices: NDArray[np.int64], values: NDArray[np.float32]) -> list[list[Any]]:
    return [list(pair) for pair in zip(indices.tolist(), round_significant(values).tolist(), strict=True)]


def _append_rows(table: TableWriter, records: list[dict[str, Any]], evidence: _Evidence, relations: _Relations) -> int:
    """Append one row of `features.parquet` for each record; return the number of windows in them."""
    rows = slice(records[0]["latent"] - relations.start, records[-1]["latent"] - relations.start + 1)
    statistics, text = evidence.statistics, relations.token_text
    count = statistics.count[rows]
    top_tokens = [
        [text(token_id) for token_id in dict.fromkeys(window["tokens"][window["peak"]] for window in record["examples"]["top"])] for record in records
    ]
    n_windows = [sum(1 for _ in _iter_windows(record)) for record in records]
    table.append(
        {
            "latent": np.array([record["latent"] for record in records], np.uint32),
            "is_dead": count == 0,
            "count": count,
            "frequency": count / max(1, evidence.n_valid),
            "mean": statistics.mean[rows].astype(np.float32),
            "max": statistics.maximum[rows],
            "top_token": [tokens[0] if tokens else "" for tokens in top_tokens],
            "top_tokens": top_tokens,
            "top_logits": [[text(token_id) for token_id, _ in (record["logits"] or {}).get("top", [])] for record in records],
            "bottom_logits": [[text(token_id) for token_id, _ in (record["logits"] or {}).get("bottom", [])] for record in records],
            "n_examples": np.array(n_windows, np.uint32),
            "decoder_norm": relations.decoder_norms[rows],
        }
    )
    return sum(n_windows)


def _iter_windows(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    examples = record["examples"]
    yield from examples["top"]
    for interval in examples["intervals"]:
        yield from interval["examples"]
    yield from examples["random"]
