"""A model on a server is the model here: the same words, the same bits, the same errors, and nothing to install but torch."""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_server import ModelServer, make_served, serve_model
from tiny_models import D_MODEL

from interp_assets import lab
from interp_assets.errors import InputError, InterpError, NonFiniteError, ServiceError, TooLargeError
from interp_assets.garcon.features import AttachedSae, Firings
from interp_assets.garcon.session import Model
from interp_assets.train.sae import Sae


def _sae() -> Sae:
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = (torch.randn(shape, generator=generator) for shape in ((D_MODEL, 24), (24, D_MODEL)))
    return Sae(kind="relu", W_enc=W_enc, b_enc=torch.zeros(24), W_dec=W_dec, b_dec=torch.ones(D_MODEL), threshold=torch.zeros(24), k=0)


FIRINGS = Firings(torch.ones(24).index_fill(0, torch.tensor([3]), 0.0), torch.linspace(0, 1, 24), lambda _latent, share: share)


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    """A tiny GPT-2 with an SAE."""
    with serve_model(make_served(saes={"stream": AttachedSae(_sae(), "resid_post.0", firings=FIRINGS)})) as server:
        yield server


@pytest.fixture(scope="module")
def remote(server: ModelServer) -> Model:
    """The model as a notebook elsewhere has it."""
    return lab.connect(server.url, "tiny")


def test_the_same_words_give_the_same_bits(server: ModelServer, remote: Model) -> None:
    """Reads, patches from another run, metrics, derivatives, SAEs, sweeps and attributions; also the plan is one."""
    found = []
    for llm in (server.local, remote):
        clean = llm.run("hallo wein", read=["z.*", "resid_post.*"])
        with llm.trace(["hello wine", "hallo"]) as t:
            t.patch("z.1", clean["z.1"], rows=0, heads=[1])
            t.add("resid_pre.1", torch.linspace(-1, 1, D_MODEL), pos=-1)
            t.sae_clamp("stream", {3: "2.5 raw"}, pos=slice(1, None))
            t.freeze("pattern.0")
            d = t.logit_diff("a", "b")
            g = t.grad(d, at=["resid_post.*", "pattern.1"])
            read, latents, where = t.read("pattern.1"), t.sae_read("stream"), t.read("z.0", pos="h")
        grid = llm.sweep("resid_post.*", "hello wine", clean, llm.logit_diff("a", "b"))
        estimate = llm.attribute("z.*", "hello wine", clean, llm.logprob("a"))
        tensors = [*clean.values(), read, latents, where, *g.values(), *estimate.values()]
        found.append(
            ([result.tensor for result in tensors] + [grid.tensor], [result.tokens for result in tensors], t.plan.hash, t.batch, d.value, grid.base)
        )
    (ours, our_tokens, *our_facts), (theirs, their_tokens, *their_facts) = found
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert our_facts == their_facts
    assert our_tokens == their_tokens


def test_tables_and_names_are_the_same(server: ModelServer, remote: Model) -> None:
    """Points with shapes and refusals, TransformerLens' names, patterns of names, tokens."""
    assert remote.points().equals(server.local.points())
    wanted = ["z.*", "blocks.1.hook_resid_post", "module:transformer.h.0.mlp", "blocks.*.hook_mlp_out"]
    assert remote.names(wanted) == ["z.0", "z.1", "resid_post.1", "module:transformer.h.0.mlp", "mlp_out.0", "mlp_out.1"]
    with pytest.raises(InputError, match=r"No hook point fits 'module:transformer\.h\.\*\.mlp': `\*` stands for all layers"):
        remote.names("module:transformer.h.*.mlp")
    assert remote.tokenize(["hello", "x"]) == server.local.tokenize(["hello", "x"])
    assert (remote.token("a"), remote.pieces([104, 105])) == (server.local.token("a"), server.local.pieces([104, 105]))
    assert {name: sae.hook_point for name, sae in remote.saes.items()} == {"stream": "resid_post.0"}


def test_tokens_have_roles_and_special_ones_are_marked(server: ModelServer, remote: Model) -> None:
    """Whose words stand where is the template's to say; where it changes what it is given nobody guesses, and texts have no roles."""
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    tokenizer: Any = server.local.tokenizer  # the server's too
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    try:
        tables = [llm.tokens(talk) for llm in (server.local, remote)]
        tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'].split('y')[-1] }}{% endfor %}"
        changed = [llm.tokens([talk, talk[:1]]) for llm in (server.local, remote)]
    finally:
        tokenizer.chat_template = None
    assert tables[0].equals(tables[1])
    assert tables[0]["token"].to_list() == ["<s>", "h", "i", "<s>", "y", "o"]
    assert tables[0]["special"].to_list() == [True, False, False, True, False, False]
    assert tables[0]["role"].to_list() == ["template", "user", "user", "template", "assistant", "assistant"]
    assert changed[0].equals(changed[1])
    assert changed[0]["role"].to_list() == [None] * 5 + ["template", "user", "user"]
    texts = remote.tokens(["hi", "x"])
    assert texts.equals(server.local.tokens(["hi", "x"]))
    assert texts.select("row", "position", "id").rows() == [(0, 0, 71), (0, 1, 72), (1, 0, 87)]
    assert texts["role"].to_list() == [None] * 3


def _overflow(llm: Model) -> None:
    with llm.trace("hello") as t:
        t.read("resid_post.0", after=True)
        t.scale("resid_post.0", 1e38)
        t.scale("resid_post.0", 1e38)


@pytest.mark.parametrize(
    "ask",
    [
        lambda llm: llm.run("hello", read="resid_pots.1"),
        lambda llm: llm.run("hello", read="blocks.0.hook_attn_in"),
        lambda llm: llm.run("hello", read="z.1", pos=99),
        lambda llm: llm.run("hello", read="z.1", heads=[7]),
        lambda llm: llm.run("x" * 49, read="z.0"),
        lambda llm: llm.run([1, 9999], read="z.0"),
        lambda llm: llm.run("", read="z.0"),
        lambda llm: llm.logit_diff("xy", "a"),
        lambda llm: llm.attribute("z.0", "hello", llm.run("hallo wein", read="z.0"), llm.logit_diff("a", "b")),
        lambda llm: llm.sweep("logits", "hello", "zero", llm.logit_diff("a", "b")),
        lambda llm: llm.sweep("z.0", "hello", "zero", llm.logit_diff("a", "b"), by="token"),
        lambda llm: llm.sweep("z.0", "hello", llm.run("hallo wein", read="z.0"), llm.logit_diff("a", "b")),
        lambda llm: llm.trace("hello").sae_read("l8"),
        _overflow,
    ],
)
def test_errors_are_what_they_are_here(server: ModelServer, remote: Model, ask: object) -> None:
    """The same class and the same sentence, whichever side finds it."""
    assert callable(ask)
    with pytest.raises(InputError) as here:
        ask(server.local)
    with pytest.raises(InputError) as there:
        ask(remote)
    assert (type(there.value), str(there.value)) == (type(here.value), str(here.value))


def test_a_computed_infinity_keeps_its_class(remote: Model) -> None:
    """A program may want to tell it from a wrong question."""
    with pytest.raises(NonFiniteError, match="read0 is"):
        _overflow(remote)


def test_what_is_kept_is_patched_from_there_and_fetched_when_looked_at(server: ModelServer, remote: Model) -> None:
    """A big activation need not travel twice: the plan names it."""
    clean = remote.run("hallo", read="z.*", keep=True)
    assert repr(clean["z.1"]) == "z.1 [row, position, head, dimension] [1, 5, 2, 8]"
    here = server.local.run("hallo", read="z.*")
    found = []
    for llm, source in ((remote, clean), (server.local, here)):
        with llm.trace("hello") as t:
            t.patch("z.1", source["z.1"])
            found.append(t.read("resid_post.1"))
    assert torch.equal(found[0].tensor, found[1].tensor)
    assert torch.equal(clean["z.0"].tensor, here["z.0"].tensor)
    with pytest.raises(InputError, match=r"Nothing of yours is kept under [0-9a-f]{32}. Kept results stay for 10 minutes"):
        _patch(server.connect(), clean)


def _patch(stranger: Model, clean: object) -> None:
    backend = stranger.backend
    result = clean["z.1"]  # type: ignore[index] - results by name
    with stranger.trace("hello") as t:
        result.kept = result.kept._replace(owner=backend)
        t.patch("z.1", result)
        t.read("logits")


def test_texts_are_continued_as_here(server: ModelServer, remote: Model) -> None:
    """Token by token as they come, with edits, comparison, what the edits did and what the strengths mean."""
    vector = torch.linspace(-1, 1, D_MODEL)
    steer = [
        {"point": "resid_post.0", "vector": vector, "add": "2 raw", "where": "generated"},
        {"sae": "stream", "latent": 3, "clamp": "2.5 raw"},
    ]
    found: list[Any] = []
    asked: Any = {"new_tokens": 4, "steer": steer, "n": 2, "seed": 1, "temperature": 0.9, "compare": True, "latents": {"stream": [3, 9]}}
    for llm in (server.local, remote):
        came: list[Any] = []
        texts = llm.generate(["hello", "wine!"], on_token=came.append, **asked)
        found.append((texts, came))
    (ours, our_tokens), (theirs, their_tokens) = found
    assert theirs.plan.hash == ours.plan.hash
    assert their_tokens == our_tokens
    assert (theirs.texts, theirs.defaults) == (ours.texts, ours.defaults)
    assert theirs.table().equals(ours.table())
    assert theirs.effects().equals(ours.effects())
    assert ours.table().columns[-2:] == ["stream.3", "stream.9"]


def test_doses_are_those_that_are_measured_here(server: ModelServer, remote: Model) -> None:
    """The server writes 32 texts at once, so that 36 take two plans; controls come from its SAE. Without weights it tells no direction."""
    given: Any = {"prompts": ["hello", "wine!"], "strengths": [-3, 5], "unit": "raw", "new_tokens": 4, "n": 2, "seed": 3, "temperature": 0.9}
    ours, theirs = (llm.dose([{"sae": "stream", "latent": 5, "clamp": "1 raw"}], **given) for llm in (server.local, remote))
    assert theirs.texts.select("arm", "strength", "prompt", "continuation", "text").equals(
        ours.texts.select("arm", "strength", "prompt", "continuation", "text")
    )
    assert set(theirs.texts["arm"]) == {"feature", "other", "random", "flip", "zero"}
    for outcome in ours.outcomes:
        assert torch.allclose(*(torch.tensor(dose.texts[outcome].to_list()) for dose in (ours, theirs)), rtol=1e-4, atol=1e-5, equal_nan=True)
    with pytest.raises(InputError, match="has latents 0 to 23"):
        remote.dose([{"sae": "stream", "latent": 99, "clamp": "1 raw"}], **given)


@pytest.mark.parametrize(
    "ask",
    [
        lambda llm: llm.generate("hello", new_tokens=100),
        lambda llm: llm.generate([{"role": "user", "content": "hi"}], new_tokens=2),
        lambda llm: llm.generate("hello", new_tokens=2, steer=[{"sae": "stream", "latent": 3, "clamp": "2 max"}]),
        lambda llm: llm.generate("hello", new_tokens=2, steer=[{"sae": "stream", "latent": 99, "clamp": "2 raw"}]),
        lambda llm: llm.generate("hello", new_tokens=2, steer=[{"sae": "l8", "latent": 9, "clamp": "2 raw"}]),
        lambda llm: llm.generate("hello", new_tokens=2, steer=[{"point": "resid_pots.0", "scale": 2.0}]),
    ],
)
def test_texts_that_cannot_be_are_refused_as_here(server: ModelServer, remote: Model, ask: Any) -> None:
    """Before the first token, or in its place."""
    with pytest.raises(InterpError) as here:
        ask(server.local)
    with pytest.raises(InterpError) as there:
        ask(remote)
    assert (type(there.value), str(there.value)) == (type(here.value), str(here.value))
    with pytest.raises(TooLargeError, match="33 texts; at most 32"):
        remote.generate("hello", new_tokens=1, n=33, temperature=1.0)


def test_texts_are_reduced_as_here(server: ModelServer, remote: Model) -> None:
    """Moments in float64 bit for bit, tables with their types; a job tells how far it is."""
    wanted = {"resid_post.*": ["mean", "cov", "norms", "histogram", "top:3"]}
    ours = server.local.reduce(["hello wine", "hallo"], wanted)
    done: list[int] = []
    theirs = remote.reduce(["hello wine", "hallo"], wanted, progress=done.append)
    assert sum(done) == 15
    assert list(theirs) == list(ours)
    for point, reductions in ours.items():
        assert list(theirs[point]) == list(reductions)
        for what, value in reductions.items():
            found = theirs[point][what]
            assert found.dtype == value.dtype if what in ("mean", "cov") else found.schema == value.schema
            assert torch.equal(found, value) if what in ("mean", "cov") else found.equals(value)
    for texts, reductions, message in (("hello", {"pattern.0": ["mean"]}, "has no rows"), ("hello", {"z.0": ["median"]}, "The plan is wrong")):
        for llm in (server.local, remote):
            with pytest.raises(InputError, match=message):
                llm.reduce(texts, reductions)


def test_a_request_says_its_size_without_a_forward(server: ModelServer, remote: Model) -> None:
    """`dry` counts what `run` would send, at every kind of point."""
    with remote.trace(["hello", "hi"]) as t:
        for point, options in (("z.1", {"heads": [0]}), ("pattern.1", {"pos": -1}), ("logits", {}), ("module:transformer.h.0.mlp", {"pos": [0, 1]})):
            t.read(point, **options)
        t.sae_read("stream", [1, 2, 3])
        g = t.grad(t.loss(), at=["mlp_act.0", "pattern.0"])
        attribution = t.attribute(t.logit_diff("a", "b"), ["z.0"], "zero")
    before = server.thread.n_forwards
    sizes = remote.backend.measure(t.plan, t._tensors)
    assert server.thread.n_forwards == before
    measured = {name: result.tensor.nbytes for name, result in t._results.items()}
    measured |= {name: sum(result.tensor.nbytes for result in found.values()) for name, found in t._derived.items()}
    assert sizes == measured
    assert (len(g), len(attribution)) == (2, 1)


def test_requests_that_cannot_be_read_are_not_sent(remote: Model) -> None:
    """A server hangs up on too long a body; who sends it is told before."""
    limit = remote.backend.about["limits"]["body_bytes"]
    remote.backend.about["limits"]["body_bytes"] = 1000
    try:
        t = remote.trace("hello")
        t.patch("logits", torch.zeros(1, 5, 259))
        with pytest.raises(TooLargeError, match=r"reads at most 1,000\. Patch fewer points"):
            t.execute()
    finally:
        remote.backend.about["limits"]["body_bytes"] = limit


def test_a_notebook_outlives_its_connection(server: ModelServer, remote: Model) -> None:
    """The server lets silent connections go; the next cell must not fail for it."""
    remote.backend._connection._local.connection.sock.shutdown(socket.SHUT_RDWR)
    assert remote.run("hello", read="z.0")["z.0"].tensor.shape == (1, 5, 2, 8)
    with pytest.raises(InputError, match="is on a server, and its subject with it"):
        _ = remote.subject


@pytest.mark.parametrize(
    ("url", "model", "kind", "message"),
    [
        ("127.0.0.1:8420", "tiny", InputError, "is no address of a server: give scheme, name and port"),
        ("http://127.0.0.1:1", "tiny", ServiceError, "does not answer (ConnectionRefusedError"),
        ("{url}", "pythia", InputError, "serves no model 'pythia'; it serves ['tiny']"),
    ],
)
def test_who_cannot_connect_is_told_why(server: ModelServer, url: str, model: str, kind: type[InterpError], message: str) -> None:
    """In one sentence, with what to look at."""
    with pytest.raises(kind, match=re.escape(message)):
        lab.connect(url.format(url=server.url), model)


def test_a_client_loads_neither_transformers_nor_a_web_framework(server: ModelServer) -> None:
    """In a process of its own: that is what makes a client start within a second."""
    program = f"""
import sys
from interp_assets import lab
llm = lab.connect({server.url!r}, "tiny")
with llm.trace("hello") as t:
    d = t.logit_diff("a", "b")
    g = t.grad(d, at=["resid_post.*", "z.*"])
print(len(g), sorted({{"transformers", "fastapi", "starlette", "tokenizers", "uvicorn", "dagster"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "[]"]


def test_the_examples_of_the_page_about_servers_run(server: ModelServer) -> None:
    """With this server's address and model in their place."""
    page = (Path(__file__).parents[2] / "docs" / "garcon.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    names = {"lab": lab}
    example = example.replace("http://127.0.0.1:8420", server.url).replace("pystdlib_gpt2", "tiny").replace("resid_post.2", "resid_post.0")
    exec(example, names)
    llm: Any = names["llm"]
    assert names["t"].batch == (1, len(llm.tokenize("import os\nimport sys")[0]))
