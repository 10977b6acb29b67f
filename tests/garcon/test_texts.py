"""Texts and conversations continued in a notebook's words: recipes, roles, tables, and refusals that say what to write."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import D_MODEL, make_subject, make_tokenizer

from interp_assets.errors import InputError
from interp_assets.garcon.features import AttachedSae, Firings
from interp_assets.garcon.plan import Add, Cap, SaeAdd, SaeClamp, Span, When, name_tensor
from interp_assets.garcon.session import Model
from interp_assets.garcon.steering.recipe import load_recipe, make_edits
from interp_assets.train.sae import Sae

CHATML = "{% for m in messages %}<s>{{ m['role'][0] }}\n{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>a\n{% endif %}"
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "wine"},
    {"role": "user", "content": "more"},
]
VECTOR = torch.full((D_MODEL,), 0.5)


def _sae() -> Sae:
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn((D_MODEL, 24), generator=generator) * 0.3, torch.randn((24, D_MODEL), generator=generator)
    return Sae(kind="relu", W_enc=W_enc, b_enc=torch.zeros(24), W_dec=W_dec, b_dec=torch.ones(D_MODEL), threshold=torch.zeros(24), k=0)


def _quantile(latent: int, share: float) -> float:
    return latent + share


def _model() -> Model:
    maximum = torch.arange(24.0) / 2  # latent 0 is dead
    llm = Model(make_subject("llama"), make_tokenizer())
    llm.saes = {
        "l0": AttachedSae(_sae(), "resid_post.0", firings=Firings(maximum, torch.full((24,), 0.1), _quantile)),
        "new": AttachedSae(_sae(), "resid_post.1"),
    }
    llm.backend.norms = {"resid_post.0": 8.0}
    llm.tokenizer.chat_template = CHATML
    return llm


def test_a_recipe_is_the_same_in_a_file_and_in_a_notebook(tmp_path: Path) -> None:
    """Every unit becomes a number before the plan is hashed, and files of vectors lie beside the recipe."""
    save_file({"calm": VECTOR}, tmp_path / "calm.safetensors")
    (tmp_path / "golden.yaml").write_text(
        """
model: tiny llama
edits:
  - {sae: l0, latent: 4, clamp: 10 max}
  - {sae: l0, latent: 6, add: q0.5, where: generated, if: {sae: l0, latent: 3, above: 0.5 max}}
  - {sae: l0, latent: 5, clamp: -3.5 raw, where: "1:-1", special: true}
  - {sae: l0, latent: 7, add: 0.25 norm, where: [0, -1]}
  - {point: blocks.0.hook_resid_post, vector: calm.safetensors, add: 0.5 norm, where: prompt}
  - {point: resid_post.0, vector: calm.safetensors, cap: 0.5 norm}
  - {freeze: "pattern.*"}
"""
    )
    llm = _model()
    recipe = load_recipe(tmp_path / "golden.yaml")
    edits, freeze, tensors = make_edits(recipe, llm.backend)
    length, given = float(llm.saes["l0"].sae.W_dec[7].norm()), name_tensor(VECTOR)
    assert [(edit.write, edit.where, edit.special) for edit in edits] == [
        (SaeClamp(point="resid_post.0", sae="l0", latents=(4,), values=(20.0,)), "all", False),
        (SaeAdd(point="resid_post.0", sae="l0", latents=(6,), values=(6.5,), when=When(sae="l0", latent=3, above=0.75)), "generated", False),
        (SaeClamp(point="resid_post.0", sae="l0", latents=(5,), values=(-3.5,)), Span(start=1, stop=-1), True),
        (SaeAdd(point="resid_post.0", sae="l0", latents=(7,), values=(0.25 * 8 / length,)), (0, -1), False),
        (Add(point="resid_post.0", value=given, times=0.5 * 8 / float(VECTOR.norm())), "prompt", False),
        (Cap(point="resid_post.0", value=given, limit=4.0), "all", False),
    ]
    assert freeze == ("pattern.*",)
    assert torch.equal(tensors[given.tensor], VECTOR)
    in_words: list[dict[str, Any]] = [{"sae": "l0", "latent": 5, "clamp": "-3.5 raw", "where": slice(1, -1), "special": True}]
    in_words.append({"point": "resid_post.0", "vector": VECTOR, "add": "0.5 norm", "where": "prompt"})
    assert make_edits(load_recipe(in_words), llm.backend).edits == (edits[2], edits[4])
    by_file, by_words = (llm.generate("hello", new_tokens=3, steer=steer) for steer in (tmp_path / "golden.yaml", recipe))
    assert by_file.plan.hash == by_words.plan.hash
    assert by_file.texts == by_words.texts
    assert by_file.plan.freeze == ("pattern.0", "pattern.1")


def test_the_assistants_words_are_those_of_its_turns_and_of_what_is_generated() -> None:
    """The template's marks and other people's words are not touched; the oracle is the template itself."""
    llm = _model()
    texts = llm.generate(TALK, new_tokens=4, steer=[{"sae": "l0", "latent": 4, "clamp": "2 max", "where": "assistant"}])
    ids = llm.tokenizer.apply_chat_template(TALK, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert list(texts.plan.rows[0]) == ids
    assert "".join(llm.pieces([ids[place] for place in texts.plan.assistant[0]])) == "wine"
    n_special = sum(token.token in texts.plan.special for token in texts.generated.texts[0].tokens[:3])
    assert texts.generated.effects[0].n_places.tolist() == [4 + 3 - n_special]
    two = llm.generate([TALK, TALK[:1]], new_tokens=2)
    assert two.plan.rows[1] == tuple(llm.tokenizer.apply_chat_template(TALK[:1], tokenize=True, add_generation_prompt=True)["input_ids"])
    assert 257 in two.plan.stop


def test_what_was_generated_is_shown_with_what_it_would_have_been() -> None:
    """As text, as a table with one line a token, and as a picture whose text is escaped."""
    llm = _model()
    heard: list[Any] = []
    steer = [{"sae": "l0", "latent": 4, "clamp": "10 max"}, {"point": "mlp_out.1", "scale": 0.5}]
    texts = llm.generate(["hello", "<b>"], new_tokens=4, steer=steer, compare=True, n=2, temperature=1.0, on_token=heard.append)
    assert len(texts.texts) == len(texts.defaults) == 4
    table = texts.table()
    assert table.height == len(heard)
    assert table.columns == ["prompt", "continuation", "edited", "place", "token_id", "token", "logprob", "base_logprob", "kl"]
    effects = texts.effects()
    assert effects.height == 8
    assert effects["value"].to_list() == [20.0] * 4 + [None] * 4
    assert effects["fvu"][0] > 0
    assert (effects["moved"][4:] - 0.5).abs().max() < 1e-5
    drawn = texts._repr_html_()
    assert drawn.count("<tr>") == 5
    assert drawn.count("<span") == table.height
    with pytest.raises(InputError, match="There are 4 continuations"):
        _ = texts.text
    one = llm.generate([104, 105], new_tokens=2)
    assert one.text == one.texts[0]
    assert one.defaults == []


def _steer(**entry: Any) -> list[dict[str, Any]]:
    return [entry]


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        (_steer(sae="l0", latent=4, clamp=3), "The strength of latent 4 of 'l0' has a unit: '3.5 raw' (the units of the activations), '10 max'"),
        (_steer(sae="l0", latent=4, clamp="3"), "found '3'"),
        (_steer(sae="l0", latent=4, clamp="3 volts"), "found '3 volts'"),
        (_steer(sae="l0", latent=4, clamp="q1.5"), "found 'q1.5'"),
        (_steer(sae="l0", latent=4, clamp="nan raw"), "found 'nan raw'"),
        (
            _steer(sae="l0", latent=0, clamp="10 max"),
            "'10 max' of latent 0 of 'l0': it is dead, it never fired on the rows of its pipeline. Choose a live",
        ),
        (_steer(sae="l0", latent=0, add="q0.9"), "it is dead"),
        (_steer(sae="new", latent=4, clamp="10 max"), "how it fires is not known here. Name the SAE in features.saes of its pipeline and run it"),
        (
            _steer(sae="new", latent=4, add="0.1 norm"),
            "'0.1 norm' at 'resid_post.1': the mean norm there is not known here. Add the point to harvest",
        ),
        (_steer(sae="l0", latent=99, clamp="1 raw"), "Latents [99]: the SAE of 'resid_post.0' has latents 0 to 23"),
        (_steer(sae="l8", latent=4, clamp="1 raw"), "No SAE is called 'l8' here; there are ['l0', 'new']"),
        (_steer(point="resid_post.0", vector=[1.0] * D_MODEL, add="2 max"), "that unit belongs to a latent"),
        (_steer(point="resid_post.0", vector=[1.0] * D_MODEL, add=2.0), "The strength of a vector at 'resid_post.0' has a unit"),
        (_steer(point="resid_post.0", vector=[0.0] * D_MODEL, add="1 norm"), "The vector at 'resid_post.0' is zero"),
        (_steer(sae="l0", latent=4, clamp="1e999 raw"), "found '1e999 raw'"),
        (_steer(point="resid_post.0", vector=[float("nan")] * D_MODEL, add="1 raw"), "holds nan at [0]. Give finite numbers."),
        (_steer(point="resid_post.0", vector=[1.0, 2.0], add="1 raw"), "has shape [2]; while a text is written, one vector for every position"),
        (_steer(point="z.0", heads=[7], scale=2.0), "Heads [7] of 'z.0': it has heads 0 to 1"),
        (_steer(point="resid_post.0", vector="none.safetensors", add="1 raw"), "The vector 'none.safetensors' at 'resid_post.0' cannot be read"),
        (_steer(point="resid_post.0", add="1 raw"), "at edits.0.point: add takes a vector here"),
        (_steer(point="resid_post.0", vector=[1.0], scale=2.0), "at edits.0.point: scale takes no vector here"),
        (_steer(sae="l0", latent=4, clmp="1 raw"), "at edits.0.sae.clmp: there is no such field (did you mean 'clamp'?)."),
        (_steer(sae="l0", latent=4, clamp="1 raw", **{"if": {"sae": "l0", "latnt": 3}}), "latnt: there is no such field (did you mean 'latent'?)."),
        (_steer(pont="resid_post.0", scale=2.0), "or `point`, or `freeze` (did you mean 'point'?)."),
        ("nowhere/golden.yaml", "The recipe nowhere/golden.yaml is not there. Give the path of a YAML file."),
        (_steer(point="resid_post.0"), "at edits.0.point: says nothing to do; an entry does one of add, cap, project_out, scale, patch"),
        (_steer(sae="l0", latent=4, clamp="1 raw", add="1 raw"), "says clamp and add; an entry does one of clamp, add"),
        (_steer(sae="l0", latent=4, clamp="1 raw", wher="prompt"), "at edits.0.sae.wher: there is no such field (did you mean 'where'?)"),
        (_steer(latent=4, clamp="1 raw"), "at edits.0: An entry names `sae` and `latent`, or `point`, or `freeze`"),
        (_steer(sae="l0", latent=4, clamp="1 raw", where="1:x"), "at edits.0.sae.where"),
        (_steer(sae="l0", latent=4, clamp="1 raw", where="assistant"), "An edit is on the assistant's turns, but the prompt is no conversation"),
        ([], "at edits: Tuple should have at least 1 item"),
        ("none.yaml", "The recipe none.yaml is not there"),
    ],
)
def test_what_is_typed_wrong_in_a_recipe_is_told_with_what_to_write(steer: Any, message: str) -> None:
    """A recipe is a file that people write by hand."""
    llm = _model()
    with pytest.raises(InputError, match=re.escape(message)):
        llm.generate("hello", new_tokens=2, steer=steer)


def test_files_and_conversations_that_are_none_are_refused(tmp_path: Path) -> None:
    """A recipe of another model, a file that is no recipe, a vector file of two tensors, a model without a template."""
    llm = _model()

    def refuse(text: str, message: str) -> None:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            llm.generate("hello", new_tokens=2, steer=tmp_path / "bad.yaml")

    refuse("model: gpt2\nedits: [{freeze: pattern.0}]", "The recipe is for 'gpt2'; the model is 'tiny llama'")
    refuse("- a", "must be a mapping with `edits`, a list; found a list")
    refuse("edits: [", "is no YAML")
    save_file({"a": VECTOR, "b": VECTOR + 1}, tmp_path / "two.safetensors")
    refuse("edits: [{point: resid_post.0, vector: two.safetensors, add: 1 raw}]", r"holds 2 tensors: \['a', 'b'\]")
    (tmp_path / "text.safetensors").write_text("no tensor")
    refuse("edits: [{point: resid_post.0, vector: text.safetensors, add: 1 raw}]", "cannot be read")
    llm.tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'].split('</think>')[-1] }}</s>{% endfor %}"
    thought = [*TALK[:1], {"role": "assistant", "content": "so</think>wine"}]
    with pytest.raises(InputError, match="changes what it is given in conversation 0, so whose words stand where is not known"):
        llm.generate(thought, new_tokens=2, steer=[{"sae": "l0", "latent": 4, "clamp": "2 max", "where": "assistant"}])
    assert llm.generate(thought, new_tokens=2).plan.assistant == ()
    llm.tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        llm.generate(TALK, new_tokens=2)
    llm.tokenizer.chat_template = "{{ raise_exception('No system here') }}"
    with pytest.raises(InputError, match="refuses conversation 0: No system here"):
        llm.generate(TALK, new_tokens=2)
    with pytest.raises(InputError, match="a row without tokens"):
        llm.generate("", new_tokens=2)
