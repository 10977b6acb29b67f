"""Token shards and the plan: right tokens at right rows, the same bytes every time, and bad inputs refused early."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tiny_models import CONTEXT, VOCABULARY, make_tiny_config, make_tokenizer, save_model, write_texts

from interp_assets.corpus.plan import describe_empty, plan_corpus
from interp_assets.corpus.refs import token_shard_ref
from interp_assets.corpus.sources import iter_documents
from interp_assets.corpus.tokens import (
    context_offsets,
    describe_left_out,
    lay_out,
    load_documents,
    load_tokens,
    make_token_shard,
    tokenize_documents,
)
from interp_assets.errors import ArtifactMissingError, InputError
from interp_assets.garcon.tokenizer import load_tokenizer
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import PLAN, Pipeline, load_pipeline
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.store import Store, open_store


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny language model."""
    return save_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny encoder."""
    return save_model(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture
def config(decoder: Path, tmp_path: Path) -> PipelineConfig:
    """Configure a pipeline over a few text files."""
    return make_tiny_config(decoder, write_texts(tmp_path / "texts"))


def test_a_plan_is_saved_and_read_back(config: PipelineConfig, memory_store: Store) -> None:
    """Jobs on other machines know only the plan."""
    pipeline = plan_corpus(config, memory_store)
    assert load_pipeline(config, memory_store) == pipeline
    assert pipeline.plan.hook_widths == {"resid_post.0": 16}
    assert (pipeline.plan.max_context, pipeline.plan.vocabulary_size) == (CONTEXT, VOCABULARY)
    before = memory_store.get(PLAN)
    assert plan_corpus(config, memory_store) == pipeline
    assert memory_store.get(PLAN) == before


def test_an_empty_file_leaves_the_plan_as_every_release_reads_it(config: PipelineConfig, memory_store: Store) -> None:
    """Releases refuse keys that they do not know: after a rollback, or beside an older worker, one `__init__.py` would damage the plan."""
    plan_corpus(config, memory_store)
    before = memory_store.get(PLAN)
    (Path(config.corpus.path) / "__init__.py").touch()
    pipeline = plan_corpus(config, memory_store)
    assert describe_empty(pipeline) == "1 empty file skipped: __init__.py"
    assert memory_store.get(PLAN) == before
    plan = json.loads(before)
    assert (plan.pop("format"), plan.pop("version")) == ("interp-assets/plan", 1)
    known = {"shards", "tokenizer_fingerprint", "model_fingerprint", "hook_widths", "vocabulary_size", "max_context", "generations"}
    assert plan.keys() == known, "a key was added to or taken from version 1: raise the plan's version"


def test_the_text_comes_back_from_the_tokens(config: PipelineConfig, memory_store: Store) -> None:
    """Any row must lead back to its text, by its row and its document."""
    pipeline = plan_corpus(config, memory_store)
    tokenizer = load_tokenizer(config.model)
    for index in pipeline.shard_indices:
        facts = make_token_shard(pipeline, memory_store, tokenizer, index).manifest.facts
        tokens = load_tokens(pipeline, memory_store, index)
        documents = load_documents(pipeline, memory_store, index)
        expected = list(iter_documents(config.corpus, pipeline.source(index)))
        assert documents.sources == [name for name, _ in expected]
        for i, (_, text) in enumerate(expected):
            rows = slice(int(documents.first_rows[i]), int(documents.first_rows[i] + documents.n_rows[i]))
            assert (tokens.documents[rows] == i).all()
            assert tokenizer.decode(tokens.token_ids[rows][tokens.valid[rows]]) == text
        assert facts == {
            "n_rows": tokens.n_rows,
            "n_valid": int(tokens.valid.sum()),
            "n_contexts": len(context_offsets(tokens.contexts)) - 1,
            "n_documents": len(expected),
            "n_bytes": pipeline.source(index).n_bytes,
        }
        assert facts["n_valid"] == facts["n_bytes"], "one token per byte"


def test_the_name_of_a_special_token_in_a_text_is_text(config: PipelineConfig, memory_store: Store, tmp_path: Path) -> None:
    """Sources and papers spell `</s>` out; as a special token it would end the text there for the model, and its rows would not count."""
    text = "a </s> b <s>[PAD] c"
    (tmp_path / "texts" / "9.txt").write_text(text)
    pipeline = plan_corpus(config, memory_store)
    tokenizer = load_tokenizer(config.model)
    last = pipeline.shard_indices[-1]
    make_token_shard(pipeline, memory_store, tokenizer, last)
    tokens, documents = load_tokens(pipeline, memory_store, last), load_documents(pipeline, memory_store, last)
    rows = (tokens.documents == documents.sources.index("9.txt")) & tokens.valid
    assert tokenizer.decode(tokens.token_ids[rows]) == text
    assert rows.sum() == len(text.encode())


def test_every_packed_context_opens_with_bos(config: PipelineConfig, memory_store: Store) -> None:
    """Language models expect it; its activations are outliers and never trained on."""
    pipeline = plan_corpus(config, memory_store)
    make_token_shard(pipeline, memory_store, load_tokenizer(config.model), 1)
    tokens = load_tokens(pipeline, memory_store, 1)
    offsets = context_offsets(tokens.contexts)
    assert (tokens.token_ids[offsets[:-1]] == 256).all()
    assert (np.diff(offsets)[:-1] == 24).all()
    assert set(tokens.token_ids[~tokens.valid].tolist()) == {256, 257}


def test_an_encoder_gets_one_document_per_context(encoder: Path, tmp_path: Path, memory_store: Store) -> None:
    """Each context is [CLS] text [SEP]."""
    config = make_tiny_config(encoder, write_texts(tmp_path / "texts"), corpus={"contexts": "per_document"})
    pipeline = plan_corpus(config, memory_store)
    make_token_shard(pipeline, memory_store, load_tokenizer(config.model), 0)
    tokens = load_tokens(pipeline, memory_store, 0)
    offsets = context_offsets(tokens.contexts)
    assert (tokens.token_ids[offsets[:-1]] == 256).all()
    assert (tokens.token_ids[offsets[1:] - 1] == 257).all()
    with pytest.raises(InputError, match=r"is an encoder \(bert\).*set corpus.contexts to per_document"):
        plan_corpus(make_tiny_config(encoder, tmp_path / "texts"), memory_store)


def test_the_same_text_gives_the_same_bytes(config: PipelineConfig) -> None:
    """Re-materializing a lost shard must leave everything after it fresh; a second call does no work."""
    digests = []
    for name in ("one", "two"):
        store = open_store(f"memory://{name}")
        pipeline = plan_corpus(config, store)
        steps: list[int] = []
        produced = make_token_shard(pipeline, store, load_tokenizer(config.model), 0, steps.append)
        assert (produced.is_cached, sum(steps)) == (False, produced.manifest.facts["n_documents"])
        assert make_token_shard(pipeline, store, load_tokenizer(config.model), 0).is_cached
        digests.append(produced.manifest.digest)
    assert digests[0] == digests[1]


def test_polars_reads_the_tables(config: PipelineConfig, local_store: Store) -> None:
    """Tables are for everybody, not for our code only."""
    pipeline = plan_corpus(config, local_store)
    make_token_shard(pipeline, local_store, load_tokenizer(config.model), 0)
    folder = local_store.local_path(token_shard_ref(pipeline, 0).path)
    assert folder is not None
    counts = pl.read_parquet(folder / "tokens.parquet").group_by("document").len().sort("document")
    assert counts["len"].to_list() == pl.read_parquet(folder / "documents.parquet")["n_rows"].to_list()


def test_a_shard_that_was_never_made_is_missing(config: PipelineConfig, memory_store: Store) -> None:
    """The error of the manifest comes through."""
    pipeline = plan_corpus(config, memory_store)
    with pytest.raises(ArtifactMissingError, match="Materialize it first"):
        load_tokens(pipeline, memory_store, 0)


def test_a_context_longer_than_the_models_is_refused_at_planning(config: PipelineConfig, memory_store: Store, decoder: Path) -> None:
    """Not after hours of tokenizing."""
    long = make_tiny_config(decoder, Path(config.corpus.path), corpus={"context_length": CONTEXT + 1})
    with pytest.raises(InputError, match=rf"context_length is {CONTEXT + 1}, but .* takes at most {CONTEXT} tokens"):
        plan_corpus(long, memory_store)


def test_an_unknown_hook_point_is_refused_at_planning(config: PipelineConfig, memory_store: Store, decoder: Path) -> None:
    """With the near ones."""
    wrong = make_tiny_config(
        decoder, Path(config.corpus.path), harvest={"hook_points": ["resid_pst.0"]}, saes=[{"name": "demo", "hook_point": "resid_pst.0", "k": 4}]
    )
    with pytest.raises(InputError, match=r"no hook point 'resid_pst\.0'\. Near: resid_post\.0"):
        plan_corpus(wrong, memory_store)
    assert memory_store.size(PLAN) is None


def test_a_tokenizer_of_another_model_is_refused(config: PipelineConfig, memory_store: Store, tmp_path: Path) -> None:
    """A larger vocabulary cannot belong to the model."""
    folder = save_model(tmp_path / "mixed", "gpt2")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(5)])
    tokenizer.save_pretrained(folder)
    mixed = make_tiny_config(folder, Path(config.corpus.path))
    (Path(config.corpus.path) / "0.txt").write_text("<4>" * 300)
    pipeline = plan_corpus(mixed, memory_store)
    with pytest.raises(InputError, match=r"gives token id 263, but the model has only 259 embeddings: they do not belong together"):
        make_token_shard(pipeline, memory_store, load_tokenizer(mixed.model), 0)
    assert isinstance(pipeline, Pipeline)
    with pytest.raises(ArtifactMissingError):
        load_tokens(pipeline, memory_store, 0)


def test_documents_without_a_token_are_left_out_counted_and_named(config: PipelineConfig, memory_store: Store) -> None:
    """One such document among a million of a data set on the hub, which nobody can take out, stopped the run."""
    for i in range(7):
        (Path(config.corpus.path) / f"0{i}.txt").write_text("?" * 40)
    pipeline = plan_corpus(config, memory_store)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = _delete(r"\?")
    manifest = make_token_shard(pipeline, memory_store, tokenizer, 0).manifest
    names = [f"0{i}.txt" for i in range(7)]
    assert (manifest.facts["n_left_out"], manifest.facts["left_out"]) == (7, names[:5])
    assert describe_left_out(manifest) == f"7 documents without a token left out: {', '.join(names[:5])} and 2 more"
    expected = [(name, text) for name, text in iter_documents(config.corpus, pipeline.source(0)) if name not in names]
    tokens, documents = load_tokens(pipeline, memory_store, 0), load_documents(pipeline, memory_store, 0)
    assert documents.sources == [name for name, _ in expected]
    assert manifest.facts["n_documents"] == len(expected)
    assert tokenizer.decode(tokens.token_ids[tokens.valid]) == "".join(text for _, text in expected)
    assert describe_left_out(make_token_shard(pipeline, memory_store, tokenizer, 1).manifest) == ""


def test_a_shard_of_which_no_document_becomes_a_token_is_refused(config: PipelineConfig, memory_store: Store) -> None:
    """Then it is the tokenizer, the column or the kind of text that is wrong."""
    pipeline = plan_corpus(config, memory_store)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = _delete(".")
    with pytest.raises(InputError, match=r"None of \d documents? of shard-000000 becomes a token, the first is 0\.txt\. Are the tokenizer"):
        make_token_shard(pipeline, memory_store, tokenizer, 0)


def test_special_tokens_in_a_text_are_tokens_where_the_corpus_says_so(config: PipelineConfig, decoder: Path) -> None:
    """Text that a chat template has rendered: split into characters, the model would never have seen it so."""
    folder = Path(config.corpus.path)
    (folder / "0.txt").write_text("<s>a</s>" * 100)
    found = {}
    for kind in ("plain", "with_special_tokens"):
        chosen = make_tiny_config(decoder, folder, corpus={"text_kind": kind, "contexts": "per_document"})
        store = open_store(f"memory://{kind}")
        pipeline = plan_corpus(chosen, store)
        make_token_shard(pipeline, store, load_tokenizer(chosen.model), 0)
        found[kind] = load_tokens(pipeline, store, 0), token_shard_ref(pipeline, 0)
    tokens, _ = found["with_special_tokens"]
    assert tokens.token_ids[:300].tolist() == [256, 64, 257] * 100
    assert tokens.valid[:300].tolist() == [False, True, False] * 100
    assert found["plain"][0].token_ids[:8].tolist() == make_tokenizer()("<s>a</s>", split_special_tokens=True)["input_ids"]
    assert found["plain"][1].artifact_id != found["with_special_tokens"][1].artifact_id


def test_a_text_that_opens_with_bos_gets_no_second_one() -> None:
    """Rendered chats begin with it, and the tokenizer would put another before it: a context that the model never saw."""
    corpus = CorpusConfig(text_kind="with_special_tokens", contexts="per_document")
    tokenizer = make_tokenizer(is_encoder=True)
    (document,) = tokenize_documents(corpus, tokenizer, ["[CLS]ab[SEP]"])
    assert lay_out(corpus, tokenizer, [document.token_ids]).token_ids.tolist() == [256, 64, 65, 257]
    (empty,) = tokenize_documents(corpus, tokenizer, ["[CLS][SEP]"])
    assert len(empty.token_ids) == 0


def _delete(pattern: str) -> object:
    from tokenizers import Regex, normalizers

    return normalizers.Replace(Regex(pattern), "")


def test_excluded_positions_and_tokens_are_not_valid_and_are_counted(config: PipelineConfig, memory_store: Store) -> None:
    """Attention sinks sit at the first positions of contexts and on separators; whatever is not valid is not trained on, measured or shown."""
    tokenizer, plain = load_tokenizer(config.model), plan_corpus(config, memory_store)
    make_token_shard(plain, memory_store, tokenizer, 0)
    usual = load_tokens(plain, memory_store, 0)
    assert "n_excluded" not in usual.manifest.facts
    token_id = int(np.bincount(usual.token_ids[usual.valid]).argmax())
    harvest = config.harvest.model_copy(update={"excluded_positions": 3, "excluded_token_ids": [token_id]})
    other = Pipeline(config.model_copy(update={"harvest": harvest}), plain.plan)
    assert token_shard_ref(other, 0).artifact_id != token_shard_ref(plain, 0).artifact_id
    assert make_token_shard(other, memory_store, tokenizer, 0).manifest.facts["n_rows"] == len(usual.valid)
    found, starts = load_tokens(other, memory_store, 0), context_offsets(usual.contexts)
    position = np.arange(len(usual.valid)) - starts[usual.contexts]
    assert (found.valid == usual.valid & (position >= 3) & (usual.token_ids != token_id)).all()
    assert found.manifest.facts["n_excluded"] == (usual.valid & ~found.valid).sum() > 0
    assert found.manifest.facts["n_valid"] == found.valid.sum() > 0
    for wrong in ({"excluded_positions": config.corpus.context_length}, {"excluded_token_ids": [VOCABULARY]}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            plan_corpus(config.model_copy(update={"harvest": config.harvest.model_copy(update=wrong)}), memory_store)
