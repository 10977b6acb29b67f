"""Chats: the tokens are the template's, and each has the role whose words it is of."""

import json
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import make_tiny_config, make_tokenizer, save_model

from interp_assets.corpus.plan import plan_corpus
from interp_assets.corpus.refs import token_shard_ref
from interp_assets.corpus.tokens import load_documents, load_tokens, make_token_shard, tokenize_example
from interp_assets.errors import ConfigError, InputError
from interp_assets.garcon.chat import TEMPLATE, UNKNOWN, tokenize_chat
from interp_assets.garcon.tokenizer import load_tokenizer
from interp_assets.storage.store import open_store

CHATML = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>\n{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
THOUGHTS = "{% for m in messages %}<s>{{ m['content'].split('</think>')[-1] }}</s>{% endfor %}"
TALK = [
    {"role": "system", "content": "user"},  # as the template writes roles: a search for the content would find the wrong place
    {"role": "user", "content": "  h\u00e9 user</s>\n"},
    {"role": "assistant", "content": "assistant"},
]


def _spell(tokenizer: object, chat: object) -> list[tuple[str, str]]:
    """Join the tokens of one role that follow each other."""
    spelled: list[tuple[str, list[int]]] = []
    for token, role in zip(chat.token_ids.tolist(), chat.roles, strict=True):
        if not spelled or spelled[-1][0] != role:
            spelled.append((role, []))
        spelled[-1][1].append(token)
    return [(role, tokenizer.decode(tokens)) for role, tokens in spelled]


def test_each_token_has_the_role_whose_words_it_is_of() -> None:
    """The oracle for the tokens is the tokenizer's own rendering; for the roles, the words read back."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    chat = tokenize_chat(tokenizer, TALK)
    assert chat.token_ids.tolist() == tokenizer.apply_chat_template(TALK, tokenize=True)["input_ids"]
    assert _spell(tokenizer, chat) == [
        (TEMPLATE, "<s>system\n"),
        ("system", "user"),
        (TEMPLATE, "</s>\n<s>user\n"),
        ("user", "h\u00e9 user</s>"),
        (TEMPLATE, "</s>\n<s>assistant\n"),
        ("assistant", "assistant"),
        (TEMPLATE, "</s>\n"),
    ]


def test_a_template_that_changes_what_it_is_given_leaves_no_guessed_roles() -> None:
    """Thoughts of earlier turns are cut out by some; where each word came from cannot be told then."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THOUGHTS
    plain, cut = tokenize_chat(tokenizer, TALK), tokenize_chat(tokenizer, [{"role": "assistant", "content": "hm</think>yes"}])
    assert {"user", "assistant", TEMPLATE} <= set(plain.roles)
    assert tokenizer.decode(cut.token_ids) == "<s>yes</s>"
    assert set(cut.roles) == {UNKNOWN}


def test_a_conversation_that_the_template_refuses_has_no_tokens_and_a_reason() -> None:
    """One of a million must not stop a run."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = STRICT
    chat = tokenize_chat(tokenizer, TALK)
    assert (len(chat.token_ids), chat.refusal) == (0, "Roles must alternate")
    assert _spell(tokenizer, tokenize_chat(tokenizer, TALK[1:]))[1] == ("user", "  h\u00e9 user</s>\n")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model whose tokenizer has a chat template."""
    folder = save_model(tmp_path_factory.mktemp("chat"), "gpt2")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = STRICT
    tokenizer.save_pretrained(folder)
    return folder


def test_a_column_of_messages_becomes_token_shards_with_roles(chat_model: Path, tmp_path: Path) -> None:
    """The same from JSON lines as from Parquet, whose columns hold nulls; what the template refuses is counted and named."""
    talks = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "no " * 20}] for i in range(30)]
    talks[3] = [{"role": "assistant", "content": "me first"}]
    (tmp_path / "lines").mkdir()
    (tmp_path / "rows").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    rows = [[{**message, "name": None} for message in talk] for talk in talks]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())]))
    pq.write_table(pa.table({"messages": pa.array(rows, kind)}), tmp_path / "rows" / "a.parquet")
    digests = []
    for folder in ("lines", "rows"):
        corpus = {"text_kind": "messages", "text_field": "messages", "contexts": "per_document", "context_length": 32, "shard_bytes": 1500}
        config = make_tiny_config(chat_model, tmp_path / folder, corpus=corpus)
        store = open_store(str(tmp_path / f"store-{folder}"))
        pipeline, tokenizer = plan_corpus(config, store), load_tokenizer(config.model)
        facts = make_token_shard(pipeline, store, tokenizer, 0).manifest.facts
        assert facts["n_left_out"] == 1
        assert "(Roles must alternate)" in facts["left_out"][0]
        tokens, documents = load_tokens(pipeline, store, 0), load_documents(pipeline, store, 0)
        kept = [talk for talk in talks if talk is not talks[3]][: len(documents.sources)]
        for i, talk in enumerate(kept):
            of_document = tokens.token_ids[tokens.documents == i].tolist()
            assert of_document == tokenizer.apply_chat_template(talk, tokenize=True)["input_ids"]
        table = pl.read_parquet(store.local_path(f"{token_shard_ref(pipeline, 0).path}/tokens.parquet"))
        assert set(table["role"].to_list()) == {"user", "assistant", TEMPLATE}
        assert tokens.roles
        assert [tokens.roles.names[code] for code in tokens.roles.codes] == table["role"].to_list()
        answers = table.filter((pl.col("role") == "assistant") & (pl.col("document") == 0))["token_id"].to_list()
        assert tokenizer.decode(answers) == "no " * 20
        digests.append([pq.read_table(store.local_path(f"{token_shard_ref(pipeline, 0).path}/tokens.parquet")), pipeline.source(0).n_bytes])
    assert digests[0] == digests[1]
    assert tokenize_example(config.corpus, tokenizer, "a</s>").tolist() == [64, 257]


def test_what_a_chat_needs_is_asked_for_at_planning(chat_model: Path, tmp_path: Path) -> None:
    """A template, contexts of one conversation, and a column of messages."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": [{"role": "user"}]}\n{"text": [{"from": "human", "value": "x"}]}\n{"text": []}\n')
    (tmp_path / "b.txt").write_text("plain")
    corpus = {"text_kind": "messages", "contexts": "per_document", "shard_bytes": 1}
    with pytest.raises(InputError) as caught:
        plan_corpus(make_tiny_config(chat_model, tmp_path, corpus=corpus), open_store("memory://chat"))
    message = str(caught.value)
    assert "a.jsonl, line 1: 'text' holds no messages, a list of {role, content} with text in both" in message
    assert "a.jsonl, line 3: " in message
    assert "b.txt: is text, and corpus.text_kind is messages" in message
    assert "3 documents" in message
    with pytest.raises(InputError, match=r"the tokenizer of .* has no chat template"):
        plan_corpus(make_tiny_config(save_model(tmp_path / "model", "gpt2"), tmp_path, corpus=corpus), open_store("memory://chat"))
    with pytest.raises(ConfigError, match="text_kind messages needs contexts: per_document"):
        make_tiny_config(chat_model, tmp_path, corpus={"text_kind": "messages"})
