"""What statistics of every attention head cost beside the forward that they are of, in one process.

    python benchmarks/bench_heads.py --quick      512 tokens, four layers: within 30 s on 2 cores
    python benchmarks/bench_heads.py              128, 512 and 2,048 tokens, twelve layers

Sketch before code: of each edge a product of 64 numbers, an exponential and a dozen sums of whole numbers, a few ns in vectors; the forward of a
layer of GPT-2-small takes 14 MFLOP a token. So what is added grows with the length: as T / 2 edges a head and token.

    collector      what a shard's pass adds to its forward, over the forward         goal <= 0.25 at 512 tokens, <= 0.5 at 2,048
    buffer         bytes of scores beside one forward                                goal <= 32 MB

A forward ends when the last layer's attention is heard, so of few layers it is shorter than a whole one's share.

Times are of this process's CPU on one thread, the median of rounds in which both alternate. Blocks are GPT-2-small's with random weights. One JSON
line a case: `value` is what an edge adds, `ratio_to_floor` what is added over the forward.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from floors import report
from transformers import GPT2Config, GPT2Model

from interp_assets.corpus.tokens import TokenShard
from interp_assets.garcon.attention import list_attention
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.heads.candidates import LayerSums, ShardRows
from interp_assets.harvest.heads.reading import FORWARD_TOKENS, QUERIES, hear_shard

VOCABULARY = 1000


def make_tokens(length: int) -> TokenShard:
    """Return one batch of contexts whose tokens are as unequally frequent as words are."""
    n = FORWARD_TOKENS
    token_ids = (np.random.Generator(np.random.Philox(1)).zipf(1.3, n) % VOCABULARY).astype(np.uint32)
    contexts = (np.arange(n) // length).astype(np.uint32)
    return TokenShard(token_ids, contexts, contexts, np.ones(n, np.bool_), None)  # type: ignore[arg-type] - nothing is stored


def measure(length: int, n_layers: int, n_rounds: int) -> None:
    """Print one case."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=n_layers, n_positions=2048, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    model, tokens = SubjectModel(GPT2Model(config).eval(), "GPT-2-small's blocks"), make_tokens(length)
    layers, rows = list_attention(model.net), ShardRows(tokens, np.arange(512, dtype=np.uint32), 0, 0)

    def run(*, is_heard: bool) -> float:
        sums = {layer.layer: LayerSums(layer, rows) for layer in layers}
        began = time.process_time()
        for _ in hear_shard(model, layers, tokens, 0, lambda layer, heard, places: sums[layer.layer].add(heard, places) if is_heard else None):
            pass
        return time.process_time() - began

    run(is_heard=True)
    pairs = [(run(is_heard=False), run(is_heard=True)) for _ in range(n_rounds)]
    forward_s, added_s = statistics.median(bare for bare, _ in pairs), statistics.median(heard - bare for bare, heard in pairs)
    n_heads = layers[0].n_heads
    line = {
        "name": f"collector, {length:,} tokens",
        "value": round(added_s / (len(tokens.token_ids) * length / 2 * n_heads * n_layers) * 1e9, 2),
        "unit": "ns an edge",
        "ours": True,
        "ratio_to_floor": round(added_s / forward_s, 3),
        "ratio_to_best_peer": None,
        "buffer_bytes": n_heads * QUERIES * length * 4,
        "config": {"tokens": length, "layers": n_layers, "heads": n_heads},
    }
    report(line)


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    for length in (512,) if quick else (128, 512, 2048):
        measure(length, 4 if quick else 12, 2 if quick else 5)


if __name__ == "__main__":
    main()
