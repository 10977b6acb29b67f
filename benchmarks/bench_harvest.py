"""Harvesting beside the bare forward, SAELens' cache, TransformerLens' bridge and nnsight, in one run.

    make bench-harvest QUICK=1                                          small: within 45 s on 2 cores, without peers
    make bench-harvest BENCH_ARGS="--peers .peers-lens/bin/python"      full, with the peers: minutes

Sketch before code: a row costs two operations a parameter of the blocks below the hook point, 2 x 12 d^2 a block: at d 512 and 3 blocks 19 MFLOP,
0.1 ms on two cores that do 200 GFLOP/s. What harvesting adds to a row are a copy, a cast, a test for finiteness, a sum and a sum of squares, a
checksum and 4 d bytes of a file: some ten passes over 2 KB, 1 us. So ours should take what the forward takes; padding is the other loss, and the
floor has it too: it runs the same batches, of documents whose lengths round up to the same multiple of 16, and keeps nothing.

    floor       Hugging Face's network on these batches, stopped by an exception at the block's output     goal: ours <= 1.05 of its time
    ours        `harvest_shard`: token shard to published activation shard, on disk, with checksums and statistics
    sae_lens    its cache, which writes Arrow; rows of one length, so it gets the same tokens cut into rows of 128    goal: >= 2 x faster
    transformer_lens, nnsight    read only: activations in memory, no file

Floor, ours and peers alternate. One JSON line a shape and stored type; networks compute in float32, `dtype` is what is stored:

    value                  rows per second of ours, by the median of the rounds
    ours, floor, peers     wall seconds of the median round; a peer that cannot do it says why
    ratio_to_floor         median of ours / floor beside it; `cpu_ratio_to_floor` of their CPU seconds, which a loaded machine disturbs less
    ratio_to_best_peer     fastest peer / ours: above 1 is faster; `cpu_ratios_to_peers` by CPU seconds, each
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as under our command line

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from children import Child, measured, open_children
from floors import report
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from interp_assets.compute.products import use_fastest_products
from interp_assets.compute.seeds import stream
from interp_assets.corpus.refs import token_shard_ref
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.activations import FORWARD_TOKENS, Batch, harvest_shard, make_batches
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.storage.manifest import create_artifact
from interp_assets.storage.store import Store, open_store

PEERS = ("sae_lens", "transformer_lens", "nnsight")
VOCABULARY, CONTEXT, MEDIAN_LENGTH = 1024, 512, 96


class Shape(NamedTuple):
    """One architecture: how its blocks are called, and whether it looks both ways."""

    blocks: str
    is_encoder: bool
    make: Callable[[int, int], Any]


def _sizes(d: int, layers: int) -> dict[str, Any]:
    heads = {"num_attention_heads": d // 64 or 1, "intermediate_size": 4 * d}
    return {"hidden_size": d, "num_hidden_layers": layers, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, **heads}


_WORDS: Any = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
SHAPES = {
    "gpt2": Shape("transformer.h", False, lambda d, n: GPT2Config(n_embd=d, n_layer=n, n_head=d // 64 or 1, n_positions=CONTEXT, **_WORDS)),
    "llama": Shape("model.layers", False, lambda d, n: LlamaConfig(**_sizes(d, n))),
    "minilm": Shape("encoder.layer", True, lambda d, n: BertConfig(**_sizes(d, n))),
}


class Case:
    """A network with random weights, documents of mixed length, and the batches that both floor and ours run."""

    def __init__(self, folder: Path, name: str, d_in: int, n_layers: int, n_tokens: int) -> None:
        """Make them, and save for the peers what they need."""
        self.shape, self.folder, self.layer, self.d_in = SHAPES[name], folder, n_layers // 2, d_in
        torch.manual_seed(0)
        kind = AutoModel if self.shape.is_encoder else AutoModelForCausalLM
        self.net: PreTrainedModel = kind.from_config(self.shape.make(d_in, n_layers)).eval()
        self.subject = SubjectModel(self.net, name)
        rng = stream(0, "bench").generator()
        lengths = np.clip(np.round(MEDIAN_LENGTH * np.exp(0.8 * rng.standard_normal(n_tokens))), 8, CONTEXT).astype(np.int64)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), n_tokens)) + 1]
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.token_ids = rng.integers(1, VOCABULARY, int(self.offsets[-1])).astype(np.uint32)
        sizes = {"max_context": CONTEXT, "must_see_mask": self.shape.is_encoder}
        self.batches: list[Batch] = list(make_batches(self.token_ids, self.offsets, FORWARD_TOKENS, **sizes))
        self._n_runs = 0

    @property
    def module(self) -> str:
        """Name the module whose output is read."""
        return f"{self.shape.blocks}.{self.layer}"

    def save(self) -> None:
        """Write model, tokenizer and batches for the peers."""
        self.net.save_pretrained(self.folder / "model")
        words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w0", eos_token="w0", pad_token="w0").save_pretrained(
            self.folder / "model"
        )
        arrays = {f"ids{i}": batch.token_ids.numpy() for i, batch in enumerate(self.batches)}
        arrays |= {f"mask{i}": batch.attention_mask.numpy() for i, batch in enumerate(self.batches)}
        np.savez(self.folder / "batches.npz", **arrays)

    @torch.no_grad()
    def run_floor(self) -> None:
        """Run the network on every batch up to the block, and keep nothing."""

        def stop(*_: Any) -> None:
            raise _StopError

        handle = self.net.get_submodule(self.module).register_forward_hook(stop)
        base = self.net.base_model
        try:
            for batch in self.batches:
                mask = {"attention_mask": batch.attention_mask} if self.shape.is_encoder else {"use_cache": False}
                try:
                    base(batch.token_ids, **mask)
                except _StopError:
                    continue
        finally:
            handle.remove()

    def prepare(self, dtype: str) -> Callable[[], object]:
        """Publish the token shard in a new store and return the harvest of it."""
        pipeline, store = self.publish(dtype)
        return lambda: self.harvest(pipeline, store)

    def harvest(self, pipeline: Pipeline, store: Store) -> None:
        """Make the activation shard."""
        harvest_shard(pipeline, store, self.subject, 0)

    def publish(self, dtype: str) -> tuple[Pipeline, Store]:
        """Publish the token shard in a new store."""
        self._n_runs += 1
        hook = f"resid_post.{self.layer}"
        content = {"harvest": {"hook_points": [hook], "dtype": dtype}, "saes": [{"hook_point": hook}]}
        source = ShardSource(index=0, fingerprint="f", n_documents=1, n_bytes=1, spec={})
        plan = PipelinePlan(
            shards=[source], tokenizer_fingerprint="t", model_fingerprint="m", hook_widths={hook: self.d_in}, vocabulary_size=VOCABULARY,
            max_context=CONTEXT,
        )  # fmt: skip
        pipeline = Pipeline(make_config(content), plan)
        store = open_store(str(self.folder / f"store-{self._n_runs}"))
        documents = np.repeat(np.arange(len(self.offsets) - 1, dtype=np.uint32), np.diff(self.offsets))
        columns = {"token_id": self.token_ids, "context": documents, "document": documents, "valid": np.ones(len(documents), np.bool_)}
        with create_artifact(store, token_shard_ref(pipeline, 0)) as art:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table(columns), sink)
            art.put("tokens.parquet", sink.getvalue().to_pybytes())
            art.facts |= {"n_rows": len(documents), "n_valid": len(documents)}
        return pipeline, store


class _StopError(Exception):
    """The block was reached."""


def compare(case: Case, name: str, dtype: str, peers: list[tuple[str, Child]], n_rounds: int) -> dict[str, Any]:
    """Let all take turns."""
    wanted = {
        "folder": str(case.folder), "module": case.module, "layer": case.layer, "d_in": case.d_in, "dtype": dtype,
        "is_encoder": case.shape.is_encoder,
    }  # fmt: skip
    made = {peer: child.ask(make={"peer": peer, **wanted}) for peer, child in peers}
    case.run_floor()
    case.prepare(dtype)()
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(n_rounds):
        found.setdefault("floor", []).append(measured(case.run_floor))
        found.setdefault("ours", []).append(measured(case.prepare(dtype)))
        for peer, child in peers:
            if made[peer]["made"]:
                found.setdefault(peer, []).append(child.ask(run=True))
    typical = {who: {key: statistics.median(each[key] for each in rounds) for key in ("seconds", "cpu_s")} for who, rounds in found.items()}
    ours, others = typical["ours"], [peer for peer in PEERS if peer in typical]
    beside = list(zip(found["ours"], found["floor"], strict=True))
    n_rows = int(case.offsets[-1])
    return {
        "name": f"harvest_{name}",
        "value": round(n_rows / ours["seconds"]),
        "unit": "rows/s",
        "ours": round(ours["seconds"], 4),
        "floor": round(typical["floor"]["seconds"], 4),
        "peers": {peer: round(typical[peer]["seconds"], 4) if peer in typical else answer["because"] for peer, answer in made.items()} or None,
        "ratio_to_floor": round(statistics.median(a["seconds"] / b["seconds"] for a, b in beside), 3),
        "cpu_ratio_to_floor": round(statistics.median(a["cpu_s"] / b["cpu_s"] for a, b in beside), 3),
        "ratio_to_best_peer": round(min(typical[peer]["seconds"] for peer in others) / ours["seconds"], 3) if others else None,
        "cpu_ratios_to_peers": {peer: round(typical[peer]["cpu_s"] / ours["cpu_s"], 3) for peer in others} or None,
        "rounds": n_rounds,
        "config": {
            "rows": n_rows, "documents": len(case.offsets) - 1, "padded": sum(batch.token_ids.numel() for batch in case.batches),
            "d_in": case.d_in, "blocks": case.layer + 1, "stored": dtype, "threads": torch.get_num_threads(),
        },
    }  # fmt: skip


def main() -> None:
    """Print one line a shape and type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="width 256 of 4 layers, 8,192 tokens, 2 rounds")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="in which rows are stored")
    parser.add_argument("--d-in", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--peers", default=os.environ.get("BENCH_PEERS", ""), help="interpreter of the environment that has the peers")
    parser.add_argument("--append", default="", help="also append the lines to this file")
    chosen = parser.parse_args()
    d_in, n_layers, n_tokens, n_rounds = (256, 4, 8192, 2) if chosen.quick else (512, 6, 16384, 5)
    use_fastest_products()
    with open_children(chosen.peers, "harvest_peers.py", PEERS, str(torch.get_num_threads())) as peers:
        for name in chosen.shapes:
            with tempfile.TemporaryDirectory() as folder:
                case = Case(Path(folder), name, chosen.d_in or d_in, chosen.layers or n_layers, chosen.tokens or n_tokens)
                if peers:
                    case.save()
                for dtype in chosen.dtypes:
                    report(compare(case, name, dtype, peers, chosen.rounds or n_rounds), chosen.append)


if __name__ == "__main__":
    main()
