"""What stores cost and machines do becomes the numbers that every forecast divides by; assumed until `rates.py` knows better."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What work costs; the defaults are Amazon S3's list prices and a machine with 2 cores a job."""

    put_usd: float = 5e-6
    """One PUT, or one part of a multipart upload."""
    get_usd: float = 4e-7
    """One ranged GET."""
    put_bytes: int = 64 << 20
    """Size of an upload's part."""
    get_bytes: int = 16 << 20
    """Largest ranged GET."""
    workers: int = 64
    """Jobs that run at once."""
    worker_gb_per_s: float = 0.5
    """Bytes that one job reads and writes, in GB/s."""
    worker_usd_per_hour: float = 0.1
    """Price of one worker."""
    requests_per_s: float = 5500.0
    """Requests that the store answers; more key prefixes, more of them."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One worker and how many there are; the defaults are two cores of a recent server CPU, as measured."""

    workers: int = 64
    flops: float = 300e9
    """Operations a second of the matrix product."""
    read_gb_per_s: float = 0.5
    """What a worker reads from and writes to the store."""
    memory_bytes: int = 8 << 30
    """What a job may hold."""
    firing_ns: float = 100.0
    """Work of pass A a firing, files included; of the other passes together about as much."""
    job_s: float = 5.0
    """What a job takes besides: starting, imports, reading the SAE."""
    overhead: float = 0.4
    """Pass A beside its bare matrix products in float32: it multiplies 8-bit digits. 1.1 where these are not fast."""


H200: Final = Machine(workers=1, flops=600e12, read_gb_per_s=10.0, memory_bytes=120 << 30, firing_ns=5.0, overhead=1.15)
"""One H200 with sixteen cores: assumed, not measured."""
ONE_WORKER: Final = Machine(workers=1)
PROCESS_BYTES: Final = 700 << 20
"""A Python process with Dagster and PyTorch."""
