"""Pairs of latents that an edge is made of: they sum to its score and to what it writes, in every family, and are the pairs of the plain formula."""

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import ATTENDING_CONFIGS, CONTEXT, D_MODEL, INSIDE, MORE_CONFIGS, VOCABULARY, make_net, make_subject
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from interp_assets.errors import InputError, TooLargeError
from interp_assets.garcon.attention import Attended, attention_heard, list_attention
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.patterns.pairs import BIAS, ERROR, OTHER, Edge, EdgeTerms, explain_edge
from interp_assets.garcon.patterns.targets import Latent, Logit, explain_targets
from interp_assets.garcon.patterns.view import read_attention
from interp_assets.garcon.points import norm_divisor
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.weights import read_weight
from interp_assets.train.sae import Sae

ROW = [int(token) for token in torch.randint(0, VOCABULARY - 3, (14,), generator=torch.Generator().manual_seed(5))]
REFUSED = ("gpt_neo", "deepseek_v3")
KINDS = [kind for kind in (*INSIDE, *ATTENDING_CONFIGS) if kind not in REFUSED]
EDGE = Edge(1, 1, 11, 9)


def _make_sae(seed: int = 3, *, bias: float = -1.0) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    W_enc, W_dec = torch.randn((D_MODEL, 24), generator=generator), torch.randn((24, D_MODEL), generator=generator)
    return Sae(kind="relu", W_enc=W_enc, b_enc=torch.full((24,), bias), W_dec=W_dec, b_dec=torch.ones(D_MODEL), threshold=torch.zeros(24), k=0)


SAES = {"before": AttachedSae(_make_sae(), "resid_post.0"), "after": AttachedSae(_make_sae(4), "resid_post.1")}


def _hear(subject: SubjectModel, layer: int) -> Attended:
    found: list[Attended] = []
    (module,) = [each.module for each in list_attention(subject.net) if each.layer == layer]
    with attention_heard({module: found.append}), torch.no_grad():
        subject.net.base_model(**subject.arguments(torch.tensor([ROW]), None))
    return found[0]


def _check_sums(subject: SubjectModel, found: EdgeTerms, edge: Edge, within: float) -> None:
    """Compare with the queries and keys that the model itself has."""
    heard, size = _hear(subject, edge.layer), np.abs(found.pairs).sum()
    shared = edge.head * heard.key.shape[1] // heard.query.shape[1]
    scores = heard.rescale(heard.key[0, shared].double() @ heard.query[0, edge.head, edge.query].double())
    sees = heard.sees(0, slice(edge.query, edge.query + 1))
    visible = scores if sees is None else scores[sees[0]]
    assert found.pairs.sum() == pytest.approx(found.score - found.mean, abs=1e-12 * size)
    assert abs(found.score - float(scores[edge.key])) < within * size
    assert abs(found.mean - float(visible.mean())) < within * size
    assert size > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_sum_to_the_score_and_terms_to_what_is_written(kind: str) -> None:
    """Rotary and learned positions, grouped heads, windows, caps, norms of queries and keys, biases: the oracle is the model's own product."""
    subject = make_subject(kind)
    can_write = subject.is_causal and kind != "opt_350m"
    targets = [Latent("after", 7), Logit(5), Latent("before", 2)] if can_write else []
    found = explain_edge(subject, ROW, EDGE, SAES, "before", targets)
    _check_sums(subject, found, EDGE, 1e-6)
    assert found.pairs.shape == (len(found.queries), len(found.keys))
    assert (found.queries[-2:], found.keys[-3:]) == ([ERROR, BIAS], [ERROR, BIAS, OTHER])
    pattern = read_attention(subject, ROW, [""] * len(ROW)).pattern("1.1")
    assert found.mass == pytest.approx(float(pattern[EDGE.query, EDGE.key]), rel=1e-5)
    for terms in explain_targets(subject, ROW, targets, SAES):
        written = found.written[terms.name]
        expected = terms.edges("1.1", pattern)[EDGE.query, EDGE.key] if 1 in terms.columns else 0.0
        assert written.shape == (len(found.keys) - 1,)
        assert abs(written.sum() - expected) <= 1e-6 * np.abs(written).sum()
        assert (np.abs(written).sum() > 1e-4) == (terms.name != "feature:before:2")


@pytest.mark.parametrize("kind", ["phi", "stablelm"])
def test_norms_of_queries_and_keys_that_a_family_has_at_choice_are_frozen_too(kind: str) -> None:
    """One norm for all heads, or one a head, both centred and with a bias."""
    config = deepcopy({**MORE_CONFIGS, **ATTENDING_CONFIGS}[kind])
    config.qk_layernorm = True
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    subject = SubjectModel(net)
    _check_sums(subject, explain_edge(subject, ROW, EDGE, SAES, "before"), EDGE, 1e-6)


def test_in_float64_nothing_is_left() -> None:
    """Where the model is in float64 itself, its score is met to the last digits."""
    subject = SubjectModel(make_net("gpt_neox").double())
    _check_sums(subject, explain_edge(subject, ROW, EDGE, SAES, "before"), EDGE, 1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_each_pair_is_that_of_the_plain_formula(kind: str) -> None:
    """A sum can be right with its terms exchanged: without rotary embedding, and with it at both positions."""
    subject, sae = make_subject(kind), SAES["before"].sae
    found = explain_edge(subject, ROW, EDGE, SAES)
    x = subject.capture(torch.tensor([ROW]), None, ["resid_pre.1"])["resid_pre.1"][0]
    norm: Any = subject.net.base_model.get_submodule("h.1.ln_1" if kind == "gpt2" else "layers.1.input_layernorm")
    sigma, latents = norm_divisor(norm, x).double(), sae.encode(x).double()
    turn = _make_turn(subject) if kind == "llama" else lambda state, _: state

    def carry(weight: str, head: int, position: int, latent: int) -> Tensor:
        d = sae.W_dec[latent].double()
        d = d - d.mean() if kind == "gpt2" else d
        state = (d * norm.weight.double() / sigma[position]) @ read_weight(subject.net, weight, head).double()
        return latents[position, latent] * turn(state, position)

    i, j = found.queries[2], found.keys[1]
    shared = 1 if kind == "gpt2" else 0
    query = carry("W_Q.1", 1, EDGE.query, int(i))
    keys = torch.stack([carry("W_K.1", shared, position, int(j)) for position in range(EDGE.query + 1)])
    expected = float(query @ (keys[EDGE.key] - keys.mean(dim=0))) / query.shape[0] ** 0.5
    assert found.pairs[2, 1] == pytest.approx(expected, rel=1e-5)
    assert abs(expected) > 1e-4


def _make_turn(subject: SubjectModel) -> Callable[[Tensor, int], Tensor]:
    rotary: Any = subject.net.base_model.rotary_emb
    cos, sin = rotary(torch.zeros(1, 1).double(), torch.arange(CONTEXT)[None])

    def turn(state: Tensor, position: int) -> Tensor:
        one = state[None, None, None]
        return apply_rotary_pos_emb(one, one, cos[:, [position]], sin[:, [position]])[0][0, 0, 0]

    return turn


def test_a_soft_cap_has_its_slope_beside() -> None:
    """Terms are before the cap: near it a pair counts for less."""
    config = deepcopy(make_net("gemma2").config)
    config.attn_logit_softcapping = 2.0
    subject = SubjectModel(AutoModelForCausalLM.from_config(config).eval())
    subject.net.load_state_dict(make_net("gemma2").state_dict())
    found = explain_edge(subject, ROW, EDGE, SAES, "before")
    h = 1e-6
    slope = (2.0 * np.tanh((found.score + h) / 2.0) - 2.0 * np.tanh((found.score - h) / 2.0)) / (2 * h)
    assert found.slope == pytest.approx(slope, rel=1e-6)
    assert found.slope < 0.99
    assert explain_edge(make_subject("llama"), ROW, EDGE, SAES, "before").slope == 1.0


@pytest.mark.parametrize(
    ("kind", "edge", "sae", "reason"),
    [
        ("gpt2", Edge(0, 0, 5, 3), "", "take an SAE at resid_pre.0, what the layer reads. There are: before at resid_post.0, after at resid_post.1"),
        ("gpt2", Edge(1, 0, 5, 3), "after", "'after' reads resid_post.1, layer 1 reads resid_pre.1 or resid_post.0"),
        ("gpt2", Edge(1, 0, 5, 3), "none", "No SAE is called 'none' here; there are ['after', 'before']"),
        ("gpt2", Edge(1, 2, 5, 3), "", "no head 1.2; layer 1 has heads 0 to 1"),
        ("gpt2", Edge(7, 0, 5, 3), "", "no attention in layer 7; those that attend are [0, 1]"),
        ("gpt2", Edge(1, 0, 3, 5), "", "no edge from query 3 to key 5"),
        ("gpt2", Edge(1, 0, 14, 5), "", "no edge from query 14 to key 5"),
        ("mistral", Edge(1, 0, 11, 2), "", "Query 11 does not see key 2: it is outside of the window of layer 1"),
        ("deepseek_v3", Edge(1, 0, 5, 3), "", "not known of a deepseek_v3 model here"),
        ("gpt_neo", Edge(1, 0, 5, 3), "", "heads of a gpt_neo model cannot be shown"),
    ],
)
def test_what_has_no_pairs_is_refused_by_name(kind: str, edge: Edge, sae: str, reason: str) -> None:
    """With the point at which an SAE would do."""
    with pytest.raises(InputError, match=re.escape(reason)):
        explain_edge(make_subject(kind), ROW, edge, SAES, sae)


def test_two_saes_that_would_do_are_named_and_dense_ones_refused() -> None:
    """Nothing is chosen in silence, and no answer is as long as all latents squared."""
    with pytest.raises(InputError, match=re.escape("Several SAEs read resid_pre.1 or resid_post.0: name one of ['before', 'twin']")):
        explain_edge(make_subject("gpt2"), ROW, EDGE, {**SAES, "twin": SAES["before"]})
    wide = Sae(
        kind="relu",
        W_enc=torch.zeros(D_MODEL, 6000),
        b_enc=torch.ones(6000),
        W_dec=torch.zeros(6000, D_MODEL),
        b_dec=torch.ones(D_MODEL),
        threshold=torch.zeros(6000),
        k=0,
    )
    with pytest.raises(TooLargeError, match="6,000 latents fire at the key"):
        explain_edge(make_subject("gpt2"), ROW, EDGE, {"wide": AttachedSae(wide, "resid_post.0")})
