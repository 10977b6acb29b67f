"""Pass A of the feature visualization beside the bare encode and the usual dense top-k; the literal gather beside windows; all in one run.

    make bench-visualize QUICK=1            small: ends within 45 s on 2 cores
    make bench-visualize                    full: two minutes; the ratios that count
    python benchmarks/bench_visualize.py --device cuda      one GPU: a slice of 131,072 latents at d_in 4096 in bfloat16, and the extrapolation

Sketch before code: the floor is one matrix product in the setting's type, or in float32 where that type is emulated (`floor_dtype`), 2 d_in
operations a (row, latent), by the library that is the fastest on this kind of CPU (`interp_assets/compute/products.py`). Ours multiplies 8-bit digits
where the processor is fast at that (a quarter of a float32 product on a Zen 5), looks at every pre-activation (0.06 ns on 2 cores), computes two
to three times as many as fire (20 to 40 ns each), and works per firing (0.1 us, files included). The usual way keeps the running top-k of a dense
block, which sorts every pre-activation, and for the random sample hashes and sorts them once more.

All methods see the same rows and SAE, whose latents fire with log-normal frequencies. Floor and ours alternate, so that a ratio compares
neighbours in time. One JSON object a line:

    name, value, unit      wall seconds unless the unit says otherwise; the median of the repeats
    ours                   the same for this project's pass A in the same setting
    ratio_to_floor         median over the repeats of value / floor beside it
    ratio_to_torch_floor   the same for the product as torch multiplies float32 unless told otherwise
    ratio_to_best_peer     best peer that does the same work / value: above 1 is faster than the peer

Ours includes building the encoder, statistics, selection and the artifact's files in memory. Seconds are not to be compared between runs.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from floors import by_torchs_choice, floor_dtype
from floors import report as share
from torch import Tensor

from interp_assets.compute.priority import latent_keys, row_keys, sample_seed
from interp_assets.compute.processor import find_paths
from interp_assets.compute.products import use_fastest_products
from interp_assets.compute.seeds import stream
from interp_assets.corpus.tokens import TokenShard
from interp_assets.harvest.rows import RowBlock
from interp_assets.planning.config import FeaturesConfig, make_config
from interp_assets.planning.machine import H200
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.storage.manifest import Manifest, create_artifact
from interp_assets.storage.store import open_store
from interp_assets.storage.tensors import save_tensors
from interp_assets.train.sae import Sae
from interp_assets.visualize import windows
from interp_assets.visualize.candidates import CANDIDATES, FIRINGS, Job
from interp_assets.visualize.encoder import TILE, Encoder, Scan, TopKScan, row_limits
from interp_assets.visualize.estimate import Workload, estimate
from interp_assets.visualize.gather import Gatherer, rows_of_windows
from interp_assets.visualize.refs import candidates_ref
from interp_assets.visualize.statistics import histogram_origin

HOOK = "resid_post.0"
BLOCK, TOP_K, N_RANDOM, D_IN, WINDOW = 4096, 20, 200, 512, 32


class Setting(NamedTuple):
    """What is encoded, and how."""

    sae: Sae
    rows: Tensor
    l0: int
    dtype: str = "float32"

    def first(self, n_rows: int) -> "Setting":
        """Return the same with fewer rows."""
        return self._replace(rows=self.rows[:n_rows])

    def words(self) -> dict[str, Any]:
        """Return what a line says about the setting."""
        shape = {"rows": len(self.rows), "latents": self.sae.d_sae, "d_in": self.sae.d_in, "l0": self.l0}
        return {**shape, "rule": self.sae.kind, "dtype": self.dtype, "top_k": TOP_K, "n_random": N_RANDOM}


def make_setting(n_rows: int, n_latents: int, l0: int, rule: str = "jump_relu", seed: int = 0, d_in: int = D_IN) -> Setting:
    """Draw rows from N(0, I) and unit encoder columns, so that pre-activations are N(0, 1); the limit sets each latent's frequency."""
    generator = torch.Generator().manual_seed(stream(seed, "bench").torch_seed())
    W = torch.randn(d_in, n_latents, generator=generator)
    W /= W.norm(dim=0)
    rate = torch.exp(1.5 * torch.randn(n_latents, generator=generator))
    rate = (rate / rate.mean() * l0 / n_latents).clamp(1e-9, 0.4)
    limit = (math.sqrt(2) * torch.erfinv(1 - 2 * rate.double())).float().clamp_min(0.01)
    zeros = torch.zeros(n_latents)
    bias, threshold = (-limit, zeros) if rule == "relu" else (zeros, limit if rule == "jump_relu" else zeros)
    k = l0 if rule == "topk" else 0
    sae = Sae(kind=rule, W_enc=W, b_enc=bias, W_dec=W.T, b_dec=torch.zeros(d_in), threshold=threshold, k=k)
    return Setting(sae, torch.randn(n_rows, d_in, generator=generator).bfloat16(), l0)


def run_floor(setting: Setting) -> None:
    """Multiply every block with every tile of encoder columns in the setting's type, where that is fast here, and forget the result."""
    dtype = getattr(torch, floor_dtype(setting.dtype))
    tiles = [setting.sae.W_enc[:, i : i + TILE].to(dtype).contiguous() for i in range(0, setting.sae.d_sae, TILE)]
    pre = torch.empty(BLOCK, TILE, dtype=dtype)
    for first in range(0, len(setting.rows), BLOCK):
        block = setting.rows[first : first + BLOCK].to(dtype)
        for tile in tiles:
            torch.mm(block, tile, out=pre)


def make_job(setting: Setting, keep: str) -> tuple[Pipeline, TokenShard]:
    """Describe one job of pass A over rows that are in memory."""
    features = {"latent_slices": 1, "keep": keep, "top_k": TOP_K, "n_random": N_RANDOM, "one_per_document": False, "distinct_tokens": 0}
    sae = {"hook_point": HOOK, "d_sae": setting.sae.d_sae}
    content = {"harvest": {"hook_points": [HOOK]}, "saes": [sae], "features": features, "execution": {"rows_per_block": BLOCK}}
    content["shuffle"] = {"passes": 2, "fan_out": 2}  # nothing is shuffled: the ids want to know
    source = ShardSource(index=0, fingerprint="f", n_documents=1, n_bytes=1, spec={})
    plan = PipelinePlan(
        shards=[source], tokenizer_fingerprint="t", model_fingerprint="m", hook_widths={HOOK: setting.sae.d_in}, vocabulary_size=1, max_context=1
    )
    nothing = Manifest(kind="", artifact_id="", identity={}, inputs={}, files=[])
    contexts = (np.arange(len(setting.rows)) // 256).astype(np.uint32)
    tokens = TokenShard(np.zeros(len(contexts), np.uint32), contexts, contexts, np.ones(len(contexts), np.bool_), nothing)
    return Pipeline(make_config(content), plan), tokens


def run_ours(setting: Setting, keep: str) -> Manifest:
    """Run pass A as a job does, from rows in memory to its files in memory."""
    return run_job(setting, keep, Encoder(setting.sae, 0, setting.sae.d_sae, torch.device("cpu"), dtype=setting.dtype), BLOCK)


def run_job(setting: Setting, keep: str, encoder: Encoder, n_block: int) -> Manifest:
    """Run a job with an encoder that is there, blocks of `n_block` rows at a time."""
    pipeline, tokens = make_job(setting, keep)
    job = Job(pipeline, encoder, tokens, 0, histogram_origin(math.sqrt(setting.sae.d_in), setting.sae.W_enc))
    begun: list[tuple[int, Callable[[], list[Scan] | TopKScan]]] = []  # as in thresholds.py
    for first in range(0, len(setting.rows) + n_block, n_block):
        if first < len(setting.rows):
            rows = setting.rows[first : first + n_block]
            block, is_valid = encoder.prepare(rows, n_block, "the benchmark"), tokens.valid[first : first + len(rows)]
            is_topk = setting.sae.kind == "topk"
            begun.append((first, encoder.begin_scan_topk(block, is_valid) if is_topk else encoder.begin_scan(block, row_limits(is_valid, -np.inf))))
        if len(begun) > 1 or first + n_block >= len(setting.rows):
            for earlier, finish in [begun.pop(0)] if begun else []:
                found = finish()
                for scan in found.scans if isinstance(found, TopKScan) else found:
                    job.add(scan, earlier)
    with create_artifact(open_store("memory://bench"), candidates_ref(pipeline, "demo", 0, 0)) as art:
        job.write(art)
    assert art.manifest
    return art.manifest


def run_dense(setting: Setting, *, with_random: bool) -> None:
    """Keep the running top-k of every latent over dense blocks, and with `with_random` the running n of smallest hash as well."""
    sae, seed = setting.sae, sample_seed(0, "visualize", "examples")
    keys = torch.from_numpy(latent_keys(np.arange(sae.d_sae, dtype=np.uint64), seed).view(np.int64))
    best = torch.full((TOP_K, sae.d_sae), -torch.inf)
    best_rows = torch.zeros((TOP_K, sae.d_sae), dtype=torch.int64)
    drawn = torch.full((N_RANDOM, sae.d_sae), torch.iinfo(torch.int64).max)
    for first in range(0, len(setting.rows), BLOCK):
        block = setting.rows[first : first + BLOCK].float()
        hashes = torch.from_numpy(row_keys(np.arange(first, first + len(block), dtype=np.uint64), seed).view(np.int64))
        for low in range(0, sae.d_sae, TILE):
            tile = slice(low, low + TILE)
            pre = block @ sae.W_enc[:, tile]
            pre = torch.where(pre > sae.threshold[tile], pre, 0.0)
            values, places = torch.cat([best[:, tile], pre]).topk(TOP_K, dim=0)
            earlier = best_rows[:, tile].gather(0, places.clamp_max(TOP_K - 1))
            best[:, tile], best_rows[:, tile] = values, torch.where(places < TOP_K, earlier, places - TOP_K + first)
            if with_random:
                words = (hashes[:, None] ^ keys[None, tile]) * 0x3F58476D1CE4E5B9
                words = torch.where(pre > 0, words, torch.iinfo(torch.int64).max)
                drawn[:, tile] = torch.cat([drawn[:, tile], words]).topk(N_RANDOM, dim=0, largest=False).values


def clock(work: Callable[[], object]) -> float:
    """Return the wall seconds of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def alternate(works: dict[str, Callable[[], object]], n_repeats: int) -> dict[str, list[float]]:
    """Time each of the works in turn, again and again."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(n_repeats):
        for name, work in works.items():
            found[name].append(clock(work))
    return found


def report(
    name: str, value: float, unit: str, ours: float | None = None, floor: float | None = None, peer: float | None = None, **words: Any
) -> None:
    """Print one line."""
    line = {"name": name, "value": _short(value), "unit": unit, "ours": _short(value if ours is None else ours)}
    share({**line, "ratio_to_floor": floor and _short(floor), "ratio_to_best_peer": peer and _short(peer), **words})


def compare(setting: Setting, n_repeats: int, peer_s_a_row: float | None, *, keeps: tuple[str, ...] = ("candidates",)) -> float:
    """Time the floor and ours in turn, print them, and return ours in seconds."""
    works: dict[str, Callable[[], object]] = {"floor": lambda: run_floor(setting)}
    if setting.dtype == "float32" and use_fastest_products():
        works["torch_floor"] = by_torchs_choice(lambda: run_floor(setting))
    works |= {keep: lambda keep=keep: run_ours(setting, keep) for keep in keeps}
    times = alternate(works, n_repeats)
    ours = float(np.median(times[keeps[0]]))
    label = f"{setting.sae.d_sae:,} latents, {setting.sae.kind}, {setting.dtype}"
    peer = peer_s_a_row * len(setting.rows) if peer_s_a_row else None
    words = setting.words() | {"floor_dtype": floor_dtype(setting.dtype)}
    report(f"bare matrix products, {label}", float(np.median(times["floor"])), "s", ours, 1.0, **words)
    for keep in keeps:
        ratio = float(np.median(np.array(times[keep]) / np.array(times["floor"])))
        value = float(np.median(times[keep]))
        by_torch = float(np.median(np.array(times[keep]) / np.array(times.get("torch_floor", times["floor"]))))
        report(
            f"pass A, keep: {keep}, {label}", value, "s", ours, ratio, peer / value if peer else None, ratio_to_torch_floor=_short(by_torch), **words
        )
    return ours


def compare_gather(n_latents: int, n_examples: int, n_rows: int) -> None:
    """Make windows by moving columns to the rows, and by gathering the rows of each latent group, with the bytes that each way writes."""
    setting = make_setting(n_rows, n_latents, 32)
    pipeline, tokens = make_job(setting, "candidates")
    rng = np.random.default_rng(0)
    rows = np.sort(rng.integers(0, n_rows, (n_latents, n_examples)), axis=1).reshape(-1)
    latents = np.repeat(np.arange(n_latents), n_examples)
    bounds = windows.window_bounds(tokens.contexts, tokens.documents, rows, WINDOW)
    requests = windows.Requests(latents, rows, np.ones(len(rows), np.float32), *bounds)
    blocks = [RowBlock(i, setting.rows[i : i + BLOCK]) for i in range(0, n_rows, BLOCK)]
    ref = candidates_ref(pipeline, "demo", 0, 0)
    list(windows._encode(pipeline, setting.sae, iter(blocks), tokens, requests.take(np.arange(4)), None))  # noqa: SLF001 - compiles
    with create_artifact(open_store("memory://windows"), ref) as art:
        begun = time.perf_counter()
        ((asked, spikes),) = windows._encode(pipeline, setting.sae, iter(blocks), tokens, requests, None)  # noqa: SLF001
        with windows.create_table(art, windows.WINDOWS, windows.WINDOW_SCHEMA) as table:
            table.append(windows._columns(asked, spikes, 0))  # noqa: SLF001
        ours_s = time.perf_counter() - begun
    assert art.manifest
    ours_bytes = art.manifest.n_bytes / len(rows)
    words = {"examples": len(rows), "rows": n_rows, "latents": n_latents, "d_in": D_IN}
    report("pass C, columns moved to the rows", ours_s / len(rows) * 1e6, "us an example", **words)
    report("pass C, columns moved to the rows: written", ours_bytes, "bytes an example", **words)
    for group in (1, 16, 256, n_latents):
        masks = [
            rows_of_windows(
                requests.firsts[i * n_examples : (i + group) * n_examples], requests.lengths[i * n_examples : (i + group) * n_examples], n_rows
            )
            for i in range(0, n_latents, group)
        ]
        gathered = sum(int(mask.sum()) for mask in masks) * D_IN * 2 / len(rows)
        report(f"literal gather, groups of {group:,} latents: written", gathered, "bytes an example", ours_bytes, peer=1.0, **words)
    masks = [np.ones(n_rows, np.bool_)]
    with create_artifact(open_store("memory://gather"), ref) as art:
        begun = time.perf_counter()
        gatherer = Gatherer(masks, "the benchmark")
        for _ in gatherer.watch(blocks):
            pass
        gatherer.write(art)
        save_tensors(art, "windows.safetensors", {"none": torch.zeros(1)})
        list(windows._encode(pipeline, setting.sae, iter(blocks), tokens, requests, None))  # noqa: SLF001
        gather_s = time.perf_counter() - begun
    report("literal gather of one group, then its windows", gather_s / len(rows) * 1e6, "us an example", ours_s / len(rows) * 1e6, peer=1.0, **words)


def compare_on_gpu(device: torch.device, n_latents: int, d_in: int, n_block: int, n_blocks: int) -> None:
    """Time one slice of a large SAE on a GPU: bare products, the scan alone, and the job with its host work, each of the same blocks.

    The floor is what the library multiplies in bfloat16 with a bfloat16 result, one product a block. The scan is checked against the plain
    path on one block first. Extrapolated: eight such slices over 100 million rows.
    """
    setting = make_setting(n_block * n_blocks, n_latents, 100 * n_latents // (1 << 20) or 1, d_in=d_in)._replace(dtype="bfloat16")
    encoder = Encoder(setting.sae, 0, n_latents, device, dtype="bfloat16")
    plain = Encoder(setting.sae, 0, min(n_latents, 4 * TILE), device, dtype="bfloat16", path="plain")
    open_limits, first = np.full(n_block, -np.inf, np.float32), setting.rows[:n_block]
    pairs = zip(
        encoder.scan(encoder.prepare(first, n_block, "here"), open_limits),
        plain.scan(plain.prepare(first, n_block, "here"), open_limits),
        strict=False,
    )
    differing = sum(len(np.setxor1d(a.latents.astype(np.int64) << 32 | a.rows, b.latents.astype(np.int64) << 32 | b.rows)) for a, b in pairs)
    words = setting.words() | {"block": n_block, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    report("firings of the scan that the plain path does not have, or the reverse", differing, "firings", **words)
    W, product = setting.sae.W_enc.to(device, torch.bfloat16), torch.empty(n_block, n_latents, dtype=torch.bfloat16, device=device)
    blocks = [setting.rows[i : i + n_block] for i in range(0, len(setting.rows), n_block)]
    on_device = [encoder.prepare(block, n_block, "here").clone() for block in blocks[:2]]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def multiply() -> None:
        for i in range(n_blocks):
            torch.mm(on_device[i % 2].to(torch.bfloat16), W, out=product)
        wait()

    def scan() -> None:
        for i in range(n_blocks):
            encoder.scan(on_device[i % 2], open_limits)

    for work in (multiply, scan):
        work()
    times = alternate({"floor": multiply, "scan": scan, "job": lambda: run_job(setting, "candidates", encoder, n_block)}, 3)
    floor = np.array(times["floor"])
    rate = 2.0 * len(setting.rows) * n_latents * d_in / float(np.median(floor)) / 1e12
    report("bare bfloat16 products", float(np.median(floor)), "s", None, 1.0, tflops=_short(rate), **words)
    for name in ("scan", "job"):
        report(f"pass A, {name}", float(np.median(times[name])), "s", None, float(np.median(np.array(times[name]) / floor)), **words)
    hours = float(np.median(times["job"])) / len(setting.rows) / n_latents * 1e8 * (1 << 20) / 3600
    report("pass A, 1M latents x 100M rows at this d_in, extrapolated", hours, "hours on this device", **words)


def report_sizes(manifest: Manifest, setting: Setting, ours_s: float) -> None:
    """Print bytes per firing and feature, and what a million latents over a hundred million rows would take."""
    n_rows, d_sae = len(setting.rows), setting.sae.d_sae
    report("store of all firings", manifest.file(FIRINGS).n_bytes / manifest.facts["n_firings"], "bytes a firing")
    report("candidates", manifest.file(CANDIDATES).n_bytes / manifest.facts["n_candidates"], "bytes a candidate")
    report("pass A, keep: all, this shard", manifest.n_bytes / d_sae, "bytes a feature", **setting.words())
    per_pair = ours_s / n_rows / d_sae
    report("pass A, a million rows x a thousand latents", per_pair * 1e9, "s on this machine", d_in=D_IN)
    report("pass A, 1M latents x 100M rows at d_in 512, extrapolated", per_pair * 1e14 / 3600, "hours on this machine", d_in=D_IN)
    million = Workload(n_rows=100_000_000, n_shards=8, d_in=4096, d_sae=1 << 20, l0=100.0, row_bytes=8192)
    hours = estimate(million, FeaturesConfig(), 1, H200).passes[0].wall_s / 3600
    report("pass A, 1M latents x 100M rows at d_in 4096", hours, "H200 hours by arithmetic at an assumed 600 TFLOP/s; NOT measured, no GPU here")


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", default=os.environ.get("QUICK", "0") not in ("", "0"), help="small sizes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda for one GPU, or cpu-as-cuda for that code, tiny, without one")
    args = parser.parse_args()
    use_fastest_products()
    if args.device != "cpu":
        report("machine", torch.get_num_threads(), "threads", torch=torch.__version__, quick=args.quick, **find_paths()._asdict())
        is_tiny = args.device == "cpu-as-cuda"
        sizes = (512, 64, 256, 2) if is_tiny else (16384, 1024, 4096, 4) if args.quick else (131072, 4096, 16384, 16)
        compare_on_gpu(torch.device("cpu" if is_tiny else args.device), *sizes)
        return
    n_small, n_large, n_rule, n_repeats = (8192, 4096, 4096, 2) if args.quick else (65536, 24576, 32768, 3)
    report("machine", torch.get_num_threads(), "threads", torch=torch.__version__, quick=args.quick, **find_paths()._asdict())
    small = make_setting(n_small, 16384, 32)
    run_floor(small.first(BLOCK))
    run_ours(small.first(BLOCK), "all")  # compiles
    n_dense = min(n_small, 8192)
    dense = {both: clock(lambda both=both: run_dense(small.first(n_dense), with_random=both)) for both in (False, True)}
    floor_s = clock(lambda: run_floor(small.first(n_dense)))
    for both, name in ((False, "no random sample"), (True, "and random sample")):
        words = small.first(n_dense).words()
        report(f"dense running top-k, {name}", dense[both], "s", None, dense[both] / floor_s, dense[True] / dense[both], **words)
    ours_s = compare(small, n_repeats, dense[True] / n_dense, keeps=("candidates", "all"))
    compare(small._replace(dtype="bfloat16"), n_repeats, None)
    for rule in ("relu", "topk"):
        compare(make_setting(n_rule, 16384, 32, rule), n_repeats, None)
    compare(make_setting(n_large, 65536, 64), n_repeats, None)
    compare_gather(*((256, 40, 8192) if args.quick else (1024, 70, 16384)))
    report_sizes(run_ours(small, "all"), small, ours_s)


if __name__ == "__main__":
    main()
