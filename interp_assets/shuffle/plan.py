"""The training shards' row counts become the shuffle's plan: sizes of all passes and, while they are small, the count tables.

The plan needs only the token shards' manifests, so it exists before any activation does, and one plan serves all hook points. Jobs take
their sizes from it and draw their own row of the tables; the plan's copy is for people, and to notice a machine that draws differently.

Whether a job fits the memory is checked here, before any work: `shuffle.memory_bytes` bounds what grows with the rows of a job (its rows,
their ids and the order's working space, `job_bytes`); `rows.FIXED_BYTES` come on top. What the numbers of passes cost is `estimate.py`'s.
Format: `docs/formats/shuffle_plan.md`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import ArtifactCorruptError, ArtifactError, ArtifactMissingError, PlanError
from interp_assets.planning.pipeline import Pipeline, shard_key
from interp_assets.shuffle.generations import newest
from interp_assets.shuffle.hypergeometric import count_table
from interp_assets.shuffle.permutation import Draws
from interp_assets.shuffle.refs import shape_of, shuffle_plan_ref, split_bucket_ref
from interp_assets.shuffle.rows import SORT_BYTES, RowFormat
from interp_assets.shuffle.sizes import ShuffleSizes, smallest_fan_out
from interp_assets.storage.manifest import ArtifactRef, Produced, create_artifact, find_made_from, load_manifest, read_file, timed
from interp_assets.storage.store import Store

PLAN: Final = "plan.json"
FORMAT: Final = "interp-assets/shuffle_plan"
VERSION: Final = 1
MAX_TABLE_ENTRIES: Final = 1 << 20
"""Count tables of a pass with more entries are left out of the plan; jobs draw their rows anyway."""


class ShardRows(NamedTuple):
    """The rows of one training shard: all token positions, and the valid ones, which are shuffled."""

    shard_index: int
    n_rows: int
    n_valid: int


@dataclass(frozen=True, kw_only=True)
class ShufflePlan:
    """A loaded plan."""

    seed: int
    shards: tuple[ShardRows, ...]
    sizes: ShuffleSizes
    counts: list[list[NDArray[np.int64]] | None]
    """For each distributing pass the table of every input bucket, or None when it is too large to be listed."""

    def job(self, shard_index: int) -> int:
        """Return the job of pass 1 that a training shard is. Raises `PlanError` for any other shard."""
        for job, shard in enumerate(self.shards):
            if shard.shard_index == shard_index:
                return job
        raise PlanError(
            f"{shard_key(shard_index)} is not in the shuffle plan, which has {len(self.shards)} training shards "
            f"({shard_key(self.shards[0].shard_index)} to {shard_key(self.shards[-1].shard_index)}); held-out shards are not shuffled."
        )


@timed
def make_shuffle_plan(pipeline: Pipeline, store: Store) -> Produced:
    """Write the shuffle's plan from the row counts of the training shards.

    Raises `PlanError` when a job would not fit `shuffle.memory_bytes`, naming the knobs and values that work, and `ArtifactMissingError`
    that names all token shards which are missing.
    """
    ref = shuffle_plan_ref(pipeline)
    shards = load_shard_rows(pipeline, store)
    sizes = make_sizes(pipeline, shards)
    if problem := explain_memory(pipeline, shards, sizes):
        raise PlanError(problem)
    manifests = [load_manifest(store, token_shard_ref(pipeline, index)) for index in pipeline.train_indices]
    if (manifest := find_made_from(store, ref, manifests)) is not None:
        return Produced(ref, manifest, is_cached=True)
    with create_artifact(store, ref, made_from=manifests) as art:
        content = make_content(pipeline.config.seed, shards, sizes)
        art.put(PLAN, encode_plan(content))
        art.facts |= {
            "n_rows": sizes.n_rows,
            "n_shards": len(shards),
            "passes": sizes.passes,
            "fan_out": sizes.fan_out,
            "n_mixed_shards": sizes.n_buckets,
            "largest_shard_rows": max(sizes.shard_rows),
            "largest_mixed_shard_rows": sizes.largest_bucket_rows,
        }
    return art.produced


def load_shuffle_plan(pipeline: Pipeline, store: Store) -> ShufflePlan:
    """Read and verify the shuffle's plan. Raises `ArtifactMissingError` before it was made."""
    ref = shuffle_plan_ref(pipeline)
    manifest = load_manifest(store, ref)
    return decode_plan(read_file(store, ref.path, manifest, PLAN), f"{store.url}/{ref.path}/{PLAN}")


def load_shard_rows(pipeline: Pipeline, store: Store) -> tuple[ShardRows, ...]:
    """Read the row counts of all training shards from their manifests."""
    shards: list[ShardRows] = []
    missing: list[str] = []
    for index in pipeline.train_indices:
        try:
            facts = load_manifest(store, token_shard_ref(pipeline, index)).facts
            shards.append(ShardRows(index, int(facts["n_rows"]), int(facts["n_valid"])))
        except (ArtifactError, KeyError) as error:
            missing.append(f"  {shard_key(index)}: {error}")
    if missing:
        raise ArtifactMissingError(
            f"The row counts of {len(missing)} of {len(pipeline.train_indices)} token shards cannot be read:\n"
            + "\n".join(missing[:10])
            + "\nMaterialize `token_shards` for these partitions."
        )
    if sum(shard.n_valid for shard in shards) == 0:
        raise PlanError(
            f"Pipeline {pipeline.config.name!r} has no row to shuffle: {len(shards)} training shards besides "
            f"{len(pipeline.held_out_indices)} held-out ones. Lower `corpus.held_out_shards`, or give it more text."
        )
    return tuple(shards)


def make_sizes(pipeline: Pipeline, shards: Sequence[ShardRows]) -> ShuffleSizes:
    """Return the sizes of all passes. Raises like `shape_of`."""
    passes, fan_out = shape_of(pipeline)
    return ShuffleSizes(passes=passes, fan_out=fan_out, shard_rows=tuple(shard.n_valid for shard in shards))


def row_formats(pipeline: Pipeline) -> list[RowFormat]:
    """Return the row format of every hook point."""
    return [row_format(pipeline, hook_point) for hook_point in pipeline.config.harvest.hook_points]


def row_format(pipeline: Pipeline, hook_point: str) -> RowFormat:
    """Return the row format of one hook point."""
    return RowFormat(pipeline.d_in(hook_point), pipeline.config.harvest.dtype)


def job_bytes(n_rows: int, fmt: RowFormat) -> int:
    """Return what a job of `n_rows` holds in memory that grows with its rows."""
    return n_rows * (fmt.record_bytes + SORT_BYTES)


def explain_memory(pipeline: Pipeline, shards: Sequence[ShardRows], sizes: ShuffleSizes) -> str:
    """Say why a job cannot fit `shuffle.memory_bytes`, naming each knob and a value that works; empty when all jobs fit."""
    shuffle, corpus = pipeline.config.shuffle, pipeline.config.corpus
    fmt = max(row_formats(pipeline), key=lambda item: item.record_bytes)
    limit = shuffle.memory_bytes // job_bytes(1, fmt)
    largest_shard = max(shard.n_rows for shard in shards) if sizes.passes > 1 else 0
    largest_bucket = sizes.largest_bucket_rows if sizes.passes > 1 else sum(shard.n_rows for shard in shards)
    needed = job_bytes(max(largest_shard, largest_bucket), fmt)
    problems: list[str] = []
    if largest_bucket > limit:
        problems.append(
            f"a mixed shard of {largest_bucket:,} rows needs {job_bytes(largest_bucket, fmt):,} bytes: {_fan_out_advice(pipeline, sizes, limit)}"
        )
    if largest_shard > limit:
        knob = "documents_per_shard" if corpus.source == "huggingface" else "shard_bytes"
        value = max(1, getattr(corpus, knob) * limit // largest_shard)
        problems.append(
            f"a training shard of {largest_shard:,} rows needs {job_bytes(largest_shard, fmt):,} bytes: cut the corpus finer "
            f"(`corpus.{knob}`, about {value:,})"
        )
    if not problems:
        return ""
    return (
        f"The shuffle of pipeline {pipeline.config.name!r} does not fit shuffle.memory_bytes = {shuffle.memory_bytes:,} "
        f"({fmt.record_bytes + SORT_BYTES:,} bytes a row with its id and the sort): "
        + "; ".join(problems)
        + f"; or set shuffle.memory_bytes to {needed:,} or more."
    )


def make_content(seed: int, shards: Sequence[ShardRows], sizes: ShuffleSizes) -> dict[str, Any]:
    """Return the plan as plain data."""
    draws = Draws(seed)
    return {
        "format": FORMAT,
        "version": VERSION,
        "seed": seed,
        "passes": sizes.passes,
        "fan_out": sizes.fan_out,
        "n_rows": sizes.n_rows,
        "n_mixed_shards": sizes.n_buckets,
        "shards": [shard._asdict() for shard in shards],
        "distributing_passes": [_pass_content(sizes, draws, pass_index) for pass_index in range(1, sizes.passes)],
    }


def encode_plan(content: dict[str, Any]) -> bytes:
    """Serialise a plan: canonical JSON, one line a key of the top level."""
    lines = [f" {json.dumps(key)}: {json.dumps(value, separators=(', ', ': '))}" for key, value in content.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def decode_plan(data: bytes, where: str) -> ShufflePlan:
    """Parse a plan; `where` names it in messages. Raises `ArtifactCorruptError`."""
    try:
        content = json.loads(data)
        found = (content["format"], content["version"])
        shards = tuple(ShardRows(**shard) for shard in content["shards"])
        sizes = ShuffleSizes(passes=content["passes"], fan_out=content["fan_out"], shard_rows=tuple(shard.n_valid for shard in shards))
        listed = [item["counts"] for item in content["distributing_passes"]]
        counts = [None if tables is None else [np.array(table, np.int64) for table in tables] for tables in listed]
        plan = ShufflePlan(seed=content["seed"], shards=shards, sizes=sizes, counts=counts)
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactCorruptError(f"{where} is not a shuffle plan ({error}). Materialize `shuffle_plan` again.") from error
    if found != (FORMAT, VERSION):
        raise ArtifactCorruptError(f"{where} is {found}, this release reads {(FORMAT, VERSION)}. Materialize `shuffle_plan` again.")
    return plan


def _pass_content(sizes: ShuffleSizes, draws: Draws, pass_index: int) -> dict[str, Any]:
    inputs = range(sizes.n_inputs(pass_index))
    jobs = [len(sizes.job_rows(pass_index, bucket)) for bucket in inputs]
    counts = None
    if sum(jobs) * sizes.fan_out <= MAX_TABLE_ENTRIES:
        counts = [
            count_table(partial(draws.stream, "counts", pass_index, bucket), sizes.job_rows(pass_index, bucket), sizes.capacities(pass_index, bucket))
            for bucket in inputs
        ]
    return {"pass": pass_index, "input_buckets": len(inputs), "jobs": sum(jobs), "counts": None if counts is None else [t.tolist() for t in counts]}


def _fan_out_advice(pipeline: Pipeline, sizes: ShuffleSizes, limit: int) -> str:
    """Say what makes mixed shards of at most `limit` rows."""
    if pipeline.config.shuffle.stated is None:
        return "its passes and fan-out were chosen for more memory, and stay while nothing else is stated"
    auto = "leave out both `shuffle.passes` and `shuffle.fan_out`, so that they are chosen"
    if not limit:
        return auto
    passes = max(2, sizes.passes)
    fan_out = smallest_fan_out(sizes.n_rows, limit, passes)
    if sizes.passes == 1:
        return f"set shuffle.passes to 2 and shuffle.fan_out to {fan_out}, or {auto}"
    return f"raise shuffle.fan_out from {sizes.fan_out} to {fan_out} (or add a pass), or {auto}"


def split_bucket_refs(pipeline: Pipeline, store: Store, pass_index: int, bucket: int) -> list[ArtifactRef]:
    """Address the output of all jobs on a bucket in a middle pass, by hook point and job. Raises `ArtifactMissingError` without token shards."""
    own = newest(pipeline)
    n_jobs = len(make_sizes(own, load_shard_rows(own, store)).job_rows(pass_index, bucket))
    return [split_bucket_ref(pipeline, name, pass_index, bucket, job) for name in pipeline.config.harvest.hook_points for job in range(n_jobs)]
