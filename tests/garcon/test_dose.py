"""Dose curves: one batch of all strengths, arms and prompts gives what each text alone gives, and controls are what they say."""

import re
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import D_MODEL, make_subject, make_tokenizer

from interp_assets.errors import InputError
from interp_assets.garcon.features import AttachedSae, Firings
from interp_assets.garcon.session import Model
from interp_assets.garcon.steering.dose import ARMS, DIFFERENCE, Dose
from interp_assets.train.sae import Sae

PROMPTS = ["hello wine", "hal", "some other text"]
STEER = [{"sae": "l0", "latent": 4, "clamp": "1 max"}]


def _model() -> Model:
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn((D_MODEL, 40), generator=generator) * 0.3, torch.randn((40, D_MODEL), generator=generator)
    zeros = torch.zeros(40)
    sae = Sae(kind="relu", W_enc=W_enc, b_enc=zeros, W_dec=W_dec, b_dec=torch.ones(D_MODEL), threshold=zeros, k=0)
    maximum = torch.ones(40) * 2.0
    maximum[10:20] = 0  # dead
    firings = Firings(maximum, torch.linspace(0.01, 0.4, 40), lambda latent, share: 2 * share)
    return Model(make_subject("llama"), make_tokenizer(), {"l0": AttachedSae(sae, "resid_post.0", firings=firings)})


@pytest.fixture(scope="module")
def dose() -> Dose:
    """Two strengths of one latent."""
    return _model().dose(STEER, prompts=PROMPTS, strengths=[-3, 5], new_tokens=6, metric=["a", "b"], n=2, temperature=1.0)


def test_every_text_of_the_batch_is_what_it_is_alone(dose: Dose) -> None:
    """Scores, texts and what the latent reads; the oracle writes one text at a time."""
    llm = _model()
    for strength, value in (("-3 max", -6.0), ("5 max", 10.0)):
        for arm, latent, times in (("feature", 4, 1.0), ("zero", 4, 0.0)):
            for prompt, text in enumerate(PROMPTS):
                steer = [{"sae": "l0", "latent": latent, "clamp": f"{value * times} raw"}]
                alone = llm.generate(text, new_tokens=6, n=2, temperature=1.0, steer=steer, compare=True)
                chosen = dose.texts.filter((pl.col("arm") == arm) & (pl.col("prompt") == prompt))
                chosen = (chosen if arm == "zero" else chosen.filter(pl.col("strength") == strength)).sort("continuation")
                for i, found in enumerate(alone.generated.texts):
                    tokens = found.tokens
                    assert chosen["text"][i] == llm.tokenizer.decode([token.token for token in tokens])
                    assert chosen["kl"][i] == pytest.approx(np.mean([token.kl for token in tokens]), rel=1e-3, abs=1e-6)
                    assert chosen["perplexity"][i] == pytest.approx(np.exp(-np.mean([token.base_logprob for token in tokens])), rel=1e-3)
                    pairs = [(first.token, second.token) for first, second in pairwise(tokens)]
                    assert chosen["distinct_2"][i] == pytest.approx(len(set(pairs)) / len(pairs))
                    effect = alone.generated.effects[0]
                    assert chosen["f_after"][i] == pytest.approx(float(effect.after[i, 0]), rel=1e-3, abs=1e-4)
                    assert chosen["moved"][i] == pytest.approx(float(effect.moved[i]), rel=1e-3)


def test_controls_are_moved_as_far_or_in_their_own_units(dose: Dose) -> None:
    """A random and the opposite direction move each token as far as the feature does at the first forward; another latent is live and as frequent."""
    assert set(dose.texts["arm"]) == set(ARMS)
    assert dose.texts.height == (2 * 4 + 1) * 3 * 2
    llm = _model()
    prompt = llm.dose(STEER, prompts=PROMPTS[:1], strengths=[5], new_tokens=1)  # one forward: the same activations in every arm
    moved = {line["arm"]: line["moved"] for line in prompt.texts.to_dicts()}
    assert moved["random"] == pytest.approx(moved["feature"], rel=1e-5)
    assert moved["flip"] == pytest.approx(moved["feature"], rel=1e-5)
    assert moved["zero"] < moved["feature"]
    assert moved["other"] != moved["feature"]


def test_the_table_has_intervals_and_what_is_left_of_the_controls(dose: Dose) -> None:
    """Means lie in their intervals; the difference is paired by text."""
    table = dose.table()
    assert set(table["outcome"]) == {"kl", "perplexity", "distinct_2", "f_after", "moved", "metric"}
    assert (table["low"] <= table["mean"]).all()
    assert (table["mean"] <= table["high"]).all()

    def mean(arm: str, outcome: str = "kl") -> float:
        return table.filter((pl.col("arm") == arm) & (pl.col("outcome") == outcome) & (pl.col("strength") == "5 max"))["mean"][0]

    assert mean(DIFFERENCE) == pytest.approx(mean("feature") - (mean("other") + mean("random")) / 2)
    assert table.equals(dose.table())
    drawn = dose._repr_html_()
    assert drawn.count("<svg") == 6
    assert drawn.count("<polyline") == 6 * 6
    assert "Latent 4 of l0 at resid_post.0" in repr(dose)


def test_a_metric_is_the_log_probability_of_the_tokens_that_are_named() -> None:
    """The oracle reads the logits of the steered model over the whole text."""
    llm = _model()
    dose = llm.dose(STEER, prompts="hello wine", strengths=[5], new_tokens=4, metric=["a", "b"])
    line = dose.texts.filter(pl.col("arm") == "feature").row(0, named=True)
    row = llm.tokenize("hello wine")[0]
    new = llm.generate("hello wine", new_tokens=4, steer=[{"sae": "l0", "latent": 4, "clamp": "5 max"}]).generated.texts[0].tokens
    with llm.trace([[*row, *(token.token for token in new)]]) as t:
        t.sae_clamp("l0", {4: "10 raw"})
        logits = t.read("logits", after=True)
    log = logits.tensor[0, len(row) - 1 : -1].log_softmax(-1)
    expected = torch.logsumexp(log[:, [llm.token("a"), llm.token("b")]], dim=1).mean()
    assert line["metric"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steer": [{"point": "resid_post.0", "scale": 2.0}]}, "A dose curve is of one clamped latent at some strengths; the recipe clamps 0"),
        ({"steer": STEER * 2}, "the recipe clamps 2"),
        ({"strengths": []}, "the strengths are []"),
        ({"unit": "furlongs"}, "The strength of latent 4 of 'l0' has a unit"),
        ({"steer": [{"sae": "l0", "latent": 12, "clamp": "1 raw"}]}, "it is dead"),
        ({"new_tokens": 0}, "at new_tokens"),
        ({"metric": ["no token"]}, "'no token' is 8 tokens"),
    ],
)
def test_what_is_no_dose_is_refused(change: dict[str, Any], message: str) -> None:
    """Before anything is written."""
    options: dict[str, Any] = {"steer": STEER, "prompts": PROMPTS, "strengths": [1], "new_tokens": 2, **change}
    with pytest.raises(InputError, match=re.escape(message)):
        _model().dose(options.pop("steer"), **options)


def test_without_firings_there_is_no_other_latent() -> None:
    """Strengths are raw then, and the difference is to the random direction alone."""
    llm = _model()
    llm.saes = {"l0": llm.saes["l0"]._replace(firings=None)}
    dose = llm.dose([{"sae": "l0", "latent": 4, "clamp": "1 raw"}], prompts="hal", strengths=[3], unit="raw", new_tokens=3)
    assert set(dose.texts["arm"]) == {"feature", "random", "flip", "zero"}
    assert not dose.table().filter(pl.col("arm") == DIFFERENCE).is_empty()
