"""A small world for heads: tiny models over a few texts, planned and tokenized, in a store of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_net, make_tiny_config, make_tokenizer, write_texts

from interp_assets.corpus.plan import plan_corpus
from interp_assets.corpus.tokens import make_token_shard
from interp_assets.garcon.subject import SubjectModel, load_subject_model
from interp_assets.garcon.tokenizer import load_tokenizer
from interp_assets.harvest.heads.tokens import choose_tokens
from interp_assets.planning.config import ExecutionConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.store import Store, open_store

ENCODERS = ("bert", "distilbert")
HEADS = {"key_tokens": 8, "top_k": 4, "n_intervals": 4, "examples_per_interval": 2}


@dataclass
class World:
    """A planned pipeline with its tokens, and its subject model."""

    pipeline: Pipeline
    store: Store
    subject: SubjectModel


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save tiny models and texts once."""
    root = tmp_path_factory.mktemp("heads")
    return {"texts": write_texts(root / "texts"), "root": root}


@pytest.fixture
def make_world(folders: dict[str, Path]) -> Callable[..., World]:
    """Return a function that plans a pipeline with heads and makes its token shards."""

    def make(kind: str = "gpt2", *, heads: dict[str, Any] | None = None, **sections: Any) -> World:
        store = open_store("memory://heads")
        if kind not in folders:
            folders[kind] = folders["root"] / kind
            make_net(kind).save_pretrained(folders[kind])
            make_tokenizer(is_encoder=kind in ENCODERS).save_pretrained(folders[kind])
        corpus = {"contexts": "per_document" if kind in ENCODERS else "packed", "context_length": 40, **sections.pop("corpus", {})}
        config = make_tiny_config(
            folders[kind], folders["texts"], corpus=corpus, heads={**HEADS, **(heads or {})}, execution={"device": "cpu"}, **sections
        )
        pipeline = plan_corpus(config, store)
        for index in pipeline.shard_indices:
            make_token_shard(pipeline, store, load_tokenizer(config.model), index)
        choose_tokens(pipeline, store)
        return World(pipeline, store, load_subject_model(config.model, ExecutionConfig(device="cpu")))

    return make
