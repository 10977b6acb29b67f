"""Mixed shards are opened, and any range of their rows is read with the row ids: what a trainer sees of the shuffle.

A mixed shard is one safetensors file (`docs/formats/mixed_shard.md`): `rows [n, d_in]`, then `row_ids uint64 [n]`. The shards of a hook
point are the buckets 0, 1, ... of the shuffle; read one after the other they are one uniform permutation of all valid rows of the
training shards. Where a tensor lies follows from the manifest alone, so opening costs one small read a shard and no data.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt64
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.errors import ArtifactCorruptError, ArtifactError, ArtifactMissingError
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import Advance, unheard
from interp_assets.shuffle.multiset import MultisetHash, hash_rows
from interp_assets.shuffle.refs import bucket_key, mixed_shard_ref, n_mixed_shards
from interp_assets.shuffle.rows import RowFormat
from interp_assets.storage.manifest import ArtifactRef, ArtifactWriter, Manifest, load_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import TensorSpan, TensorSpec, as_bytes, make_header, parse_header, read_rows, save_stream

ROWS: Final = "rows.safetensors"


class MixedShard(NamedTuple):
    """One published mixed shard: its bucket, address and manifest, and where its two tensors lie in the file."""

    bucket: int
    ref: ArtifactRef
    manifest: Manifest
    n_rows: int
    d_in: int
    dtype: str
    rows: TensorSpan
    row_ids: TensorSpan


class MixedRows(NamedTuple):
    """Consecutive rows of a mixed shard, in the stored dtype, and the row id of each."""

    rows: Shaped[Tensor, "n d_in"]
    row_ids: UInt64[Tensor, "n"]


def open_mixed(pipeline: Pipeline, store: Store, hook_point: str) -> list[MixedShard]:
    """Open all mixed shards of a hook point, in order of bucket.

    Raises `ArtifactMissingError` that names every bucket which is not there or not readable.
    """
    shards: list[MixedShard] = []
    missing: list[str] = []
    for bucket in range(n_mixed_shards(pipeline)):
        ref = mixed_shard_ref(pipeline, hook_point, bucket)
        try:
            shards.append(make_mixed_shard(store, bucket, ref, load_manifest(store, ref)))
        except ArtifactError as error:
            missing.append(f"  {bucket_key(bucket)}: {error}")
    if missing:
        raise ArtifactMissingError(
            f"{len(missing)} of {n_mixed_shards(pipeline)} mixed shards of {hook_point} cannot be read:\n"
            + "\n".join(missing[:10])
            + "\nMaterialize `mixed_shards` for these buckets."
        )
    return shards


def make_mixed_shard(store: Store, bucket: int, ref: ArtifactRef, manifest: Manifest) -> MixedShard:
    """Describe a mixed shard from its manifest. Raises `ArtifactCorruptError` when its facts and its file disagree."""
    try:
        n_rows, d_in, dtype = int(manifest.facts["n_rows"]), int(manifest.facts["d_in"]), str(manifest.facts["dtype"])
    except (KeyError, ValueError) as error:
        raise ArtifactCorruptError(f"The manifest of {store.url}/{ref.path} lacks the fact {error}. Re-materialize this bucket.") from error
    specs = mixed_specs(n_rows, d_in, dtype)
    spans = parse_header(make_header(specs), f"{store.url}/{ref.path}/{ROWS}")
    found, expected = manifest.file(ROWS).n_bytes, spans["row_ids"].start + spans["row_ids"].n_bytes
    if found != expected:
        raise ArtifactCorruptError(
            f"{store.url}/{ref.path}/{ROWS} has {found:,} bytes by its manifest; {n_rows:,} rows of {d_in} x {dtype} need {expected:,}. "
            "Re-materialize this bucket."
        )
    return MixedShard(bucket, ref, manifest, n_rows, d_in, dtype, spans["rows"], spans["row_ids"])


def read_mixed_rows(store: Store, shard: MixedShard, start: int, stop: int) -> MixedRows:
    """Read and verify rows [start, stop) of a mixed shard. Raises `ArtifactCorruptError` for a range past the shard's end."""
    if not 0 <= start <= stop <= shard.n_rows:
        raise ArtifactCorruptError(f"{store.url}/{shard.ref.path} has {shard.n_rows:,} rows; rows {start:,} to {stop:,} were asked for.")
    rows = read_rows(store, shard.ref.path, shard.manifest, ROWS, shard.rows, start, stop)
    return MixedRows(rows, read_rows(store, shard.ref.path, shard.manifest, ROWS, shard.row_ids, start, stop))


def read_mixed_ids(store: Store, shard: MixedShard, start: int, stop: int) -> NDArray[np.uint64]:
    """Read and verify the row ids of rows [start, stop) of a mixed shard."""
    return read_rows(store, shard.ref.path, shard.manifest, ROWS, shard.row_ids, start, stop).numpy()


def mixed_specs(n_rows: int, d_in: int, dtype: str) -> dict[str, TensorSpec]:
    """Return the two tensors of a mixed shard, in the order of the file."""
    return {"rows": TensorSpec(dtype, (n_rows, d_in)), "row_ids": TensorSpec("uint64", (n_rows,))}


def save_mixed(
    art: ArtifactWriter, parts: Iterable[tuple[NDArray[np.uint64], NDArray[np.uint8]]], n_rows: int, fmt: RowFormat, progress: Advance = unheard
) -> None:
    """Stream a mixed shard's file from parts of row ids and rows `[n, row_bytes]`: all rows, hashed as they pass, then all ids."""
    row_ids: list[NDArray[np.uint64]] = []
    rows_hash = MultisetHash()

    def stream_rows() -> Iterator[memoryview]:
        nonlocal rows_hash
        for ids, rows in parts:
            row_ids.append(ids)
            rows_hash = rows_hash.merge(hash_rows(ids, rows))
            yield rows.reshape(-1).data
            progress(len(ids))

    stream = chain(stream_rows(), (as_bytes(ids) for ids in row_ids))
    save_stream(art, ROWS, mixed_specs(n_rows, fmt.d_in, fmt.dtype), stream, n_rows=n_rows)
    art.facts |= {"n_rows": n_rows, "d_in": fmt.d_in, "dtype": fmt.dtype, "multiset_hash": rows_hash.encode()}
