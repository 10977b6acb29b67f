"""Rows, latents and a machine become the cost of the four passes: jobs, bytes, time, and the best number of latent slices. Pure arithmetic.

    pass A   jobs  D shards x P slices       products 2 d F N; each job reads its shard of rows and its slice of columns: d (P N + D F) values
    pass B         P                         reads the candidates and, with `keep: all`, every firing's activation
    pass C         D                         `keep: all`: looks windows up; else reads the rows once more and multiplies W rows a window
    pass D         P                         neighbours 2 d F^2, logit effects 2 d F V

More slices mean smaller jobs and more reading of the same rows: every job of a shard reads all of it. So the best number is the smallest
whose jobs fit the memory and give every worker something to do; from there on time only grows. A worker is bound by its products, not
by its reads, when its slice has more than (operations a second) / (values read a second) / 2 latents, whatever d is.

What is assumed and not counted: each latent fires equally often, which overstates the candidates (real frequencies are log-normal, and
rare latents have few); `l0` firings a row. Bytes and nanoseconds a firing are measured (benchmarks/results).
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

from interp_assets.errors import PlanError
from interp_assets.planning.config import FeaturesConfig
from interp_assets.planning.machine import Machine

FIRING_BYTES: Final = 4.8
"""A firing in `firings.parquet`."""
CANDIDATE_BYTES: Final = 6.0
"""A candidate in `candidates.parquet`."""
WINDOW_BYTES: Final = 40.0
"""A window in `windows.parquet`."""
RECORD_BYTES: Final = 7000.0
"""A record, compressed."""
_COLUMN_BYTES: Final = 5
"""A weight in a job's memory: float32, and its digit."""
KEPT_BYTES: Final = 13
"""A candidate in a job's memory."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is visualized."""

    n_rows: int
    n_shards: int
    d_in: int
    d_sae: int
    l0: float
    """Latents that fire on a row, in the mean."""
    row_bytes: int
    """Bytes of a stored row."""
    vocabulary_size: int = 50_000


class PassCost(NamedTuple):
    """What one pass takes, all jobs together; `wall_s` with the workers there are."""

    name: str
    jobs: int
    read_bytes: int
    written_bytes: int
    wall_s: float


class EvidencePlan(NamedTuple):
    """The four passes with one number of latent slices."""

    latent_slices: int
    job_bytes: int
    """Memory of the largest job."""
    fits: bool
    passes: list[PassCost]
    gather_bytes: int
    """What shipping the rows around each example to its latent group would write instead of pass C's windows."""

    @property
    def wall_s(self) -> float:
        """All passes, one after the other."""
        return sum(item.wall_s for item in self.passes)


def best_plan(work: Workload, features: FeaturesConfig, machine: Machine | None = None) -> EvidencePlan:
    """Return the plan with the best number of latent slices. Raises `PlanError` when a job does not fit even with one latent a slice."""
    machine = Machine() if machine is None else machine
    plans = [plan for p in _slice_counts(work.d_sae) if (plan := estimate(work, features, p, machine)).fits]
    if not plans:
        raise PlanError(
            f"No number of latent slices fits {machine.memory_bytes:,} bytes a job: a shard of {work.n_rows // work.n_shards:,} rows needs more. "
            "Raise the memory of a job, or make smaller shards (corpus.shard_bytes)."
        )
    return min(plans, key=lambda plan: (plan.wall_s, plan.latent_slices))


def estimate(work: Workload, features: FeaturesConfig, latent_slices: int, machine: Machine | None = None) -> EvidencePlan:
    """Return what the four passes cost with `latent_slices` slices."""
    machine = Machine() if machine is None else machine
    n_firings = work.n_rows * work.l0
    n_kept = _kept_a_latent(work, features) * work.d_sae
    n_examples = min(n_firings, 1.0 * work.d_sae * (features.n_random + features.top_k + features.n_intervals * features.examples_per_interval))
    x_bytes, w_bytes = work.n_rows * work.row_bytes, work.d_sae * work.d_in * 4
    firings_bytes = n_firings * FIRING_BYTES if features.keep == "all" else 0.0
    candidate_bytes = n_kept * work.n_shards * CANDIDATE_BYTES + firings_bytes
    width = 2 * features.window + 1
    windows_bytes = n_examples * WINDOW_BYTES
    products = 2.0 * work.d_in * work.d_sae * work.n_rows
    encode_s = products / machine.flops * machine.overhead + n_firings * machine.firing_ns * 1e-9
    look_up_s = n_firings * machine.firing_ns * 1e-9 if features.keep == "all" else 2.0 * work.d_in * width * n_examples / machine.flops * 10
    relate_s = 2.0 * work.d_in * work.d_sae * (work.d_sae + work.vocabulary_size) / machine.flops
    a_reads = float(latent_slices * x_bytes + work.n_shards * w_bytes)
    c_reads = (firings_bytes if features.keep == "all" else float(x_bytes)) + n_examples * CANDIDATE_BYTES * work.n_shards
    select_s, n_grid = n_firings * machine.firing_ns * 1e-9, work.n_shards * latent_slices
    passes = [
        _cost(machine, ("A feature_candidates", n_grid), a_reads, candidate_bytes, encode_s),
        _cost(machine, ("B feature_examples", latent_slices), candidate_bytes, n_examples * CANDIDATE_BYTES, select_s),
        _cost(machine, ("C example_activations", work.n_shards), c_reads, windows_bytes, look_up_s),
        _cost(machine, ("D feature_records", latent_slices), windows_bytes + w_bytes, work.d_sae * RECORD_BYTES, relate_s + work.d_sae * 5e-3),
    ]
    job_bytes = _job_bytes(work, features, latent_slices)
    return EvidencePlan(latent_slices, job_bytes, job_bytes <= machine.memory_bytes, passes, int(n_examples * width * work.row_bytes))


def _cost(machine: Machine, work: tuple[str, int], read_bytes: float, written_bytes: float, work_s: float) -> PassCost:
    """Spread work and bytes over the workers, in whole jobs; a job reads while it computes."""
    name, jobs = work
    busy_s = max(work_s, (read_bytes + written_bytes) / (machine.read_gb_per_s * 1e9))
    return PassCost(name, jobs, int(read_bytes), int(written_bytes), (busy_s / jobs + machine.job_s) * -(-jobs // machine.workers))


def _kept_a_latent(work: Workload, features: FeaturesConfig) -> float:
    """Return how many candidates of a latent one shard keeps."""
    n_fired = work.n_rows * work.l0 / work.d_sae / work.n_shards
    return min(n_fired, float(features.n_kept_top + features.n_random))


def _job_bytes(work: Workload, features: FeaturesConfig, latent_slices: int) -> int:
    """Return what a job of pass A holds: columns, candidates twice while they merge, collected firings, and rows of the shard."""
    n_latents = -(-work.d_sae // latent_slices)
    kept = n_latents * _kept_a_latent(work, features) * KEPT_BYTES * 2
    return int(n_latents * work.d_in * _COLUMN_BYTES + kept + (200 << 20) + work.n_rows / work.n_shards * 30)


def _slice_counts(d_sae: int) -> list[int]:
    """List slice counts worth comparing: 1, 2, 3, 4, 6, 8, 12, ... up to one latent a slice."""
    counts, power = [1], 2
    while power <= d_sae:
        counts += [power, power + power // 2] if power + power // 2 <= d_sae else [power]
        power *= 2
    return counts
