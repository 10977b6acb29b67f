"""Generation with edits and a cache: the tokens that running everything again for each token gives, in every architecture that generates."""

import json
import re
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CONTEXT, D_MODEL, ENCODERS, INSIDE, make_net, make_subject
from torch import Tensor

from interp_assets.errors import InputError, NonFiniteError, TooLargeError
from interp_assets.garcon.backend import Generated
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.plan import (
    Add,
    Cap,
    Edit,
    Freeze,
    GeneratePlan,
    LatentsRead,
    Patch,
    Plan,
    ProjectOut,
    Read,
    SaeAdd,
    SaeClamp,
    SaeRead,
    Scale,
    Span,
    When,
    name_tensor,
    parse_plan,
)
from interp_assets.garcon.remote.limits import Limits, check_texts
from interp_assets.garcon.run import run_plan
from interp_assets.garcon.steering.decode import generate, stream_tokens
from interp_assets.garcon.subject import SubjectModel
from interp_assets.train.sae import Sae

DECODERS = [kind for kind in INSIDE if kind not in ENCODERS]
PROMPTS = tuple(tuple(text.encode()) for text in ("hello wine", "hal"))
VECTOR = torch.linspace(-2, 2, D_MODEL)
GIVEN = name_tensor(VECTOR)
TENSORS = {GIVEN.tensor: VECTOR}
NEW = 6


def _sae(d_out: int = D_MODEL, kind: str = "relu", seed: int = 0) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    W_enc, W_dec = torch.randn((D_MODEL, 24), generator=generator) * 0.3, torch.randn((24, d_out), generator=generator)
    threshold = torch.full((24,), 0.2 if kind == "jump_relu" else 0.0)
    k = 4 if kind == "topk" else 0
    return Sae(kind=kind, W_enc=W_enc, b_enc=torch.zeros(24), W_dec=W_dec, b_dec=torch.ones(d_out), threshold=threshold, k=k)


SAES = {"top": AttachedSae(_sae(kind="topk"), "resid_post.0"), "over": AttachedSae(_sae(seed=1), "mlp_in.1", "mlp_out.1")}


def _recomputed(subject: SubjectModel, plan: GeneratePlan, prompt: int) -> list[tuple[int, float]]:
    """Return tokens and log probabilities of a prompt when every token runs the whole text again, alone, with writes at the positions they reach."""
    row = list(plan.rows[prompt])
    n_prompt = len(row)
    written: list[tuple[int, float]] = []
    while len(written) < plan.new_tokens:
        operations: list[Any] = [Freeze(points=plan.freeze)] if plan.freeze else []
        for edit in plan.edits:
            if edit.write.rows is None or prompt in edit.write.rows:
                reached = [place for place in _places(edit, len(row), n_prompt) if edit.special or row[place] not in plan.special]
                if reached:
                    operations.append(edit.write.model_copy(update={"pos": tuple(reached), "rows": None}))
        read = Read(name="l", point="logits", pos=-1, after=True)
        log = run_plan(subject, Plan(rows=(tuple(row),), operations=(*operations, read)), TENSORS, SAES).tensors["l"][0].log_softmax(0)
        row.append(int(log.argmax()))
        written.append((row[-1], float(log.max())))
    return written


def _places(edit: Edit, length: int, n_prompt: int) -> list[int]:
    where: Any = edit.where
    if isinstance(where, Span):
        ends = [None if end is None else end + n_prompt if end < 0 else end for end in (where.start, where.stop)]
        return list(range(length))[slice(*ends, where.step)]
    if isinstance(where, tuple):
        return sorted({place + n_prompt if place < 0 else place for place in where} & set(range(length)))
    return list(range(length))[slice({"all": 0, "prompt": 0, "generated": n_prompt}[where], n_prompt if where == "prompt" else None)]


def _tokens(found: Generated) -> list[list[int]]:
    return [[token.token for token in text.tokens] for text in found.texts]


def _logprobs(found: Generated) -> Tensor:
    return torch.tensor([[token.logprob for token in text.tokens] for text in found.texts])


EDITS = {
    "inside": (
        Edit(write=Add(point="resid_post.0", value=GIVEN, times=0.7)),
        Edit(write=ProjectOut(point="resid_pre.1", value=GIVEN), where="generated"),
        Edit(write=Cap(point="attn_out.1", value=GIVEN, limit=0.1, rows=(0,)), where="prompt"),
        Edit(write=Patch(point="mlp_out.0", value="zero"), where=(0, -1, 4)),
        Edit(write=Add(point="mlp_in.1", value=GIVEN, rows=(1,)), where=Span(start=-2)),
        Edit(write=Scale(point="z.1", times=-2.0, heads=(1,)), where=Span(start=1, step=2)),
        Edit(write=Patch(point="q.0", value="zero", heads=(0,))),
        Edit(write=Scale(point="k.1", times=-1.5), where=(0, 2, -1)),
        Edit(write=Scale(point="v.0", times=2.0), where="generated"),
        Edit(write=Scale(point="pattern.1", times=0.5, heads=(0,))),
    ),
    "saes": (
        Edit(write=SaeClamp(point="resid_post.0", sae="top", latents=(3, 7), values=(4.0, 0.0), rows=(0,))),
        Edit(write=SaeClamp(point="resid_post.0", sae="top", latents=(5, 1), values=(-3.0, 1.0), rows=(1,)), where="generated"),
        Edit(write=SaeAdd(point="resid_post.0", sae="top", latents=(9,), values=(1.5,), when=When(sae="top", latent=7, above=0.1))),
        Edit(write=SaeClamp(point="resid_post.0", sae="top", latents=(9,), values=(1.0,))),
        Edit(write=SaeClamp(point="mlp_out.1", sae="over", latents=(2,), values=(3.0,))),
        Edit(write=Scale(point="k.1", times=-1.5, when=When(sae="top", latent=3, above=0.0))),
        Edit(write=Add(point="final_norm", value=GIVEN, when=When(sae="top", latent=2, above=0.3))),
    ),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("kind", DECODERS)
def test_edits_with_a_cache_give_what_running_everything_again_gives(kind: str, name: str) -> None:
    """Tokens and their probabilities, in a padded batch, with windows, grouped heads and sinks; the oracle has neither batch nor cache."""
    subject = make_subject(kind)
    known = {point.name for point in subject.points()}
    edits = tuple(edit for edit in EDITS[name] if edit.write.point in known)
    plan = GeneratePlan(rows=PROMPTS, new_tokens=NEW, edits=edits, freeze=("pattern.0", "pattern.1") if name == "saes" else ())
    found = generate(subject, plan, TENSORS, SAES)
    expected = [_recomputed(subject, plan, prompt) for prompt in range(len(PROMPTS))]
    assert _tokens(found) == [[token for token, _ in text] for text in expected]
    torch.testing.assert_close(_logprobs(found), torch.tensor([[logprob for _, logprob in text] for text in expected]), rtol=1e-4, atol=2e-5)
    plain = generate(subject, GeneratePlan(rows=PROMPTS, new_tokens=NEW), {})
    assert (_logprobs(found) - _logprobs(plain)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_generation_is_that_of_transformers(kind: str) -> None:
    """Without edits, each prompt as if alone, and with its end where the model says one."""
    subject = make_subject(kind)
    net: Any = subject.net
    free = _tokens(generate(subject, GeneratePlan(rows=PROMPTS, new_tokens=NEW), {}))
    stop = free[0][3]
    found = generate(subject, GeneratePlan(rows=PROMPTS, new_tokens=NEW, stop=(stop,)), {})
    for i, prompt in enumerate(PROMPTS):
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 258, "attention_mask": torch.ones((1, len(prompt)), dtype=torch.int64)}
        expected = net.generate(input_ids=torch.tensor([prompt]), eos_token_id=stop, **options)[0, len(prompt) :].tolist()
        assert _tokens(found)[i] == expected
    assert found.texts[0].is_stopped
    assert len(found.texts[0].tokens) <= 4


CLAMP = SaeClamp(point="resid_post.0", sae="top", latents=(3,), values=(6.0,))
STEERED = GeneratePlan(rows=PROMPTS, new_tokens=NEW, edits=(Edit(write=CLAMP),), compare=True)


def test_a_default_and_what_the_unedited_model_says_stand_beside_every_token() -> None:
    """Over the edited text, also after the two have parted; the oracle scores the whole text at once."""
    subject = make_subject("llama")
    found = generate(subject, STEERED, TENSORS, SAES)
    plain = generate(subject, GeneratePlan(rows=PROMPTS, new_tokens=NEW), {})
    assert [[token.token for token in text.tokens] for text in found.defaults] == _tokens(plain)
    assert all(token.is_default and token.kl is None for text in found.defaults for token in text.tokens)
    assert _tokens(found) != _tokens(plain)
    for prompt, text in zip(PROMPTS, found.texts, strict=True):
        row = torch.tensor([[*prompt, *(token.token for token in text.tokens)]])
        rows = (tuple(row[0].tolist()),)
        edited = run_plan(subject, Plan(rows=rows, operations=(CLAMP, Read(name="l", point="logits", after=True))), {}, SAES).tensors["l"]
        base, log = (logits.log_softmax(-1)[0, len(prompt) - 1 : -1] for logits in (subject.logits(row, None), edited))
        new = row[0, len(prompt) :, None]
        torch.testing.assert_close(torch.tensor([token.logprob for token in text.tokens]), log.gather(1, new)[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor([token.base_logprob for token in text.tokens]), base.gather(1, new)[:, 0], rtol=1e-4, atol=1e-5)
        kl = (base.exp() * (base - log)).sum(1)
        torch.testing.assert_close(torch.tensor([token.kl for token in text.tokens]), kl, rtol=1e-3, atol=1e-6)
        assert kl.min() > 1e-4


@pytest.mark.parametrize("sae", ["top", "over"])
def test_latents_come_with_every_token_as_a_trace_reads_them_afterwards(sae: str) -> None:
    """After the edits, at the position that a token was drawn from, in the edited text and in the default; the oracle reads whole texts."""
    edits = (Edit(write=Add(point="resid_post.0", value=GIVEN, times=0.7)), *EDITS["saes"][:2])
    told = ({"sae": sae, "latents": (3, 7, 20)}, {"sae": "top", "latents": (5,)})
    plan = GeneratePlan.model_validate({"rows": PROMPTS, "new_tokens": NEW, "edits": edits, "compare": True, "latents": told})
    subject = make_subject("llama")
    found = generate(subject, plan, TENSORS, SAES)
    point = SAES[sae].hook_point
    for texts, is_edited in ((found.texts, True), (found.defaults, False)):
        for prompt, text in enumerate(texts):
            row = (*PROMPTS[prompt], *(token.token for token in text.tokens[:-1]))
            writes = [edit.write.model_copy(update={"rows": None}) for edit in edits if edit.write.rows in (None, (prompt,))]
            places = range(len(PROMPTS[prompt]), len(row))
            own = [write.model_copy(update={"pos": tuple(places)}) if prompt == 1 and write.op == "sae_clamp" else write for write in writes]
            reads = (
                SaeRead(name="a", point=point, sae=sae, latents=(3, 7, 20), after=True),
                SaeRead(name="b", point="resid_post.0", sae="top", latents=(5,), after=True),
            )
            read = run_plan(subject, Plan(rows=(row,), operations=(*(own if is_edited else ()), *reads)), TENSORS, SAES).tensors
            wanted = torch.cat([read["a"], read["b"]], dim=2)[0, len(PROMPTS[prompt]) - 1 :]
            assert torch.allclose(torch.tensor([token.latents for token in text.tokens]), wanted, atol=2e-5)
            assert len(wanted) == NEW


def test_more_numbers_than_a_server_holds_are_refused_before_they_are_made() -> None:
    """Each stays in memory until the last token is written: a plan of one kilobyte could ask for all of it."""
    limits = Limits(answer_bytes=32 * 2 * 8 * 3)  # three numbers of eight tokens of two texts
    plan = GeneratePlan(rows=((1,),), n=2, new_tokens=8, watch=(4,), latents=(LatentsRead(sae="top", latents=(3, 7)),), compare=False)
    check_texts(plan, limits)
    for more in ({"watch": (4, 5)}, {"latents": (*plan.latents, LatentsRead(sae="top", latents=(3,)))}):
        with pytest.raises(TooLargeError, match=r"4 latents and watched tokens over 2 texts of 8 new tokens take .* 3 of them would fit"):
            check_texts(plan.model_copy(update=more), limits)


def test_latents_without_edits_cost_no_twin_and_change_no_token() -> None:
    """A plan of latents alone writes what the plan without them does; what cannot be read is refused by name."""
    subject = make_subject("llama")
    plain = GeneratePlan(rows=PROMPTS, new_tokens=NEW, compare=True)
    asked = plain.model_copy(update={"latents": (LatentsRead(sae="top", latents=(1,)),)})
    found = generate(subject, asked, {}, SAES)
    assert (_tokens(found), found.defaults) == (_tokens(generate(subject, plain, {})), [])
    assert {len(token.latents) for text in found.texts for token in text.tokens} == {1}
    for latents, message in (((24,), "has latents 0 to 23"), ((1,), "No SAE is called 'none'")):
        name = "top" if latents == (24,) else "none"
        with pytest.raises(InputError, match=message):
            generate(subject, plain.model_copy(update={"latents": (LatentsRead(sae=name, latents=latents),)}), {}, SAES)
    crosscoder = {"both": AttachedSae(_sae(), "resid_post.0", more=("resid_post.1",))}
    with pytest.raises(InputError, match="'both' is a crosscoder: its latents are known after a forward"):
        generate(subject, plain.model_copy(update={"latents": (LatentsRead(sae="both", latents=(1,)),)}), {}, crosscoder)


def test_an_edit_tells_what_it_did_to_this_very_text() -> None:
    """Latents before and after, how far the stream moved, and FVU; the oracle reads them of the whole text, whose last token nothing has read."""
    subject, sae = make_subject("llama"), SAES["top"].sae
    found = generate(subject, STEERED, TENSORS, SAES)
    effect = found.effects[0]
    arrived = []
    for i, (prompt, text) in enumerate(zip(PROMPTS, found.texts, strict=True)):
        row = (*prompt, *(token.token for token in text.tokens[:-1]))
        reads = (Read(name="x", point="resid_post.0"), Read(name="y", point="resid_post.0", after=True))
        answers = run_plan(subject, Plan(rows=(row,), operations=(CLAMP, *reads)), {}, SAES).tensors
        x, y = answers["x"][0], answers["y"][0]
        assert int(effect.n_places[i]) == len(row)
        torch.testing.assert_close(effect.before[i], sae.encode(x)[:, [3]].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(effect.after[i], sae.encode(y)[:, [3]].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(effect.moved[i], ((y - x).norm(dim=1) / x.norm(dim=1)).mean(), rtol=1e-4, atol=1e-5)
        arrived.append(x)
    x = torch.cat(arrived).double()
    error = (x - SAES["top"].sae.reconstruct(x.float(), sae.encode(x.float()))).square().sum()
    assert found.fvu["top"] == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-4)


def test_tokens_depend_on_seed_and_continuation_alone() -> None:
    """Not on other prompts, on how many there are, or on what is compared: a person must get the same again."""
    subject = make_subject("gpt2")

    def draw(**changes: Any) -> list[list[int]]:
        return _tokens(
            generate(subject, GeneratePlan.model_validate({"rows": PROMPTS, "new_tokens": NEW, "temperature": 1.5, "n": 2, **changes}), {}, SAES)
        )

    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(2)
    assert draw() == first
    assert draw(rows=PROMPTS[1:]) == first[2:]
    assert draw(n=1) == first[::2]
    assert draw(seed=1) != first
    assert first[0] != first[1]
    idle = Edit(write=Scale(point="resid_post.0", times=1.0))
    found = generate(subject, GeneratePlan(rows=PROMPTS, new_tokens=NEW, temperature=1.5, n=2, edits=(idle,), compare=True), {})
    assert _tokens(found) == [[token.token for token in text.tokens] for text in found.defaults] == first


def test_draws_follow_the_prediction() -> None:
    """A thousand draws of one token have its shares; top_k and top_p cut the tail."""
    subject = make_subject("gpt2")
    plan = GeneratePlan(rows=(PROMPTS[0],), new_tokens=1, n=1000, temperature=0.7)
    shares = (subject.logits(torch.tensor([PROMPTS[0]]), None)[0, -1] / 0.7).softmax(0)
    drawn = torch.tensor(_tokens(generate(subject, plan, {}))).flatten().bincount(minlength=len(shares)) / 1000
    assert (drawn - shares).abs().max() < 4 * float((shares.max() / 1000) ** 0.5)
    few = torch.tensor(_tokens(generate(subject, plan.model_copy(update={"top_k": 3}), {}))).unique()
    assert sorted(few.tolist()) == sorted(shares.topk(3).indices.tolist())
    ordered = shares.sort(descending=True)
    n_kept = int((ordered.values.cumsum(0) < 0.5).sum()) + 1
    half = torch.tensor(_tokens(generate(subject, plan.model_copy(update={"top_p": 0.5}), {}))).unique()
    assert set(half.tolist()) <= set(ordered.indices[:n_kept].tolist())
    assert len(half) > 0.8 * n_kept


def test_special_tokens_are_left_alone_unless_it_is_said() -> None:
    """A start token carries a huge activation of its own, and a template's marks are the model's own."""
    subject = make_subject("llama")
    rows = ((256, *PROMPTS[1]), (104, 256, 97))
    effects = [
        generate(
            subject, GeneratePlan(rows=rows, new_tokens=2, special=(256,), edits=(Edit(write=CLAMP, where="prompt", special=special),)), {}, SAES
        )
        for special in (False, True)
    ]
    assert [found.effects[0].n_places.tolist() for found in effects] == [[3, 2], [4, 3]]
    plain = generate(subject, GeneratePlan(rows=((104, 97),), new_tokens=1, special=(97,), edits=(Edit(write=CLAMP),)), {}, SAES)
    assert torch.isnan(torch.tensor(plain.fvu["top"]))  # of one activation there is no variance: FVU leaves special tokens out


def test_stopping_to_ask_cancels_and_leaves_nothing_behind() -> None:
    """A client that goes away frees the model after the token that it was at."""
    subject = SubjectModel(make_net("gpt2"))
    tokens = stream_tokens(subject, STEERED, TENSORS, SAES)
    first = [next(tokens) for _ in range(4)]
    assert [(token.continuation, token.is_default, token.place) for token in first] == [(0, False, 0), (1, False, 0), (0, True, 0), (1, True, 0)]
    n_hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in subject.net.modules())
    assert n_hooks == 0
    tokens.close()

    class Gone(Exception):  # noqa: N818 - a client's own
        pass

    def leave(token: Any) -> None:
        if token.place == 2:
            raise Gone

    with pytest.raises(Gone):
        generate(subject, STEERED, TENSORS, SAES, leave)
    heard: list[Any] = []
    found = generate(subject, STEERED, TENSORS, SAES, heard.append)
    assert [token for token in heard if not token.is_default and token.continuation == 1] == found.texts[1].tokens


def test_a_plan_that_generates_survives_its_own_text() -> None:
    """And its hash is what it was: raise the version when this changes on purpose."""
    plan = GeneratePlan(
        rows=PROMPTS, new_tokens=3, edits=tuple(edit for edits in EDITS.values() for edit in edits), freeze=("pattern.0",), special=(256,)
    )
    again = parse_plan(GeneratePlan, plan.json())
    assert again == plan
    assert again.hash == plan.hash == "3a0483291989e0fd1c815c2a7eb76cb6"
    assert [name.shape for name in plan.tensors()] == [(D_MODEL,)] * 5
    with pytest.raises(InputError, match="The plan is wrong at whole: Input should be 'generate'"):
        parse_plan(GeneratePlan, '{"whole": "sweep", "rows": [[1]], "new_tokens": 1}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new_tokens": 0}, "at new_tokens: Input should be greater than or equal to 1"),
        ({"rows": [[1], []]}, "at rows.1"),
        ({"temperature": float("inf")}, "at temperature"),
        ({"top_p": 0.0}, "at top_p"),
        ({"edits": [{"write": {"op": "patch", "point": "z.0", "value": "mean"}}]}, "a patch at z.0 takes 'zero' or a vector while a text is written"),
        (
            {"edits": [{"write": {"op": "scale", "point": "z.0", "times": 2, "pos": 1}}]},
            "an edit at z.0 has positions in its write; say them as `where`",
        ),
        ({"edits": [{"write": {"op": "scale", "point": "z.0", "times": 2, "rows": [1]}}]}, "an edit is on rows [1]; the plan has rows 0 to 0"),
        ({"edits": [{"write": {"op": "scale", "point": "z.0", "times": 2}, "where": "assistant"}]}, "the prompts are no conversations"),
        ({"edits": [{"write": {"op": "read", "point": "z.0", "name": "a"}}]}, "Input tag 'read' found using 'op' does not match"),
        ({"edits": [{"write": {"op": "sae_add", "point": "z.0", "sae": "a", "latents": [1], "values": []}}]}, "has 1 latents and 0 values"),
    ],
)
def test_what_no_model_could_generate_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    """The text may come from anywhere."""
    with pytest.raises(InputError) as caught:
        parse_plan(GeneratePlan, json.dumps({"whole": "generate", "rows": [[1]], "new_tokens": 1, **change}))
    assert message in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_no_text_is_anything_but_a_plan_that_generates_or_a_refusal(content: object) -> None:
    """Anything may be sent to a server."""
    edit = {"write": {"op": "scale", "point": "z.0", "times": 2}, "where": content}
    for text in (json.dumps(content), json.dumps({"rows": [[1]], "new_tokens": 1, "edits": [content]}), str(content)):
        with pytest.raises(InputError):
            parse_plan(GeneratePlan, text)
    with suppress(InputError):
        assert parse_plan(GeneratePlan, json.dumps({"rows": [[1]], "new_tokens": 1, "edits": [edit]})).edits


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(write=Scale(point="resid_pots.0", times=2)), "has no hook point 'resid_pots.0'. Near: resid_post.0"),
        (Edit(write=Scale(point="z.0", times=2, heads=(2,))), "Heads [2] of 'z.0': it has heads 0 to 1"),
        (Edit(write=Scale(point="mlp_out.0", times=2, heads=(0,))), "Heads [0] of 'mlp_out.0': it has no heads"),
        (
            Edit(write=Add(point="z.0", value=GIVEN)),
            "has shape [16]; while a text is written, one vector for every position is wanted, of shape [2, 8]",
        ),
        (Edit(write=CLAMP.model_copy(update={"sae": "l8"})), "No SAE is called 'l8' here; there are ['over', 'top']"),
        (
            Edit(write=CLAMP.model_copy(update={"point": "resid_post.1"})),
            "The SAE 'top' belongs to 'resid_post.0', all heads of it; the plan has it at",
        ),
        (Edit(write=CLAMP.model_copy(update={"latents": (24,)})), "Latents [24]: the SAE of 'resid_post.0' has latents 0 to 23"),
        (Edit(write=CLAMP.model_copy(update={"along": GIVEN})), "Directions at 'resid_post.0' have shape [16]; expected [1, 16]"),
        (Edit(write=Scale(point="resid_pre.0", times=2, when=When(sae="top", latent=1))), "which a forward reaches later"),
        (
            Edit(write=Scale(point="z.0", times=2), where=(0, 14)),
            "Positions [0, 14] of an edit at 'z.0': prompt 0 has 10 tokens, and 4 new ones make pos",
        ),
        (Edit(write=Scale(point="z.0", times=2), where=Span(start=40)), "reaches no position of prompt 0, of 10 tokens and 4 new ones"),
        (Edit(write=Scale(point="module:transformer.h.0.attn.c_attn.none", times=2)), "the model has no module"),
        (Edit(write=Scale(point="resid_post.0", times=1e38)), "The logits of continuation 0 after 10 tokens are not finite"),
    ],
)
def test_what_a_model_cannot_be_made_to_do_is_refused(edit: Edit, message: str) -> None:
    """Before the first forward, but for numbers that overflow."""
    plan = GeneratePlan(rows=(PROMPTS[0],), new_tokens=4, edits=(edit, edit))
    with pytest.raises(InputError, match=re.escape(message)):
        generate(make_subject("gpt2"), plan, TENSORS, SAES)


def test_models_and_lengths_that_cannot_generate_are_refused_with_a_sentence() -> None:
    """Encoders predict no next token, and positions end."""
    plan = GeneratePlan(rows=PROMPTS, new_tokens=CONTEXT - 9)
    with pytest.raises(InputError, match=r"A prompt of 10 tokens and 39 new ones are more than the 48 of tiny gpt2\. Ask for at most 38 new tokens"):
        generate(make_subject("gpt2"), plan, {})
    with pytest.raises(InputError, match=r"tiny bert \(bert\) predicts no next token"):
        generate(make_subject("bert"), GeneratePlan(rows=PROMPTS, new_tokens=1), {})
    with pytest.raises(InputError, match="Token id 9,999 is outside"):
        generate(make_subject("gpt2"), GeneratePlan(rows=((9999,),), new_tokens=1), {})
    with pytest.raises(NonFiniteError):
        generate(make_subject("gpt2"), GeneratePlan(rows=PROMPTS, new_tokens=1, edits=(Edit(write=Scale(point="resid_post.1", times=3e38)),)), {})
