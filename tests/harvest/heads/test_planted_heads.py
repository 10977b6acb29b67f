"""A model whose heads are built by hand is told by its statistics: induction, previous, first, self and duplicate heads, and nothing else so."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from interp_assets.corpus.tokens import TokenShard
from interp_assets.garcon.attention import list_attention
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.heads.candidates import LayerSums, ShardRows
from interp_assets.harvest.heads.reading import hear_shard

N_TOKENS, N_PLACES, D_HEAD, N_HEADS = 24, 64, 128, 4
D_MODEL = D_HEAD * N_HEADS
SHARP = 60.0
TOKEN, PLACE, EARLIER = slice(0, N_TOKENS), slice(N_TOKENS, N_TOKENS + N_PLACES), slice(N_TOKENS + N_PLACES, 2 * N_TOKENS + N_PLACES)
"""Subspaces of the residual stream: own token, own place, the token before (written by the first layer)."""


def build_model() -> SubjectModel:
    """Build two layers of attention alone. Layer 0: previous, first, self, duplicate; layer 1: induction, and three that look evenly."""
    config = GPT2Config(n_layer=2, n_head=N_HEADS, n_embd=D_MODEL, n_positions=N_PLACES, vocab_size=N_TOKENS, bos_token_id=0, eos_token_id=0)
    net = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        net.transformer.wte.weight[:, TOKEN] = torch.eye(N_TOKENS)
        net.transformer.wpe.weight[:, PLACE] = torch.eye(N_PLACES)
    for block in net.transformer.h:
        block.ln_1 = torch.nn.Identity()
        block.mlp = torch.nn.Identity()
        block.mlp.forward = torch.zeros_like
    first, second = (block.attn for block in net.transformer.h)
    places, tokens = torch.eye(N_PLACES), torch.eye(N_TOKENS)
    _plant(first, 0, (PLACE, torch.roll(places, -1, dims=1)), (PLACE, places))  # row p asks for place p - 1
    to_first = torch.zeros(N_PLACES, N_PLACES)
    to_first[:, 0] = 1
    _plant(first, 1, (PLACE, to_first), (PLACE, places))
    _plant(first, 2, (PLACE, places), (PLACE, places))
    _plant(first, 3, (TOKEN, tokens), (TOKEN, tokens), not_self=True)
    _plant(second, 0, (TOKEN, tokens), (EARLIER, tokens))
    with torch.no_grad():  # the previous head writes the token that it looks at
        first.c_attn.weight[TOKEN, 2 * D_MODEL : 2 * D_MODEL + N_TOKENS] = tokens
        first.c_proj.weight[:N_TOKENS, EARLIER] = tokens
    return SubjectModel(net, "planted")


def _plant(attention: Any, head: int, query: tuple[slice, torch.Tensor], key: tuple[slice, torch.Tensor], *, not_self: bool = False) -> None:
    """Let a head match what its query asks of one subspace with what keys have in another; the product of matches is `SHARP`."""
    n = query[1].shape[1]
    scale = (SHARP * D_HEAD**0.5) ** 0.5
    own = head * D_HEAD
    with torch.no_grad():
        attention.c_attn.weight[query[0], own : own + n] = query[1] * scale
        attention.c_attn.weight[key[0], D_MODEL + own : D_MODEL + own + n] = key[1] * scale
        if not_self:  # the same place counts against
            attention.c_attn.weight[PLACE, own + n : own + n + N_PLACES] = -torch.eye(N_PLACES) * scale
            attention.c_attn.weight[PLACE, D_MODEL + own + n : D_MODEL + own + n + N_PLACES] = torch.eye(N_PLACES) * scale


def make_tokens(n_contexts: int = 6, length: int = 48) -> TokenShard:
    """Return contexts of random tokens, the second half of each a repetition of the first."""
    generator = np.random.Generator(np.random.Philox(5))
    halves = np.stack([generator.permutation(N_TOKENS)[: length // 2] for _ in range(n_contexts)])
    token_ids = np.concatenate([halves, halves], axis=1).reshape(-1).astype(np.uint32)
    contexts = np.repeat(np.arange(n_contexts), length).astype(np.uint32)
    return TokenShard(token_ids, contexts, contexts, np.ones(len(token_ids), np.bool_), None, None)  # type: ignore[arg-type] - nothing is stored


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    """Return all statistics of all heads."""
    model, tokens = build_model(), make_tokens()
    layers = list_attention(model.net)
    rows = ShardRows(tokens, np.arange(N_TOKENS, dtype=np.uint32), 0, 0)
    sums = {layer.layer: LayerSums(layer, rows) for layer in layers}
    for _ in hear_shard(model, layers, tokens, 0, lambda layer, heard, places: sums[layer.layer].add(heard, places)):
        pass
    names = ("induction", "previous", "first", "self", "duplicate")
    return {
        f"{layer}.{head}": {name: float(found.statistics.mean_of(name)[head]) for name in names} for layer, found in sums.items() for head in range(4)
    }


@pytest.mark.parametrize(("head", "kind"), [("0.0", "previous"), ("0.1", "first"), ("0.2", "self"), ("0.3", "duplicate"), ("1.0", "induction")])
def test_a_planted_head_is_found_and_no_other_looks_so(head: str, kind: str, measured: dict[str, dict[str, float]]) -> None:
    """The mechanism is known because it was built: the score of its head is near one and that of every other head near chance."""
    assert measured[head][kind] > 0.95
    others = {name: scores[kind] for name, scores in measured.items() if name != head}
    assert max(others.values()) < 0.15, others
