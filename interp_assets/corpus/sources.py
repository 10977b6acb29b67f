"""A corpus configuration becomes a list of shards, each a list of whole documents; and a shard's documents are read again from it.

Documents are added to a shard until it has reached `shard_bytes`; a document is never cut. A shard's fingerprint is the hash of the names
and contents of its documents, so a changed file gives a new fingerprint to the shard that holds it. The one exception is a Hugging Face
dataset, whose documents are not read to plan: its fingerprint is its address (`hub.py`).

The standard library's documents are taken in the order of a keyed hash of their names: every shard, the held-out ones too, is a fair
sample. Files keep the order of their paths, because files land later.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from sysconfig import get_path
from typing import Any, NamedTuple

from interp_assets.compute.seeds import stream
from interp_assets.corpus.files import TextIn, iter_part
from interp_assets.corpus.stdlib import iter_stdlib_documents
from interp_assets.corpus.survey import iter_measured, measure
from interp_assets.errors import ConfigError, InputError
from interp_assets.planning.pipeline import ShardSource
from interp_assets.planning.progress import choose_word, format_count
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.seen import SeenFiles


class Survey(NamedTuple):
    """The shards of a corpus, and the names of files that were skipped because they hold no text."""

    shards: list[ShardSource]
    empty_files: list[str]


class _Document(NamedTuple):
    """One document while planning: name, bytes and digest of its text, and where it lies."""

    source: str
    n_bytes: int
    digest: bytes
    place: dict[str, Any]


class ContentHash:
    """Hash names and texts of a shard's documents, in order, into its fingerprint."""

    def __init__(self) -> None:
        """Begin a shard."""
        self._hash = hashlib.blake2b(digest_size=16)
        self.n_documents = 0
        self.n_bytes = 0

    def add(self, source: str, n_bytes: int, digest: bytes) -> None:
        """Add one document by the bytes and the digest of its text."""
        self._hash.update(f"{source}\0{n_bytes}\0{digest.hex()}\n".encode())
        self.n_documents += 1
        self.n_bytes += n_bytes

    @property
    def fingerprint(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


def survey_sources(config: CorpusConfig, seed: int, closed: Sequence[int], seen: SeenFiles) -> Survey:
    """Divide the corpus into shards. Reads of local text what `seen` does not know, and of a dataset on the hub only its description.

    `closed` holds the number of documents of the first shards, which are cut as they were, even if the last of them has room for more.
    Raises `InputError` for text that cannot be used, all problems at once, or for none, and `ConfigError` when no shard is left to train on.
    """
    empty: list[str] = []
    if config.source == "huggingface":
        from interp_assets.corpus.hub import plan_hub  # noqa: PLC0415 - the library takes a second to import, and most corpora do without

        shards = plan_hub(config)
    elif config.source == "files":
        shards = list(_cut(_file_documents(config, seen, empty), config, closed))
    else:
        shards = list(_cut(_stdlib_documents(seed), config, closed))
    if not shards:
        raise InputError(f"The corpus ({config.source} {config.path!r}) has no documents.{_advise(empty)}")
    if len(shards) <= config.held_out_shards:
        raise ConfigError(
            f"corpus.held_out_shards is {config.held_out_shards}, but there {choose_word(len(shards), 'is', 'are')} only "
            f"{format_count(len(shards), 'shard')}, so none is left to train on. "
            "Lower corpus.shard_bytes (or documents_per_shard), or add text."
        )
    return Survey(shards, empty)


def iter_documents(config: CorpusConfig, source: ShardSource) -> Iterator[tuple[str, str]]:
    """Yield `(name, text)` of every document of a shard, in order.

    Raises `InputError` at the end when the content is no longer what was planned.
    """
    if config.source == "huggingface":
        from interp_assets.corpus.hub import iter_hub_documents  # noqa: PLC0415 - as above

        yield from iter_hub_documents(config, source)
        return
    content = ContentHash()
    for name, text in _iter_local(config, source):
        content.add(name, *measure(text))
        yield name, text
    if content.fingerprint != source.fingerprint:
        raise InputError(
            f"The text of {source.key} has changed since it was planned (fingerprint {content.fingerprint}, planned {source.fingerprint}). "
            "Plan again: materialize `corpus_plan`, or `interp run`. If that does not help, the times of the files do not tell that they have "
            "changed: `interp run --read-again`."
        )


def _iter_local(config: CorpusConfig, source: ShardSource) -> Iterator[tuple[str, str]]:
    if config.source == "files":
        for part in source.spec["parts"]:
            yield from iter_part(config.path, part, TextIn(config.text_kind, config.text_field))
        return
    folder = Path(get_path("stdlib"))
    for name in source.spec["files"]:
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{folder / name} cannot be read any more ({error}). Plan again: materialize `corpus_plan`.") from error
        yield name, text


def _stdlib_documents(seed: int) -> Iterator[_Document]:
    key = stream(seed, "corpus", "order").words(4).tobytes()
    documents = sorted(
        iter_stdlib_documents(with_tests=False), key=lambda document: hashlib.blake2b(document[0].encode(), key=key, digest_size=16).digest()
    )
    for name, text in documents:
        yield _Document(name, *measure(text), {"file": name})


def _file_documents(config: CorpusConfig, seen: SeenFiles, empty: list[str]) -> Iterator[_Document]:
    if not Path(config.path).expanduser().exists():
        raise InputError(
            f"There is nothing at corpus.path = {config.path!r}{config.looked_in}. Give a file or a folder of text, JSONL or Parquet files."
        )
    for found in iter_measured(config.path, TextIn(config.text_kind, config.text_field), seen, empty):
        yield _Document(found.source, found.n_bytes, found.digest, found.place._asdict())


def _advise(empty: list[str]) -> str:
    """Say why there are none, when all files are empty."""
    if not empty:
        return ""
    noun = "file there is" if len(empty) == 1 else "files there are"
    return f" The {len(empty):,} {noun} without text; put text there, or point `corpus.path` elsewhere."


def _cut(documents: Iterator[_Document], config: CorpusConfig, closed: Sequence[int]) -> Iterator[ShardSource]:
    """Fill shards with whole documents, as many as a closed shard had or up to `shard_bytes`. Reads all, so that every problem is found."""
    content, places = ContentHash(), list[dict[str, Any]]()
    n_shards = 0
    for document in documents:
        if n_shards == config.max_shards:
            continue
        content.add(document.source, document.n_bytes, document.digest)
        places.append(document.place)
        is_full = content.n_documents == closed[n_shards] if n_shards < len(closed) else content.n_bytes >= config.shard_bytes
        if is_full:
            yield _make_shard(n_shards, content, places, config)
            n_shards += 1
            content, places = ContentHash(), []
    if places:
        yield _make_shard(n_shards, content, places, config)


def _make_shard(index: int, content: ContentHash, places: list[dict[str, Any]], config: CorpusConfig) -> ShardSource:
    spec: dict[str, Any] = {"parts": _join_places(places)} if config.source == "files" else {"files": [place["file"] for place in places]}
    return ShardSource(index=index, fingerprint=content.fingerprint, n_documents=content.n_documents, n_bytes=content.n_bytes, spec=spec)


def _join_places(places: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join documents of one file into parts `{file, first, offset, stop}`: rows [first, stop), `first` beginning at byte `offset`."""
    parts: list[dict[str, Any]] = []
    for place in places:
        if parts and parts[-1]["file"] == place["file"]:
            parts[-1]["stop"] = place["row"] + 1
        else:
            parts.append({"file": place["file"], "first": place["row"], "offset": place["offset"], "stop": place["row"] + 1})
    return parts
