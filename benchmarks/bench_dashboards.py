"""From activations to records, beside SAEDashboard's dashboards and delphi's cache of firings, in one run.

    make bench-dashboards QUICK=1                       small: within 45 s on 2 cores, without peers
    make bench-dashboards BENCH_ARGS="--peers sae_dashboard=.peers-dash/bin/python delphi=.peers-delphi/bin/python"       full: minutes

Sketch before code: 4,096 latents x 131,072 tokens at d_in 256 are 0.27 TFLOP as one float32 product, 1.4 s on two cores that do 200 GFLOP/s; digits
take a quarter of that where they are fast. The rows are 67 MB in bfloat16. 32 latents fire on a row: 4.2 million firings at 0.1 us are 0.4 s. Of 270
examples a latent each has 11 tokens: 12 million pre-activations of 256 dimensions are 6 GFLOP, and as many numbers pass through Parquet. A record
is some 100 windows in JSON, compressed: at 1 ms each 4 s. So records bind, not encoding. SAEDashboard keeps a dense [tokens, latents] of 256 latents
at a time in float32 (134 MB), and works on each latent in Python.

What is equal: the same rows, SAE, tokens and unembedding; for each latent the 20 strongest examples and 5 from each of 10 intervals, with 5 tokens on
each side; the activations on these tokens; frequency, quantiles and histogram of the activations; the 10 tokens that it raises and lowers most;
latents like it. What is not: ours also draws 200 random examples and shows 20 of them, keeps every firing, co-activation and decoder neighbours,
and writes checksums; SAEDashboard adds a histogram of logits, the change of logits on each window, and correlated neurons. delphi's cache is firings
only, none of the rest: it is compared with our first pass with every firing kept (`candidates`), not with the records.

SAEDashboard is timed on few latents of the same tokens, twice, and extrapolated linearly: seconds of `n1` latents, plus what each more took
between `n1` and `n2`, its fixed part once. One JSON line each:

    value                  seconds of ours, median of the rounds
    ratio_to_floor         ours / the bare product of all rows and encoder columns in float32, beside it
    ratio_to_best_peer     the peer at all latents / ours: above 1 is faster; `cpu_ratio_to_peer` by CPU seconds
    rss_gb                 most memory of a process that did nothing else
    passes                 seconds of each of our passes
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as under our command line

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench_visualize import HOOK, Setting, make_setting, run_floor
from children import measured, open_children
from floors import report
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from interp_assets.compute.products import use_fastest_products
from interp_assets.compute.seeds import stream
from interp_assets.corpus.refs import token_shard_ref
from interp_assets.garcon.subject import Unembedding
from interp_assets.harvest.refs import activation_shard_ref, statistics_ref
from interp_assets.harvest.statistics import ActivationStatistics, as_tensors
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.storage.manifest import create_artifact
from interp_assets.storage.store import Store, open_store
from interp_assets.storage.tensors import save_tensors
from interp_assets.train.checkpoint import load_sae, save_sae
from interp_assets.train.refs import evaluation_ref, sae_ref
from interp_assets.visualize.candidates import find_candidates
from interp_assets.visualize.examples import select_examples
from interp_assets.visualize.records import write_records
from interp_assets.visualize.windows import fire_windows

CONTEXT: Final = 128
VOCABULARY: Final = 1024
L0: Final = 32
SHOWN: Final = {"top_k": 20, "n_intervals": 10, "examples_per_interval": 5, "window": 5, "one_per_document": False, "distinct_tokens": 0}


class World(NamedTuple):
    """A pipeline whose activations, tokens and SAE are there, in a store."""

    pipeline: Pipeline
    store: Store
    setting: Setting
    unembedding: Unembedding
    tokens: np.ndarray


def make_pipeline(n_latents: int, d_in: int) -> Pipeline:
    """Describe it."""
    content = {
        "harvest": {"hook_points": [HOOK]},
        "saes": [{"name": "demo", "hook_point": HOOK, "d_sae": n_latents, "architecture": "jump_relu"}],
        "shuffle": {"passes": 2, "fan_out": 2},  # nothing is shuffled: the ids want to know
        "features": {"latent_slices": 1, "keep": "all", **SHOWN},
    }
    plan = PipelinePlan(
        shards=[ShardSource(index=0, fingerprint="f", n_documents=1, n_bytes=1, spec={})], tokenizer_fingerprint="t", model_fingerprint="m",
        hook_widths={HOOK: d_in}, vocabulary_size=VOCABULARY, max_context=CONTEXT,
    )  # fmt: skip
    return Pipeline(make_config(content), plan)


def make_unembedding(d_in: int) -> Unembedding:
    """Draw the way to the logits."""
    generator = torch.Generator().manual_seed(stream(0, "bench", "unembedding").torch_seed())
    return Unembedding(torch.randn(d_in, VOCABULARY, generator=generator), "")


def make_world(folder: Path, n_rows: int, n_latents: int, d_in: int) -> World:
    """Publish what the passes read."""
    setting = make_setting(n_rows, n_latents, L0, d_in=d_in)
    pipeline, store = make_pipeline(n_latents, d_in), open_store(str(folder / "store"))
    rng = stream(0, "bench", "tokens").generator()
    tokens = rng.integers(1, VOCABULARY, n_rows).astype(np.uint32)
    contexts = (np.arange(n_rows) // CONTEXT).astype(np.uint32)
    n_documents = int(contexts[-1]) + 1
    with create_artifact(store, token_shard_ref(pipeline, 0)) as art:
        art.put("tokens.parquet", _table(token_id=tokens, context=contexts, document=contexts, valid=np.ones(n_rows, np.bool_)))
        sizes = np.full(n_documents, CONTEXT, np.uint64)
        sources = [f"text-{i}" for i in range(n_documents)]
        first = np.arange(n_documents, dtype=np.uint64) * CONTEXT
        art.put("documents.parquet", _table(document=np.arange(n_documents, dtype=np.uint32), source=sources, first_row=first, n_rows=sizes))
        art.facts |= {"n_rows": n_rows, "n_valid": n_rows}
    with create_artifact(store, activation_shard_ref(pipeline, HOOK, 0)) as art:
        save_tensors(art, "rows.safetensors", {"rows": setting.rows})
    rows = setting.rows.double()
    found = ActivationStatistics(n_rows, rows.sum(0), rows.square().sum(0), float(rows.norm(dim=1).sum()), torch.zeros(1024, dtype=torch.int64))
    with create_artifact(store, statistics_ref(pipeline, HOOK)) as art:
        save_tensors(art, "statistics.safetensors", as_tensors(found))
    with create_artifact(store, sae_ref(pipeline, "demo")) as art:
        save_sae(art, setting.sae, pipeline, pipeline.config.sae("demo"), l0=float(L0))
    with create_artifact(store, evaluation_ref(pipeline, "demo")) as art:
        art.facts["l0"] = float(L0)
    return World(pipeline, store, setting, make_unembedding(d_in), tokens)


def _table(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def make_passes(pipeline: Pipeline, store: Store, d_in: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Return the four passes in their order, by name."""
    sae, unembedding = load_sae(pipeline, store, "demo"), make_unembedding(d_in)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", unk_token="w0")
    yield "candidates", lambda: find_candidates(pipeline, store, sae, "demo", 0, 0)
    yield "examples", lambda: select_examples(pipeline, store, "demo", 0)
    yield "windows", lambda: fire_windows(pipeline, store, sae, "demo", 0)
    yield "records", lambda: write_records(pipeline, store, "demo", sae, 0, tokenizer, unembedding)


def run_ours(root: Path, n_latents: int, d_in: int) -> dict[str, Any]:
    """Run the passes over a published world in this process, and measure each; loops have been compiled on a tiny one."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_world(Path(folder), 4096, 64, d_in)
        for _, work in make_passes(tiny.pipeline, tiny.store, d_in):
            work()
    return {name: measured(work) for name, work in make_passes(make_pipeline(n_latents, d_in), open_store(str(root / "store")), d_in)}


def measure_ours(n_rows: int, n_latents: int, d_in: int) -> dict[str, Any]:
    """Run the floor here and ours in a process of its own, so that its most memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), n_rows, n_latents, d_in)
        run_floor(world.setting.first(4096))
        floor = measured(lambda: run_floor(world.setting))
        done = subprocess.run([sys.executable, __file__, "--ours", folder, str(n_latents), str(d_in)], stdout=subprocess.PIPE, text=True, check=True)
        names = ("records.bin", "firings.*", "windows.parquet")
        sizes = {name: sum(path.stat().st_size for path in Path(folder).rglob(name)) for name in names}
    return {"floor": floor, "passes": json.loads(done.stdout.splitlines()[-1]), "bytes": sizes}


def save_setting(world: World, folder: Path) -> None:
    """Write for the peers what ours reads."""
    sae = world.setting.sae
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec.contiguous(), "b_dec": sae.b_dec, "threshold": sae.threshold}
    arrays = {name: value.numpy() for name, value in tensors.items()}
    assert world.unembedding.matrix is not None
    arrays |= {"rows": world.setting.rows.float().numpy(), "tokens": world.tokens.astype(np.int64), "unembedding": world.unembedding.matrix.numpy()}
    np.savez(folder / "setting.npz", **arrays)


def measure_peer(name: str, python: str, folder: Path, sizes: list[int], timeout_note: str) -> dict[str, Any]:
    """Return what a peer took for each number of latents, or why nothing."""
    found: dict[str, Any] = {}
    for n_latents in sizes:
        with open_children(python, "dashboard_peers.py", (name,), str(torch.get_num_threads())) as ((_, child),):
            made = child.ask(make={"peer": name, "folder": str(folder), "latents": n_latents, "is_warmed": False})
            if not made["made"]:
                return {"because": made["because"]}
            found[str(n_latents)] = child.ask(run=True)
    return found | {"note": timeout_note}


def extrapolate(found: dict[str, Any], sizes: list[int], n_latents: int, key: str) -> float:
    """Return what all latents would take, by the line through two sizes."""
    low, high = found[str(sizes[0])][key], found[str(sizes[1])][key]
    return low + max(0.0, high - low) / (sizes[1] - sizes[0]) * (n_latents - sizes[0])


def main() -> None:
    """Measure ours, then the peers, and print a line each."""
    if "--ours" in sys.argv:
        use_fastest_products()
        at = sys.argv.index("--ours")
        print(json.dumps(run_ours(Path(sys.argv[at + 1]), *map(int, sys.argv[at + 2 : at + 4]))), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 latents x 16,384 tokens, one round")
    parser.add_argument("--latents", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--peer-latents", type=int, nargs=2, default=[32, 96], help="SAEDashboard is timed on so many, and extrapolated")
    parser.add_argument("--peers", nargs="*", default=[], help="sae_dashboard=PYTHON delphi=PYTHON: interpreters that have them")
    parser.add_argument("--append", default="", help="also append the lines to this file")
    chosen = parser.parse_args()
    n_latents, n_rows, n_rounds = (512, 16384, 1) if chosen.quick else (4096, 131072, 3)
    n_latents, n_rows, n_rounds = chosen.latents or n_latents, chosen.tokens or n_rows, chosen.rounds or n_rounds
    peers = dict(item.split("=", 1) for item in chosen.peers)
    if not peers:
        sys.stderr.write("No peers: name interpreters that have them with --peers (benchmarks/README.md says how to make them).\n")
    sizes = {"sae_dashboard": [min(size, n_latents) for size in chosen.peer_latents], "delphi": [n_latents]}
    peers_found: dict[str, Any] = {}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if peers:
            save_setting(make_world(Path(folder), n_rows, n_latents, chosen.d_in), Path(folder))
        for name, python in peers.items():
            peers_found[name] = measure_peer(name, python, Path(folder), sizes[name], f"measured {time.perf_counter() - begun:.0f} s after the start")
    rounds = [measure_ours(n_rows, n_latents, chosen.d_in) for _ in range(n_rounds)]
    for line in make_lines(rounds, peers_found, sizes, n_latents):
        config = {"latents": n_latents, "tokens": n_rows, "d_in": chosen.d_in, "l0": L0, "rounds": n_rounds, **SHOWN}
        report({**line, "config": config | {"threads": torch.get_num_threads()}}, chosen.append)


def make_lines(rounds: list[dict[str, Any]], peers: dict[str, Any], sizes: dict[str, list[int]], n_latents: int) -> Iterator[dict[str, Any]]:
    """Turn what was measured into lines: the whole road beside SAEDashboard, and the first pass beside delphi."""

    def median(of: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(of, rounds))

    def total(key: str, names: list[str]) -> float:
        return median(lambda each: sum(each["passes"][name][key] for name in names))

    names = list(rounds[0]["passes"])
    for label, peer, passes in (("records", "sae_dashboard", names), ("candidates", "delphi", names[:1])):
        seconds, cpu_s = total("seconds", passes), total("cpu_s", passes)
        found = peers.get(peer, {})
        whole = {}
        if str(sizes[peer][0]) in found:
            whole = {
                key: extrapolate(found, sizes[peer], n_latents, key) if peer == "sae_dashboard" else found[str(n_latents)][key]
                for key in ("seconds", "cpu_s")
            }
        yield {
            "name": f"dashboards_{label}",
            "value": round(seconds, 3),
            "unit": "s",
            "ours": round(seconds, 3),
            "cpu_s": round(cpu_s, 3),
            "rss_gb": round(median(lambda each: max(item["rss_gb"] for item in each["passes"].values())), 3),
            "ratio_to_floor": round(median(lambda each: sum(each["passes"][name]["seconds"] for name in passes) / each["floor"]["seconds"]), 2),  # noqa: B023
            "ratio_to_best_peer": round(whole["seconds"] / seconds, 2) if whole else None,
            "cpu_ratio_to_peer": round(whole["cpu_s"] / cpu_s, 2) if whole else None,
            "peer": {"name": peer, "seconds_at_all_latents": round(whole["seconds"], 1) if whole else None, "measured": found} if found else None,
            "passes": {name: round(total("seconds", [name]), 3) for name in names},
            "bytes": rounds[0]["bytes"],
        }


if __name__ == "__main__":
    main()
