"""Pass A of the feature visualization beside the bare encode and the usual dense top-k, in one run.

    python benchmarks/bench_visualize.py                     small: ends within 45 s on 2 cores
    python benchmarks/bench_visualize.py --rows 131072 --latents 65536 --l0 64

Sketch before code: the floor is one matrix product, 2 d_in operations a (row, latent). Ours adds a scan of every pre-activation (0.5 ns) and work
per firing (about 0.2 us): at L0 = 32 of 16,384 latents and d_in = 512 that is 7% and 5% of the product. The usual way keeps the running top-k of a
dense block, which sorts every pre-activation, and for the random sample hashes and sorts them once more.

All methods see the same rows and the same SAE, whose latents fire with log-normal frequencies. One JSON line a row:

    name, value, unit      seconds of CPU time of the process, or what the unit says
    ours                   CPU seconds of this project's pass A with `keep: candidates`
    ratio_to_floor         value / CPU seconds of the matrix products of the same run
    ratio_to_best_peer     best peer / value: above 1 is faster than the best peer that does the same work
    wall_ratio_to_floor    the same with wall seconds; on a machine with other work it means little

Ratios are of one run on one machine; bare seconds are not to be compared between runs.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from interp_assets.config import make_config
from interp_assets.corpus.tokens import TokenShard
from interp_assets.manifest import Manifest, create_artifact
from interp_assets.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.seeds import stream
from interp_assets.store import open_store
from interp_assets.train.sae import Sae
from interp_assets.visualize.candidates import CANDIDATES, FIRINGS, Job
from interp_assets.visualize.encoder import TILE, Encoder
from interp_assets.visualize.priority import latent_keys, row_keys, sample_seed
from interp_assets.visualize.refs import candidates_ref
from interp_assets.visualize.statistics import histogram_origin

HOOK = "resid_post.0"


class Setting(NamedTuple):
    """What is encoded."""

    sae: Sae
    rows: Tensor
    block: int
    top_k: int
    n_random: int


class Measured(NamedTuple):
    """Seconds of CPU time and of the wall clock."""

    cpu_s: float
    wall_s: float


def make_setting(args: argparse.Namespace) -> Setting:
    """Draw rows from N(0, I) and unit encoder columns, so that pre-activations are N(0, 1); thresholds set each latent's frequency."""
    generator = torch.Generator().manual_seed(stream(args.seed, "bench").torch_seed())
    W = torch.randn(args.d_in, args.latents, generator=generator)
    W /= W.norm(dim=0)
    rate = torch.exp(1.5 * torch.randn(args.latents, generator=generator))
    rate = (rate / rate.mean() * args.l0 / args.latents).clamp(1e-9, 0.4)
    threshold = (math.sqrt(2) * torch.erfinv(1 - 2 * rate.double())).float().clamp_min(0.01)
    zeros = torch.zeros(args.latents)
    sae = Sae(kind="jump_relu", W_enc=W, b_enc=zeros, W_dec=W.T, b_dec=torch.zeros(args.d_in), threshold=threshold, k=0)
    return Setting(sae, torch.randn(args.rows, args.d_in, generator=generator).bfloat16(), args.block, args.top_k, args.n_random)


def run_floor(setting: Setting) -> None:
    """Multiply every block with every tile of encoder columns, and forget the result."""
    tiles = [setting.sae.W_enc[:, i : i + TILE].contiguous() for i in range(0, setting.sae.d_sae, TILE)]
    pre = torch.empty(setting.block, TILE)
    for first in range(0, len(setting.rows), setting.block):
        block = setting.rows[first : first + setting.block].float()
        for tile in tiles:
            torch.mm(block, tile, out=pre)


def run_ours(setting: Setting, keep: str) -> Manifest:
    """Run pass A as a job does, from rows in memory to its files in memory."""
    content = {
        "harvest": {"hook_points": [HOOK]},
        "saes": [{"hook_point": HOOK, "d_sae": setting.sae.d_sae}],
        "features": {"latent_slices": 1, "keep": keep, "top_k": setting.top_k, "n_random": setting.n_random, "one_per_document": False},
        "execution": {"rows_per_block": setting.block},
    }
    source = ShardSource(index=0, fingerprint="f", n_documents=1, n_bytes=1, spec={})
    plan = PipelinePlan(
        shards=[source],
        tokenizer_fingerprint="t",
        model_fingerprint="m",
        hook_widths={HOOK: setting.sae.d_in},
        vocabulary_size=1,
        max_context=1,
    )
    pipeline = Pipeline(make_config(content), plan)
    n_rows = len(setting.rows)
    nothing = Manifest(kind="", artifact_id="", identity={}, inputs={}, files=[])
    zeros = np.zeros(n_rows, np.uint32)
    tokens = TokenShard(zeros, zeros, zeros, np.ones(n_rows, np.bool_), nothing)
    encoder = Encoder(setting.sae, 0, setting.sae.d_sae, torch.device("cpu"))
    job = Job(pipeline, encoder, tokens, 0, histogram_origin(math.sqrt(setting.sae.d_in), setting.sae.W_enc))
    for first in range(0, n_rows, setting.block):
        block = encoder.prepare(setting.rows[first : first + setting.block], setting.block, "the benchmark")
        for scan in encoder.scan(block, np.full(setting.block, -np.inf, np.float32)):
            job.add(scan, first)
    ref = candidates_ref(pipeline, "demo", 0, 0)
    with create_artifact(open_store("memory://bench"), ref) as art:
        job.write(art)
    assert art.manifest
    return art.manifest


def run_dense(setting: Setting, *, with_random: bool) -> None:
    """Keep the running top-k of every latent over dense blocks, and with `with_random` the running n of smallest hash as well."""
    sae, seed = setting.sae, sample_seed(0, "examples")
    keys = torch.from_numpy(latent_keys(np.arange(sae.d_sae, dtype=np.uint64), seed).view(np.int64))
    best = torch.full((setting.top_k, sae.d_sae), -torch.inf)
    best_rows = torch.zeros((setting.top_k, sae.d_sae), dtype=torch.int64)
    drawn = torch.full((setting.n_random, sae.d_sae), torch.iinfo(torch.int64).max)
    for first in range(0, len(setting.rows), setting.block):
        block = setting.rows[first : first + setting.block].float()
        hashes = torch.from_numpy(row_keys(np.arange(first, first + len(block), dtype=np.uint64), seed).view(np.int64))
        for low in range(0, sae.d_sae, TILE):
            tile = slice(low, low + TILE)
            pre = block @ sae.W_enc[:, tile]
            pre = torch.where(pre > sae.threshold[tile], pre, 0.0)
            values, places = torch.cat([best[:, tile], pre]).topk(setting.top_k, dim=0)
            rows = torch.where(
                places < setting.top_k, best_rows[:, tile].gather(0, places.clamp_max(setting.top_k - 1)), places - setting.top_k + first
            )
            best[:, tile], best_rows[:, tile] = values, rows
            if with_random:
                words = (hashes[:, None] ^ keys[None, tile]) * 0x3F58476D1CE4E5B9
                words = torch.where(pre > 0, words, torch.iinfo(torch.int64).max)
                drawn[:, tile] = torch.cat([drawn[:, tile], words]).topk(setting.n_random, dim=0, largest=False).values


def measure(work: Callable[[], object], n_repeats: int) -> Measured:
    """Run `work` and return its best times."""
    cpu, wall = [], []
    for _ in range(n_repeats):
        wall_0, cpu_0 = time.perf_counter(), time.process_time()
        work()
        cpu.append(time.process_time() - cpu_0)
        wall.append(time.perf_counter() - wall_0)
    return Measured(min(cpu), min(wall))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("rows", 8192),
        ("latents", 16384),
        ("d-in", 512),
        ("l0", 32),
        ("block", 4096),
        ("top-k", 20),
        ("n-random", 200),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    setting = make_setting(args)
    run_floor(setting._replace(rows=setting.rows[: args.block]))
    floor = measure(lambda: run_floor(setting), args.repeats)
    ours = {keep: measure(lambda keep=keep: run_ours(setting, keep), args.repeats) for keep in ("candidates", "all")}
    dense = {with_random: measure(lambda random=with_random: run_dense(setting, with_random=random), 1) for with_random in (False, True)}
    rows = {
        "bare matrix products": floor,
        "pass A, keep: candidates": ours["candidates"],
        "pass A, keep: all": ours["all"],
        "dense running top-k, no random sample": dense[False],
        "dense running top-k and random sample": dense[True],
    }
    config = {"rows": args.rows, "latents": args.latents, "d_in": args.d_in, "l0": args.l0, "top_k": args.top_k, "n_random": args.n_random}
    for name, measured in rows.items():
        line = {
            "name": name,
            "value": round(measured.cpu_s, 3),
            "unit": "s of CPU time",
            "ours": round(ours["candidates"].cpu_s, 3),
            "ratio_to_floor": round(measured.cpu_s / floor.cpu_s, 3),
            "ratio_to_best_peer": round(dense[True].cpu_s / measured.cpu_s, 2),
            "wall_ratio_to_floor": round(measured.wall_s / floor.wall_s, 3),
        }
        print(json.dumps(line | config))
    report_sizes(run_ours(setting, "all"), args, floor, ours["all"])


def report_sizes(manifest: Manifest, args: argparse.Namespace, floor: Measured, ours: Measured) -> None:
    """Print bytes per firing, cost per firing, and what a million latents over a hundred million rows would take at this d_in."""
    n_firings = manifest.facts["n_firings"]
    per_element_ns = ours.cpu_s / args.rows / args.latents * 1e9
    lines = [
        ("store of all firings", manifest.file(FIRINGS).n_bytes / n_firings, "bytes a firing"),
        ("candidates", manifest.file(CANDIDATES).n_bytes / manifest.facts["n_candidates"], "bytes a candidate"),
        ("pass A less the matrix products", (ours.cpu_s - floor.cpu_s) / n_firings * 1e6, "us of CPU time a firing"),
        ("pass A, keep: all, 1M latents x 100M rows by extrapolation", per_element_ns * 1e14 / 1e9 / 3600, "hours of one CPU core"),
    ]
    for name, value, unit in lines:
        print(
            json.dumps(
                {"name": name, "value": round(value, 3), "unit": unit, "ours": round(value, 3), "ratio_to_floor": None, "ratio_to_best_peer": None}
            )
        )


if __name__ == "__main__":
    main()
