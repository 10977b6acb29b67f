"""SAEs of every architecture and origin, transcoders and crosscoders: a clamp is full decoding plus the error, and a wrong place is noticed."""

import itertools
import re
from typing import Any

import pytest
import torch
from tiny_models import D_MODEL, make_subject, make_tokenizer
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.features import AttachedSae, Fit
from interp_assets.garcon.points import find_point
from interp_assets.garcon.session import Model
from interp_assets.planning.config import SaeConfig
from interp_assets.train.exchange.formats import Scaler, from_saelens
from interp_assets.train.fold import fold_weights
from interp_assets.train.recipes import RECIPES, Normalization
from interp_assets.train.sae import Sae

D_SAE = 24
SETTINGS: dict[int, str] = {3: "2.5 raw", 7: "0 raw", 11: "-1 raw"}


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.4


def _trained(architecture: str, widths: tuple[int, ...] = (D_MODEL,), task: str = "sae") -> Sae:
    """Fold random trained weights over rows that were centred and scaled."""
    more = {"more_hook_points": ("resid_post.1",)} if task == "crosscoder" else {"target_hook_point": "mlp_out.1"} if task != "sae" else {}
    config = SaeConfig.model_validate({"architecture": architecture, "d_sae": D_SAE, "k": 4, "task": task, "hook_point": "resid_post.0", **more})
    width = sum(widths)
    weights = {"W_enc_T": _draw(D_SAE, width), "b_enc": _draw(D_SAE, seed=1), "W_dec": _draw(D_SAE, width, seed=2), "b_dec": _draw(width, seed=3)}
    weights |= {"r_mag": _draw(D_SAE, seed=4), "b_mag": _draw(D_SAE, seed=5)} if architecture == "gated" else {}
    weights |= {"log_threshold": _draw(D_SAE, seed=6) - 1} if architecture.startswith("jump_relu") else {}
    normalization = Normalization(_draw(width, seed=7).double(), torch.full((width,), 1.7, dtype=torch.float64))
    return fold_weights(config, weights, normalization, normalization, widths)


def _imported(kind: str, scaling: str) -> Sae:
    """Read what SAELens saves, with each of its normalisations that weights can hold."""
    config: dict[str, Any] = {"architecture": kind, "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float32", "apply_b_dec_to_input": True}
    config |= {"normalize_activations": scaling, "metadata": {"sae_lens_version": "6.54.0"}, **({"k": 4} if kind == "topk" else {})}
    tensors = {"W_enc": _draw(D_MODEL, D_SAE), "b_enc": _draw(D_SAE, seed=1), "W_dec": _draw(D_SAE, D_MODEL, seed=2), "b_dec": _draw(D_MODEL, seed=3)}
    tensors |= {"threshold": _draw(D_SAE, seed=4).abs()} if kind == "jumprelu" else {}
    mixed = torch.eye(D_MODEL) + 0.1 * _draw(D_MODEL, D_MODEL, seed=5)
    scalers = {"expected_average_only_in": Scaler(0.4), "covariance_whitening": Scaler(1.0, _draw(D_MODEL, seed=6), mixed, torch.linalg.inv(mixed))}
    return from_saelens(config, tensors, scalers.get(scaling))


SAES = {architecture: _trained(architecture) for architecture in RECIPES}
KINDS, SCALINGS = ("standard", "jumprelu", "topk"), ("none", "expected_average_only_in", "covariance_whitening")
SAES |= {f"saelens {kind} {scaling}": _imported(kind, scaling) for kind, scaling in itertools.product(KINDS, SCALINGS)}


@pytest.mark.parametrize("name", SAES)
def test_a_clamp_is_full_decoding_plus_the_error(name: str) -> None:
    """Within 4e-6 of the activations' size, in float32, for every architecture that is trained here and every one that is read."""
    sae = SAES[name]
    llm = Model(make_subject("llama"), make_tokenizer(), {"s": AttachedSae(sae, "resid_post.0")})
    with llm.trace("hello wine") as t:
        t.sae_clamp("s", SETTINGS)
        before, after = t.read("resid_post.0"), t.read("resid_post.0", after=True)
    rows = before.tensor[0]
    latents = sae.encode(rows)
    changed = latents.clone()
    changed[:, list(SETTINGS)] = torch.tensor([2.5, 0.0, -1.0])
    expected = sae.decode(changed) + (rows - sae.decode(latents))
    assert latents.gt(0).any()
    assert (after.tensor[0] - expected).abs().max() < 4e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("task", ["transcoder", "skip_transcoder"])
def test_a_transcoder_is_read_at_its_input_and_written_at_its_target(task: str) -> None:
    """What it does not explain of the target stays, the skip included."""
    sae = _trained("topk", task="transcoder")
    if task == "skip_transcoder":
        sae = Sae(**{**vars(sae), "W_skip": _draw(D_MODEL, D_MODEL, seed=9)})
    llm = Model(make_subject("llama"), make_tokenizer(), {"t": AttachedSae(sae, "mlp_in.1", target="mlp_out.1")})
    with llm.trace(["hello wine", "hal"]) as t:
        t.sae_clamp("t", SETTINGS, pos=slice(1, None))
        latents, x = t.sae_read("t"), t.read("mlp_in.1")
        before, after = t.read("mlp_out.1"), t.read("mlp_out.1", after=True)
    for row, length in enumerate((10, 3)):
        rows = x.tensor[row, :length]
        found = sae.encode(rows)
        torch.testing.assert_close(latents.tensor[row, :length], found)
        changed = found.clone()
        changed[1:, list(SETTINGS)] = torch.tensor([2.5, 0.0, -1.0])
        y = before.tensor[row, :length]
        expected = sae.reconstruct(rows, changed) + (y - sae.reconstruct(rows, found))
        torch.testing.assert_close(after.tensor[row, :length], expected, rtol=1e-5, atol=1e-5)


def test_a_crosscoder_is_written_at_all_its_points_by_what_it_read_before() -> None:
    """In two forwards; the oracle adds each point's part of the change by hand. Together with a freeze, and on some rows alone."""
    points = ("resid_post.0", "z.1", "resid_post.1")
    sae = _trained("batch_topk", (D_MODEL,) * 3, "crosscoder")
    llm = Model(make_subject("llama"), make_tokenizer(), {"c": AttachedSae(sae, points[0], more=points[1:])})
    clean = llm.run(["hello wine", "hal"], read=points)
    rows = torch.cat([clean[point].tensor.flatten(2) for point in points], dim=-1)
    found = sae.encode(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
    change = (torch.tensor([2.5, 0.0, -1.0]) - found[..., list(SETTINGS)]) @ sae.W_dec[list(SETTINGS)]
    with llm.trace(["hello wine", "hal"]) as t:
        t.freeze("pattern.*")
        t.sae_clamp("c", SETTINGS, pos=[0, 2])
        latents = t.sae_read("c", [3, 7], pos=-1)
        reads = {point: (t.read(point, pos=[0, 2]), t.read(point, pos=[0, 2], after=True)) for point in points}
    torch.testing.assert_close(latents.tensor, torch.stack([found[0, 9, [3, 7]], found[1, 2, [3, 7]]]))
    for point, part in zip(points, change[:, [0, 2]].split(D_MODEL, dim=-1), strict=True):
        before, after = reads[point]
        torch.testing.assert_close(after.tensor.flatten(2) - before.tensor.flatten(2), part, rtol=1e-4, atol=1e-5)
    trace = llm.trace("hello")
    trace.sae_read("c", [3], after=True)
    with pytest.raises(InputError, match="'c' is a crosscoder: its latents are read of an unedited forward alone"):
        trace.execute()
    trace = llm.trace("hello")
    trace.sae_clamp("c", {3: "1 raw"}, when=("c", 3, 0.0))
    with pytest.raises(InputError, match="'c' is a crosscoder: its latents are known after the forward"):
        trace.execute()


@pytest.mark.parametrize("where", ["all", "generated"])
def test_a_crosscoder_steers_a_text_as_running_everything_again_would(where: str) -> None:
    """Its latents are those of the same tokens without edits; rows are of unequal lengths and end early; the oracle has no batch and no cache."""
    points = ("resid_post.0", "z.1", "resid_post.1")
    llm = Model(
        make_subject("llama"),
        make_tokenizer(),
        {
            "c": AttachedSae(_trained("batch_topk", (D_MODEL,) * 3, "crosscoder"), points[0], more=points[1:]),
            "s": AttachedSae(SAES["relu"], points[0]),
        },
    )
    steer = [{"sae": "c", "latent": 3, "clamp": "5 raw", "where": where}, {"sae": "c", "latent": 7, "add": "2 raw", "where": where}]
    steer += [{"sae": "s", "latent": 2, "clamp": "3 raw", "where": where}]
    prompts = ["hello wine", "hal"]
    texts = llm.generate(prompts, new_tokens=5, steer=steer, compare=True)
    for prompt, found in zip(prompts, texts.generated.texts, strict=True):
        row = llm.tokenize(prompt)[0]
        n_prompt = len(row)
        for token in found.tokens:
            with llm.trace([row]) as t:
                if pos := list(range(0 if where == "all" else n_prompt, len(row))):
                    t.sae_clamp("c", {3: "5 raw"}, pos=pos)
                    t.sae_add("c", {7: "2 raw"}, pos=pos)
                    t.sae_clamp("s", {2: "3 raw"}, pos=pos)
                logits = t.read("logits", pos=-1)
            log = logits.tensor[0].log_softmax(-1)
            assert token.token == int(log.argmax())
            assert token.logprob == pytest.approx(float(log.max()), abs=2e-5)
            row.append(token.token)
    assert texts.texts != texts.defaults
    effects = texts.effects()
    assert effects["edit"].to_list() == [0, 0, 1, 1, 2, 2]
    assert effects["places"].to_list() == ([14, 7] if where == "all" else [4, 4]) * 3
    assert effects.filter(effects["edit"] < 2)["after"].is_nan().all()
    short = llm.generate(prompts, new_tokens=5, steer=steer[:1], n=2, seed=3, temperature=2.0).generated
    stop = short.texts[0].tokens[1].token
    plan = llm.generate(prompts, new_tokens=5, steer=steer[:1], n=2, seed=3, temperature=2.0).plan.model_copy(update={"stop": (stop,)})
    ended = llm.backend.generate(plan, {})
    for whole, cut in zip(short.texts, ended.texts, strict=True):
        assert [token.token for token in cut.tokens] == [token.token for token in whole.tokens][: len(cut.tokens)]
    assert min(len(text.tokens) for text in ended.texts) < 5


def test_where_a_crosscoder_cannot_steer_is_told() -> None:
    """Nothing waits for its latents, and what a cache keeps is not clamped by latents of new tokens alone."""
    llm = Model(make_subject("gpt2"), make_tokenizer())
    llm.saes = {"c": AttachedSae(_trained("relu", (D_MODEL,) * 2, "crosscoder"), "resid_post.0", more=("resid_post.1",))}
    waiting = {"point": "resid_post.1", "scale": 2.0, "if": {"sae": "c", "latent": 3}}
    with pytest.raises(InputError, match="'c' is a crosscoder: its latents are known after a forward, so no write can wait for one"):
        llm.generate("hello", new_tokens=2, steer=[waiting])
    with pytest.raises(InputError, match=r"Latents \[24\]: the SAE of 'resid_post.0' has latents 0 to 23"):
        llm.generate("hello", new_tokens=2, steer=[{"sae": "c", "latent": 24, "clamp": "1 raw"}])
    llm.saes = {"c": AttachedSae(_trained("relu", (D_MODEL,) * 2, "crosscoder"), "k.0", more=("k.1",))}
    with pytest.raises(InputError, match=r"The crosscoder 'c' is written at k\.0, k\.1, which a cache keeps: it cannot be clamped"):
        llm.generate("hello", new_tokens=2, steer=[{"sae": "c", "latent": 3, "clamp": "1 raw"}])


def test_decoder_rows_are_added_whatever_the_latents_are() -> None:
    """And a strength in norms makes what is added that long, whatever the length of the row."""
    sae = SAES["relu"]
    llm = Model(make_subject("llama"), make_tokenizer(), {"s": AttachedSae(sae, "resid_post.0")})
    llm.backend.norms = {"resid_post.0": 8.0}
    with llm.trace("hello") as t:
        t.sae_add("s", {3: "2 raw", 5: "-0.25 norm"})
        t.add("resid_post.0", torch.full((D_MODEL,), 3.0), times="0.5 norm", pos=0)
        before, after = t.read("resid_post.0"), t.read("resid_post.0", after=True)
    moved = (after.tensor - before.tensor)[0]
    expected = 2 * sae.W_dec[3] - 2 * sae.W_dec[5] / sae.W_dec[5].norm()
    torch.testing.assert_close(moved[1:], expected.expand(4, D_MODEL), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved[0] - expected, torch.ones(D_MODEL), rtol=1e-4, atol=1e-5)


def _fitted(llm: Model, point: str) -> Sae:
    """Make an SAE that explains one point of this model well: pairs of latents of opposite signs for its principal directions."""
    rows = llm.run(["The ferry left at noon, and by the time it came"], read=point)[point].tensor[0].flatten(1)
    mean = rows.mean(0)
    basis = torch.linalg.svd(rows - mean)[2][:12]
    W_dec = torch.cat([basis, -basis])
    zeros = torch.zeros(24)
    return Sae(kind="relu", W_enc=W_dec.T.contiguous(), b_enc=-(W_dec @ mean), W_dec=W_dec, b_dec=mean, threshold=zeros, k=0)


def test_an_sae_is_tried_before_it_is_used() -> None:
    """At the right place it has its FVU beside its evaluation's; at a wrong one it is refused, with the right one named."""
    llm = Model(make_subject("llama"), make_tokenizer())
    sae = _fitted(llm, "resid_post.1")
    text = "The ferry left at noon, and by the time it"
    llm.attach("good", sae, "blocks.1.hook_resid_post", text=text)
    fit = llm.saes["good"].fit
    rows = llm.run(text, read="resid_post.1")["resid_post.1"].tensor[0].double()
    latents = sae.encode(rows.float())
    error = (rows - sae.decode(latents)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert fit.fvu == pytest.approx(float(error), rel=1e-5)
    assert fit.l0 == pytest.approx(float((latents > 0).sum(1).double().mean()))
    scaled = Sae(**{**vars(sae), "b_dec": sae.b_dec + 9.0})
    message = r"leaves [\d.e+]+ of the variance at resid_post\.0 unexplained \(FVU\) on a text of 42 tokens, where the mean alone leaves 1"
    with pytest.raises(InputError, match=message):
        llm.attach("wrong", scaled, "resid_post.0", text=text)
    shifted = Sae(**{**vars(sae), "W_enc": sae.W_enc * 4})
    with pytest.raises(InputError, match=r"it belongs to another point, scale or model\. Of points as wide: FVU [\d.e+]+ at "):
        llm.attach("wrong", shifted, "resid_post.1", text=text)
    with pytest.raises(InputError, match=re.escape("encodes rows of 16 and writes rows of 16; mlp_act.0 of tiny llama are [32] wide")):
        llm.attach("wide", sae, "mlp_act.0")
    assert list(llm.saes) == ["good"]


def test_a_fit_that_is_worse_than_its_evaluation_is_told_in_every_answer() -> None:
    """A steered text of an SAE that does not fit proves nothing."""
    llm = Model(make_subject("llama"), make_tokenizer())
    sae = _fitted(llm, "resid_post.1")
    llm.backend.attach("odd", AttachedSae(sae, "resid_post.1", evaluated=Fit(1e-6, 12.0)), llm.tokenize("The ferry left at noon, and by"))
    llm.backend.attach("bad", AttachedSae(Sae(**{**vars(sae), "W_enc": sae.W_enc * 4}), "resid_post.1", evaluated=Fit(50.0, 12.0)))
    with llm.trace("hello") as t:
        t.sae_read("odd")
    warning = r"The SAE 'odd' leaves [\d.e-]+ of the variance unexplained \(FVU\) on a text of 30 tokens, [\d.e+]+ times what its evaluation found"
    assert [bool(re.match(warning, told)) for told in t.warnings] == [True]
    texts = llm.generate("hello", new_tokens=2, steer=[{"sae": "odd", "latent": 3, "clamp": "1 raw"}])
    assert texts.warnings == t.warnings
    assert t.warnings[0] in repr(texts)
    assert llm.generate("hello", new_tokens=2).warnings == []


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "qwen3"])
def test_frozen_norms_divide_by_what_they_divided_by_without_the_edits(kind: str) -> None:
    """So that an edit's direct path is linear; the oracle computes the last norm by hand. Kept in generation too."""
    llm = Model(make_subject(kind), make_tokenizer())
    last = llm.subject.net.base_model.get_submodule("ln_f" if kind == "gpt2" else "norm")
    vector = torch.linspace(-3, 3, D_MODEL)
    clean = llm.run("hello wine", read=["resid_post.1", "final_norm"])
    with llm.trace("hello wine") as t:
        t.freeze("norm:*")
        t.add("resid_post.1", vector)
        out, divisor = t.read("final_norm"), t.read(f"norm:{_path_of(llm, last)}")
    x = clean["resid_post.1"].tensor
    centred = x - x.mean(-1, keepdim=True) if kind == "gpt2" else x
    told = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    edited = x + vector - ((x + vector).mean(-1, keepdim=True) if kind == "gpt2" else 0)
    torch.testing.assert_close(divisor.tensor, edited.square().mean(-1, keepdim=True).sqrt(), rtol=1e-3, atol=1e-4)
    gain = last.weight + 1 if kind == "gemma2" else last.weight
    moved = vector - vector.mean() if kind == "gpt2" else vector
    expected = clean["final_norm"].tensor + gain * moved / told
    torch.testing.assert_close(out.tensor, expected, rtol=1e-3, atol=1e-4)
    texts = llm.generate("hello", new_tokens=3, steer=[{"freeze": "norm:*"}, {"point": "resid_post.0", "vector": vector, "add": "1 raw"}])
    assert len(texts.plan.freeze) == sum(point.startswith("norm:") for point in llm.points("norm:*")["name"])
    with pytest.raises(InputError, match=r"there is no norm of that path\. Near: norm:"):
        find_point(llm.subject.net, "norm:h.0.ln_9")


def _path_of(llm: Model, module: Any) -> str:
    return next(path for path, found in llm.subject.net.named_modules() if found is module)


def test_what_a_query_gives_to_no_key_is_the_sink() -> None:
    """GPT-OSS has learned sinks; where there are none, rows sum to 1."""
    for kind, is_sunk in (("gpt_oss", True), ("llama", False)):
        llm = Model(make_subject(kind), make_tokenizer())
        pattern = llm.run(["hello wine", "hal"], read="pattern.1")["pattern.1"]
        sink = pattern.sink
        assert sink.shape == pattern.tensor.shape[:-1]
        torch.testing.assert_close(sink[0], 1 - pattern.tensor[0].sum(-1))
        assert (sink[1, :, 3:] == 0).all()
        assert bool(sink[0].max() > 0.01) == is_sunk
    with pytest.raises(InputError, match="is no pattern: only attention has a sink"):
        _ = llm.run("hello", read="z.1")["z.1"].sink
