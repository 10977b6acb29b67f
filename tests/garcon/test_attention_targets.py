"""What adds to a logit or a latent: terms that sum to it, in every family whose norms are known, and a refusal by name elsewhere."""

import re

import numpy as np
import pytest
import torch
from tiny_models import ATTENDING_CONFIGS, D_MODEL, INSIDE, VOCABULARY, make_net, make_subject
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.patterns.targets import Latent, Logit, Terms, explain_targets
from interp_assets.garcon.patterns.view import read_attention
from interp_assets.garcon.subject import SubjectModel
from interp_assets.train.sae import Sae

ROW = [int(token) for token in torch.randint(0, VOCABULARY - 3, (14,), generator=torch.Generator().manual_seed(2))]
REFUSED = ("gpt_neo", "opt_350m", "bert", "distilbert", "roberta", "electra", "deepseek_v3")
SUMMED = [kind for kind in (*INSIDE, *ATTENDING_CONFIGS) if kind not in REFUSED]
TOKEN = 77


def _make_sae() -> Sae:
    generator = torch.Generator().manual_seed(3)
    W_enc, W_dec = torch.randn((D_MODEL, 24), generator=generator), torch.randn((24, D_MODEL), generator=generator)
    return Sae(
        kind="relu", W_enc=W_enc, b_enc=torch.randn(24, generator=generator), W_dec=W_dec, b_dec=torch.ones(D_MODEL), threshold=torch.zeros(24), k=0
    )


def _logits(subject: SubjectModel) -> Tensor:
    """Return the model's logits, centred, before a bound, [positions, vocabulary] float64."""
    cap = getattr(subject.net.config, "final_logit_softcapping", None)
    logits = subject.logits(torch.tensor([ROW]), None)[0].double()
    logits = torch.atanh(logits / cap) * cap if cap else logits
    return logits - logits.mean(dim=1, keepdim=True)


def _sum_up(subject: SubjectModel, terms: Terms) -> tuple[np.ndarray, np.ndarray]:
    """Add edges, embedding, MLPs and biases, without what rounding leaves; beside that the sum of their sizes."""
    seen = read_attention(subject, ROW, [""] * len(ROW))
    parts = [term for name, term in terms.others.items() if name != "rounding"]
    parts += [
        column
        for layer in terms.columns
        for head in range(len(terms.columns[layer]))
        for column in terms.edges(f"{layer}.{head}", seen.pattern(f"{layer}.{head}")).T
    ]
    return np.sum(parts, axis=0), np.sum(np.abs(parts), axis=0)


@pytest.mark.parametrize("kind", SUMMED)
def test_edges_embedding_mlps_and_biases_sum_to_the_logit(kind: str) -> None:
    """The oracle is the model's own logit: window, sink, soft cap, grouped heads, norms behind attention, biases of every kind."""
    subject = make_subject(kind)
    (terms,) = explain_targets(subject, ROW, [Logit(TOKEN)], {})
    found, size = _sum_up(subject, terms)
    expected = _logits(subject)[:, TOKEN].numpy()
    assert (np.abs(found - expected) / size).max() < 1e-6
    assert (np.abs(terms.value - expected) / size).max() < 1e-6
    assert (np.abs(terms.others["rounding"]) / size).max() < 1e-6
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "olmo2", "gptj"])
@pytest.mark.parametrize("layer", [0, 1])
def test_they_sum_to_the_pre_activation_of_a_latent(kind: str, layer: int) -> None:
    """Layers up to the SAE's own, none after; the oracle is the SAE on the rows that it reads."""
    subject, sae = make_subject(kind), _make_sae()
    (terms,) = explain_targets(subject, ROW, [Latent("stream", 5)], {"stream": AttachedSae(sae, f"resid_post.{layer}")})
    found, size = _sum_up(subject, terms)
    rows = subject.capture(torch.tensor([ROW]), None, [f"resid_post.{layer}"])[f"resid_post.{layer}"][0].double()
    expected = (rows @ sae.W_enc[:, 5].double() + sae.b_enc[5].double()).numpy()
    assert (np.abs(found - expected) / size).max() < 1e-6
    assert list(terms.columns) == list(range(layer + 1))
    assert f"mlp.{layer + 1}" not in terms.others


def test_what_a_head_gives_is_the_sum_of_its_edges() -> None:
    """By these numbers heads are told apart without any pattern."""
    subject = make_subject("gemma3_text")
    (terms,) = explain_targets(subject, ROW, [Logit(TOKEN)], {})
    seen = read_attention(subject, ROW, [""] * len(ROW))
    for head in seen.heads():
        layer, place = map(int, head.split("."))
        np.testing.assert_allclose(terms.edges(head, seen.pattern(head)).sum(axis=1), terms.heads[layer][place], atol=1e-6)


def test_half_precision_says_what_rounding_leaves() -> None:
    """bfloat16 sums lose digits; the terms with that loss are the target all the same."""
    subject = SubjectModel(make_net("llama").bfloat16())
    (terms,) = explain_targets(subject, ROW, [Logit(TOKEN)], {})
    everything = sum(terms.others.values()) + sum(found.sum(axis=0) for found in terms.heads.values())
    np.testing.assert_allclose(everything, terms.value, atol=1e-9)
    assert np.abs(terms.others["rounding"]).max() > 1e-4


def test_several_targets_share_a_forward_and_are_named() -> None:
    """A page asks for two at once."""
    targets = [Logit(3), Latent("stream", 5), Logit(4)]
    found = explain_targets(make_subject("gpt2"), ROW, targets, {"stream": AttachedSae(_make_sae(), "resid_post.0")})
    assert [each.name for each in found] == ["logit:3", "feature:stream:5", "logit:4"]
    assert explain_targets(make_subject("gpt2"), ROW, [], {}) == []
    (bounded,) = explain_targets(make_subject("gemma2"), ROW, [Logit(3)], {})
    assert bounded.note == "The logit before it is bounded by 30."


@pytest.mark.parametrize(
    ("kind", "target", "reason"),
    [
        ("bert", Logit(3), "is not known of a bert model here"),
        ("deepseek_v3", Logit(3), "is not known of a deepseek_v3 model here"),
        ("opt_350m", Logit(3), "A opt model has no last norm here"),
        ("gpt_neo", Logit(3), "heads of a gpt_neo model cannot be shown"),
        ("gpt2", Logit(VOCABULARY), f"no token {VOCABULARY}: the model has logits of tokens 0 to {VOCABULARY - 1}"),
        ("gpt2", Latent("none", 1), "No SAE is called 'none' here; there are ['heads', 'stream']"),
        ("gpt2", Latent("stream", 24), "has latents 0 to 23"),
        ("gpt2", Latent("heads", 1), "The SAE 'heads' reads z.0: edges add up to what is read at resid_post.L alone"),
    ],
)
def test_what_has_no_such_sum_is_refused_by_name(kind: str, target: Logit | Latent, reason: str) -> None:
    """Terms that do not sum would be believed."""
    saes = {"stream": AttachedSae(_make_sae(), "resid_post.0"), "heads": AttachedSae(_make_sae(), "z.0")}
    with pytest.raises(InputError, match=re.escape(reason)):
        explain_targets(make_subject(kind), ROW, [target], saes)
