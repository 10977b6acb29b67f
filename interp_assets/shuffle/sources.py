"""What a job reads: the valid rows of activation shards, or ranges of the split files of the pass before.

Everything that can be wrong with an input is found here, before a row is moved: rows that differ from the manifest, the token shard or the
plan, job files that are missing (all of them are named), ranges that leave their file or do not add up to the bucket.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from interp_assets.corpus.tokens import load_tokens
from interp_assets.errors import ArtifactCorruptError, ArtifactError, ArtifactMissingError
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.harvest.rows import ROWS as ACTIVATION_ROWS
from interp_assets.planning.pipeline import SHARD_SHIFT, Pipeline, shard_key
from interp_assets.planning.progress import format_count
from interp_assets.shuffle.plan import ShardRows, ShufflePlan, row_format
from interp_assets.shuffle.refs import bucket_key, list_splits
from interp_assets.shuffle.rows import READERS, RawRows, Records, RowFormat, Segment, fill
from interp_assets.shuffle.sizes import offsets
from interp_assets.storage.manifest import ArtifactRef, FilePart, Manifest, file_part, load_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import read_spans

SPLIT_ROWS: Final = "rows.bin"
Taken = TypeVar("Taken")


class InputRange(NamedTuple):
    """Rows [start, stop) of input bucket `bucket` of pass `pass_index`."""

    pass_index: int
    bucket: int
    start: int
    stop: int


def load_shards(pipeline: Pipeline, store: Store, hook_point: str, shards: Sequence[ShardRows], buffer: NDArray[np.uint8]) -> RawRows:
    """Read the activation shards of several training shards into `buffer`, one after the other, and find their valid rows.

    `buffer` holds all rows of the shards, valid or not (flat bytes). Raises `ArtifactMissingError` naming all shards that are missing, and
    `ArtifactCorruptError` for rows that differ from what the token shard and the plan say.
    """
    fmt = row_format(pipeline, hook_point)
    refs = [activation_shard_ref(pipeline, hook_point, shard.shard_index) for shard in shards]
    manifests = load_manifests(store, refs, f"the shuffle of {hook_point}", "`activations`")
    starts = offsets([shard.n_rows for shard in shards])
    segments: list[Segment] = []
    kept, row_ids = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for shard, ref, manifest, start in zip(shards, refs, manifests, starts[:-1], strict=True):
        span = read_spans(store, ref.path, manifest, ACTIVATION_ROWS)["rows"]
        if (span.shape, span.dtype) != ((shard.n_rows, fmt.d_in), fmt.dtype):
            raise ArtifactCorruptError(
                f"Activation shard {shard.shard_index} of {hook_point} has {span.shape[0]:,} rows of {span.shape[1:]} x {span.dtype}; its token "
                f"shard and the pipeline's plan say {shard.n_rows:,} of ({fmt.d_in},) x {fmt.dtype} "
                f"({store.url}/{ref.path}). Re-materialize this partition."
            )
        segments.append(Segment(file_part(ref.path, manifest.file(ACTIVATION_ROWS), span.start, span.n_bytes), start * fmt.row_bytes))
        valid = np.flatnonzero(_load_valid(pipeline, store, shard))
        kept.append(valid + start)
        row_ids.append(valid.astype(np.uint64) + np.uint64(shard.shard_index << SHARD_SHIFT))
    fill(store, segments, buffer)
    return RawRows(buffer.reshape(starts[-1], fmt.row_bytes), np.concatenate(kept), np.concatenate(row_ids))


def load_records(pipeline: Pipeline, store: Store, hook_point: str, plan: ShufflePlan, wanted: InputRange, buffer: NDArray[np.uint8]) -> Records:
    """Read rows of an input bucket of pass >= 2 into `buffer` (flat bytes): the concatenation of its ranges in the files of the pass before.

    Raises `ArtifactMissingError` naming every job file that is missing, and `ArtifactCorruptError` when the ranges do not add up.
    """
    fmt = row_format(pipeline, hook_point)
    parent, part = divmod(wanted.bucket, plan.sizes.fan_out)
    reader = f"{bucket_key(wanted.bucket)} of {hook_point}"
    refs = list_splits(pipeline, hook_point, plan.sizes, wanted.pass_index - 1, parent)

    def find_range(ref: ArtifactRef, manifest: Manifest) -> FilePart:
        low, high = split_range(store, ref, manifest, part, fmt)
        return file_part(ref.path, manifest.file(SPLIT_ROWS), low * fmt.record_bytes, (high - low) * fmt.record_bytes)

    ranges = read_manifests(store, refs, reader, f"pass {wanted.pass_index - 1} of the shuffle", find_range)
    ends = offsets([item.n_bytes // fmt.record_bytes for item in ranges])
    expected = plan.sizes.input_rows(wanted.pass_index, wanted.bucket)
    if ends[-1] != expected:
        raise ArtifactCorruptError(
            f"The files of pass {wanted.pass_index - 1} in {store.url} hold {ends[-1]:,} rows for {reader}; the plan says {expected:,}. "
            "Run `interp verify` on that pass's folder, delete what it names and materialize it again."
        )
    segments: list[Segment] = []
    for item, (first, end) in zip(ranges, pairwise(ends), strict=True):
        begin, close = max(first, wanted.start), min(end, wanted.stop)
        if begin < close:
            cut = item._replace(start=item.start + (begin - first) * fmt.record_bytes, n_bytes=(close - begin) * fmt.record_bytes)
            segments.append(Segment(cut, (begin - wanted.start) * fmt.record_bytes))
    turn = wanted.bucket % max(1, len(segments))  # each bucket starts at another file: no object is asked by all jobs at once
    fill(store, segments[turn:] + segments[:turn], buffer)
    return Records(buffer.reshape(wanted.stop - wanted.start, fmt.record_bytes))


def load_manifests(store: Store, refs: Sequence[ArtifactRef], reader: str, makers: str) -> list[Manifest]:
    """Read several manifests and hold them all. Raises like `read_manifests`."""
    return read_manifests(store, refs, reader, makers, lambda _, manifest: manifest)


def read_manifests(
    store: Store, refs: Sequence[ArtifactRef], reader: str, makers: str, take: Callable[[ArtifactRef, Manifest], Taken]
) -> list[Taken]:
    """Read several manifests, a few at once, and keep what `take` takes from each, in order: those of split files are large.

    Raises `ArtifactMissingError` that names all that cannot be read, who needs them and what makes them; what `take` raises passes.
    """

    def read(ref: ArtifactRef) -> Taken | ArtifactError:
        try:
            manifest = load_manifest(store, ref)
        except ArtifactError as error:
            return error
        return take(ref, manifest)

    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(read, refs))
    missing = [f"  {item}" for item in found if isinstance(item, ArtifactError)]
    if missing:
        more = f"\n  ... and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ArtifactMissingError(
            f"{len(missing)} of {format_count(len(refs), 'file')} that {reader} needs cannot be read:\n"
            + "\n".join(missing[:10])
            + more
            + f"\nMaterialize these partitions of {makers}, then this one again."
        )
    return [item for item in found if not isinstance(item, ArtifactError)]


def split_range(store: Store, ref: ArtifactRef, manifest: Manifest, part: int, fmt: RowFormat) -> tuple[int, int]:
    """Return the records [start, stop) for output bucket `part` in a job's file.

    Raises `ArtifactCorruptError` for ranges that the file cannot hold.
    """
    ranges = manifest.facts.get("ranges", [])
    n_bytes = manifest.file(SPLIT_ROWS).n_bytes
    if len(ranges) <= part + 1 or ranges[0] != 0 or sorted(ranges) != ranges or ranges[-1] * fmt.record_bytes != n_bytes:
        raise ArtifactCorruptError(
            f"{store.url}/{ref.path} lists ranges {ranges[:5]}{' ...' if len(ranges) > 5 else ''} of {fmt.record_bytes}-byte records in a file of "
            f"{n_bytes:,} bytes: range {part} is missing, out of order or past the end. Delete this folder and re-materialize the partition."
        )
    return ranges[part], ranges[part + 1]


def _load_valid(pipeline: Pipeline, store: Store, shard: ShardRows) -> NDArray[np.bool_]:
    """Read which rows of a token shard are valid; their number must be the plan's."""
    valid = load_tokens(pipeline, store, shard.shard_index).valid
    found = (len(valid), int(valid.sum()))
    if found != (shard.n_rows, shard.n_valid):
        raise ArtifactCorruptError(
            f"The token shard of {shard_key(shard.shard_index)} has {found[0]:,} rows, {found[1]:,} of them valid; the shuffle plan says "
            f"{shard.n_rows:,} and {shard.n_valid:,}. Re-materialize that token shard, then `shuffle_plan`."
        )
    return valid
