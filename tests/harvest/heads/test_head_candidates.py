"""Statistics of heads: every field against the plain formula in float64, and the same bytes however the work is cut."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from interp_assets.compute.head_loops import FIELDS
from interp_assets.corpus.tokens import context_offsets, load_tokens
from interp_assets.garcon.attention import attention_heard, list_attention
from interp_assets.harvest.heads.candidates import find_head_candidates, load_candidates
from interp_assets.harvest.heads.tokens import classify, load_chosen


def brute_force(world: Any, index: int, layer: int) -> dict[str, np.ndarray]:
    """Return what a layer's heads have of one shard by the plain formula: eager attention, context by context, in float64."""
    tokens, chosen = load_tokens(world.pipeline, world.store, index), load_chosen(world.pipeline, world.store)
    classes, offsets = classify(tokens.token_ids, chosen), context_offsets(tokens.contexts)
    net = world.subject.net
    module = list_attention(net)[layer]
    W_O = module.W_O().double().numpy()
    n_heads, n_classes = module.n_heads, len(chosen) + 1
    sums: dict[str, np.ndarray] = {}

    def add(name: str, value: Any) -> None:
        sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64)

    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        heard: dict[str, Any] = {}
        with attention_heard({module.module: lambda attended: heard.update(it=attended)}), torch.no_grad():  # noqa: B023
            net.base_model(input_ids=torch.from_numpy(tokens.token_ids[start:stop].astype(np.int64))[None])
        it, n = heard["it"], stop - start
        scores = it.scores(0, slice(0, n)).double().numpy()
        values = it.value[0].double().numpy().repeat(n_heads // it.value.shape[1], axis=0)
        sinks = np.full(n_heads, -np.inf) if it.sinks is None else it.sinks.double().detach().numpy()
        exponentials = np.exp(scores - np.maximum(scores.max(axis=-1), sinks[:, None])[..., None])
        sunk = np.exp(sinks[:, None] - np.maximum(scores.max(axis=-1), sinks[:, None]))
        total = exponentials.sum(axis=-1) + sunk
        pattern, sunk = exponentials / total[..., None], sunk / total
        ids, documents, valid = tokens.token_ids[start:stop], tokens.documents[start:stop], tokens.valid[start:stop]
        lengths = np.linalg.norm(np.einsum("hkd,hdm->hkm", values, W_O), axis=-1)
        mixed = np.einsum("hqk,hkd->hqd", pattern, values)
        for q in np.flatnonzero(valid).tolist():
            row, seen = pattern[:, q], np.isfinite(scores[0, q])
            keys, even = np.flatnonzero(seen), seen / seen.sum()
            add("rows", np.ones(n_heads))
            add("self", row[:, q])
            add("uniform_self", even[q])
            add("learned_sink", sunk[:, q])
            if q and seen[q - 1]:
                add("previous", row[:, q - 1])
                add("previous_rows", 1)
                add("uniform_previous", even[q - 1])
            if q and seen[0]:
                add("first", row[:, 0])
                add("first_rows", 1)
                add("uniform_first", even[0])
            again = [j for j in range(q) if ids[j] == ids[q]]
            copied, induced = [j for j in again if seen[j]], [j + 1 for j in again if j + 1 < q and seen[j + 1]]
            for name, places in (("duplicate", copied), ("induction", induced)):
                if places and (name == "duplicate" or not seen[q + 1 :].any()) and (name == "duplicate" or world.subject.is_causal):
                    add(name, row[:, places].sum(axis=1))
                    add(f"{name}_rows", 1)
                    add(f"uniform_{name}", even[places].sum())
            add("other_document", row[:, documents != documents[q]].sum(axis=1))
            add("uniform_other_document", even[documents != documents[q]].sum())
            distances = np.abs(q - np.arange(n))
            add("distance", row @ distances)
            add("distance2", row @ distances**2)
            add("uniform_distance", even @ distances)
            bins = np.array([int(d).bit_length() for d in distances])
            add("distance_mass", np.stack([row[:, bins == b].sum(axis=1) for b in range(20)], axis=1))
            add("uniform_distance_mass", [even[bins == b].sum() for b in range(20)])
            if len(keys) > 1:
                outcomes = np.concatenate([row[:, keys], sunk[:, q : q + 1]], axis=1)
                entropy = -np.sum(np.where(outcomes > 0, outcomes * np.log(np.maximum(outcomes, 1e-300)), 0), axis=1)
                add("entropy", entropy)
                add("entropy_share", entropy / np.log(len(keys) + np.isfinite(sinks)))
                add("spread_rows", 1)
                seen_scores = np.sort(scores[:, q, keys], axis=1)
                add("logit_std", seen_scores.std(axis=1))
                add("logit_margin", seen_scores[:, -1] - seen_scores[:, -2])
                add("logit_z", (seen_scores[:, -1] - seen_scores.mean(axis=1)) / seen_scores.std(axis=1))
            add("output_norm", np.linalg.norm(np.einsum("hd,hdm->hm", mixed[:, q], W_O), axis=-1))
            add("mean_output", mixed[:, q])
            own = np.zeros((n_heads, n_classes))
            np.add.at(own.T, classes[start:stop][1:], row[:, 1:].T)
            add("key_mass", own)
            even_by_class = np.zeros(n_classes)
            np.add.at(even_by_class, classes[start:stop][1:], even[1:])
            add("uniform_key_mass", even_by_class)
            at_query = np.zeros((n_heads, n_classes))
            at_query[:, classes[start + q]] = 1 - sunk[:, q] - row[:, 0]
            add("query_mass", at_query)
            others = [k for k in keys.tolist() if k not in (0, q)]
            if others:
                add("best", (row * lengths)[:, others].max(axis=1))
    return sums


UNITS = {"entropy": 20, "distance": 10, "uniform_distance": 10, "distance2": 0} | dict.fromkeys(
    ("logit_std", "logit_margin", "logit_z", "output_norm", "mean_output"), 16
)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "mistral", "gemma2", "bert", "gptj"])
def test_every_field_is_the_plain_formula(kind: str, make_world: Callable[..., Any]) -> None:
    """Windows, sinks, soft caps, packed documents, padding, grouped heads, both directions: the oracle knows none of the code's shortcuts."""
    world = make_world(kind)
    produced = find_head_candidates(world.pipeline, world.store, world.subject, 1)
    for layer in (0, 1):
        found, _ = load_candidates(world.store, produced.ref, produced.manifest, layer)
        expected = brute_force(world, 1, layer)
        arrays = {name: getattr(found, name) for name in ("distance_mass", "mean_output", "key_mass", "query_mass")}
        arrays |= {f"uniform_{name}": getattr(found, f"uniform_{name}")[0] for name in ("distance_mass", "key_mass")}
        for name in (*FIELDS, *arrays):
            value = arrays[name] if name in arrays else found.sum_of(name)
            if name.endswith("rows"):
                assert (value == expected.get(name, 0)).all(), name
                continue
            n_rows = int(found.sum_of("rows")[0])
            unit = 2.0 ** -UNITS.get(name, 24)
            slack = 3e-6 + unit + (1e-3 if name == "logit_z" else 2e-5 if name.startswith(("logit", "output", "mean_out", "dist")) else 0)
            np.testing.assert_allclose(
                value * unit, np.broadcast_to(expected.get(name, 0.0), value.shape), rtol=1e-5, atol=n_rows * slack, err_msg=name
            )
        assert np.abs(found.missing_mass()).max() <= int(found.sum_of("rows")[0]) << 4
