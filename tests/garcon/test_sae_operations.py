"""SAEs inside traces: latents are read at their point, and setting some leaves everything else of the activation."""

import re

import pytest
import torch
from tiny_models import D_MODEL, make_subject, make_tokenizer

from interp_assets.errors import InputError
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.plan import Add, Plan, Read, When, name_tensor
from interp_assets.garcon.run import run_plan
from interp_assets.garcon.session import Model
from interp_assets.train.sae import Sae

D_SAE = 24


def _sae(kind: str, seed: int = 0) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    W_enc, W_dec = (torch.randn(shape, generator=generator) for shape in ((D_MODEL, D_SAE), (D_SAE, D_MODEL)))
    threshold = torch.full((D_SAE,), 0.5 if kind == "jump_relu" else 0.0)
    return Sae(
        kind=kind, W_enc=W_enc, b_enc=torch.zeros(D_SAE), W_dec=W_dec, b_dec=torch.ones(D_MODEL), threshold=threshold, k=4 if kind == "topk" else 0
    )


def _model(kind: str = "relu") -> Model:
    saes = {"stream": AttachedSae(_sae(kind), "resid_post.0"), "heads": AttachedSae(_sae(kind, 1), "z.1")}
    return Model(make_subject("gpt2"), make_tokenizer(), saes)


@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk"])
@pytest.mark.parametrize("name", ["stream", "heads"])
def test_clamping_is_full_decoding_plus_the_error(kind: str, name: str) -> None:
    """The oracle decodes all latents with some replaced, and adds what the SAE had left out."""
    llm = _model(kind)
    sae, point = llm.saes[name].sae, llm.saes[name].hook_point
    with llm.trace("hello") as t:
        t.sae_clamp(name, {3: "2.5 raw", 7: "0 raw"}, pos=slice(1, None))
        latents, before, after = t.sae_read(name), t.read(point), t.read(point, after=True)
    rows = before.tensor[0].flatten(1)
    found = sae.encode(rows)
    torch.testing.assert_close(latents.tensor[0], found)
    changed = found.clone()
    changed[:, [3, 7]] = torch.tensor([2.5, 0.0])
    expected = sae.decode(changed) + (rows - sae.decode(found))
    expected[0] = rows[0]
    torch.testing.assert_close(after.tensor[0].flatten(1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["stream", "heads"])
def test_latents_are_read_after_the_writes_too(name: str) -> None:
    """A latent does not read what it was set to: what it and its neighbours read afterwards is what a person wants to see."""
    llm = _model()
    with llm.trace("hello") as t:
        t.sae_clamp(name, {3: "2.5 raw"}, pos=slice(1, None))
        before, after = t.sae_read(name), t.sae_read(name, after=True, pos=[0, 2])
        stream = t.read(llm.saes[name].hook_point, after=True)
    found = llm.saes[name].sae.encode(stream.tensor[0].flatten(1))
    torch.testing.assert_close(after.tensor[0], found[[0, 2]])
    torch.testing.assert_close(after.tensor[0, 0], before.tensor[0, 0])  # nothing was written there
    assert not torch.equal(after.tensor[0, 1], before.tensor[0, 2])


def test_a_condition_holds_position_by_position() -> None:
    """Also for a write at a later point; elsewhere nothing is touched."""
    llm = _model()
    vector = torch.ones(D_MODEL)
    given = name_tensor(vector)
    row = tuple(llm.tokenize("hello wine")[0])
    found = llm.saes["stream"].sae.encode(llm.run("hello wine", read="resid_post.0")["resid_post.0"].tensor[0]) > 0.3
    latent = int((found.sum(0) - 5).abs().argmin())
    fires = found[:, latent]
    assert 0 < fires.sum() < 10
    write = Add(point="mlp_out.1", value=given, when=When(sae="stream", latent=latent, above=0.3))
    reads = (Read(name="before", point="mlp_out.1"), Read(name="after", point="mlp_out.1", after=True))
    answers = run_plan(llm.subject, Plan(rows=(row,), operations=(write, *reads)), {given.tensor: vector}, llm.saes).tensors
    torch.testing.assert_close(answers["after"][0] - answers["before"][0], fires[:, None].float().expand(10, D_MODEL))


def test_what_an_sae_cannot_do_is_refused() -> None:
    """A clamp at another point, of a latent it does not have, without a unit, or on a condition that comes too late."""
    llm = _model()
    trace = llm.trace("hello")
    with pytest.raises(InputError, match=r"No SAE is called 'l8' here; there are \['heads', 'stream'\]"):
        trace.sae_read("l8")
    for value in ("2", "nan raw", "x raw"):
        with pytest.raises(InputError, match=re.escape(f"found {value!r}")):
            trace.sae_clamp("stream", {1: value})
    trace.sae_clamp("stream", {99: "1 raw"})
    with pytest.raises(InputError, match=r"Latents \[99\]: the SAE of 'resid_post.0' has latents 0 to 23"):
        trace.execute()
    late = Add(point="resid_pre.0", value=name_tensor(torch.ones(D_MODEL)), when=When(sae="heads", latent=0))
    with pytest.raises(InputError, match=r"waits for a latent at 'z\.1', which a forward reaches later"):
        run_plan(llm.subject, Plan(rows=((1, 2),), operations=(late,)), {}, llm.saes)
    llm.saes = {"stream": AttachedSae(_sae("relu"), "mlp_act.0")}
    wide = llm.trace("hello")
    wide.sae_read("stream")
    with pytest.raises(InputError, match="encodes rows of 16; there are rows of 64"):
        wide.execute()
