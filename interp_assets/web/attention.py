"""Records of attention heads and patterns over prompts become one bundle: the folder that a browser opens by range requests.

    attention.json             what the bundle is about, and one column a statistic with chance beside: all that a map of the heads needs
    records.bin, records.idx   one gzip member of JSON a head, in order of layer and head, and u64 offsets into it
    prompts/<name>/...         the files of each configured prompt, as they were made; with targets, theirs too, and their columns among the prompt's
    vocabulary.json            the text of every token id

All else is copied byte for byte. Nothing in the bundle tells when it was made: same records, same bytes. The format is
docs/formats/attention_bundle.md.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np

from interp_assets.errors import ArtifactCorruptError
from interp_assets.harvest.heads.refs import HEAD_RECORD_VERSION, head_counts, head_shards, heads_of, model_heads, prompt_ref, records_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.foreign import parse_json
from interp_assets.storage.manifest import ArtifactRef, ArtifactWriter, Produced, create_artifact, find_made_from, load_manifest, read_file, timed
from interp_assets.storage.store import Store
from interp_assets.visualize.refs import prompt_targets_ref
from interp_assets.web.bundle import RECORD_BLOCK_BYTES, decode_offsets
from interp_assets.web.refs import attention_ref
from interp_assets.web.vocabulary import Vocabulary, encode_vocabulary, make_vocabulary

FORMAT: Final = "interp-assets/attention-bundle"
VERSION: Final = 1
KIND: Final = "attention_bundle"
DESCRIPTION: Final = "attention.json"
RECORDS: Final = "records.bin"
INDEX: Final = "records.idx"
_LIMITS: Final = ("n_key_heads", "window", "softcap", "has_sinks")
_DIGITS: Final = 5


class AttentionContent(NamedTuple):
    """Everything that goes into a bundle of heads."""

    description: dict[str, Any]
    """With `heads`, columns of equal length in order of layer and head."""
    records: Iterable[bytes]
    prompts: Iterable[tuple[str, Mapping[str, bytes]]]
    """Names, and the files of each."""
    vocabulary: Vocabulary


@timed
def build_attention_bundle(pipeline: Pipeline, store: Store, tokenizer: Any, *, progress: Callable[[int], None] | None = None) -> Produced:
    """Build the bundle of a pipeline's heads; `progress` is advanced by heads.

    Raises `ArtifactMissingError` where a layer has no records yet or a prompt no patterns, and `ArtifactCorruptError` where index and records
    disagree.
    """
    from interp_assets.harvest.heads.examples import load_head_examples  # noqa: PLC0415 - torch; the server imports this module for its formats
    from interp_assets.harvest.heads.records import read_tables  # noqa: PLC0415 - as above

    ref, layers, prompts = attention_ref(pipeline), list(head_counts(pipeline)), list(heads_of(pipeline).prompts)
    inputs = [load_manifest(store, source) for source in _sources(pipeline)]
    if existing := find_made_from(store, ref, inputs):
        return Produced(ref, existing, is_cached=True)
    facts = {layer: manifest.facts for layer, manifest in zip(layers, inputs, strict=False)}
    table = read_tables(pipeline, store)
    columns = {name: [_shorten(value) for value in table[name].to_list()] for name in table.columns}
    columns["induction_rows"] = [n for layer in layers for n in load_head_examples(pipeline, store, layer)[1].sum_of("induction_rows").tolist()]
    kept = [(name, _read_prompt(pipeline, store, name)) for name in prompts]
    description = {
        **_describe(pipeline),
        "layers": [{"layer": layer, "n_heads": facts[layer]["n_heads"], **{key: facts[layer][key] for key in _LIMITS}} for layer in layers],
        **_describe_others(pipeline),
        "heads": columns,
        "prompts": [_describe_prompt(name, files) for name, files in kept],
    }
    content = AttentionContent(description, _read_records(pipeline, store, layers), kept, make_vocabulary(tokenizer))
    with create_artifact(store, ref, made_from=inputs) as art:
        write_attention_bundle(art, content, progress=progress)
    return art.produced


def write_attention_bundle(art: ArtifactWriter, content: AttentionContent, *, progress: Callable[[int], None] | None = None) -> None:
    """Write the files of a bundle. Records must come in the order of the columns, one for each head. Raises `ArtifactCorruptError` where not."""
    n_heads, offsets = len(content.description["heads"]["head"]), [0]
    with art.open(RECORDS, n_rows=n_heads, block_bytes=RECORD_BLOCK_BYTES) as sink:
        for member in content.records:
            sink.write(member)
            offsets.append(offsets[-1] + len(member))
            if progress:
                progress(1)
    if len(offsets) != n_heads + 1:
        raise ArtifactCorruptError(f"There are {n_heads:,} heads and {len(offsets) - 1:,} records. Materialize `head_records` again.")
    art.put(INDEX, np.asarray(offsets, "<u8").tobytes(), n_rows=n_heads)
    for name, files in content.prompts:
        for file, data in files.items():
            art.put(f"prompts/{name}/{file}", data)
    art.put("vocabulary.json", encode_vocabulary(content.vocabulary))
    described = {"format": FORMAT, "version": VERSION, **content.description}
    art.put(DESCRIPTION, (json.dumps(described, indent=1, allow_nan=False) + "\n").encode())
    art.facts |= {"n_heads": n_heads, "n_prompts": len(described["prompts"]), "record_bytes": offsets[-1], "model": described["model"]["name"]}


def _sources(pipeline: Pipeline) -> list[Any]:
    records = [records_ref(pipeline, layer) for layer in head_counts(pipeline)]
    prompts = [prompt_ref(pipeline, name) for name in heads_of(pipeline).prompts]
    return [*records, *prompts, *(prompt_targets_ref(pipeline, name) for name in heads_of(pipeline).explained)]


def _describe(pipeline: Pipeline) -> dict[str, Any]:
    config = pipeline.config
    return {
        "is_synthetic": False,
        "pipeline": config.name,
        "model": {"name": config.model.shown_name, "revision": config.model.revision, "fingerprint": pipeline.plan.model_fingerprint},
        "corpus": {"source": config.corpus.source, "n_shards": len(head_shards(pipeline)), "context_length": config.corpus.context_length},
        "evidence": heads_of(pipeline).model_dump(exclude={"layers", "prompts", "max_shards"}),
        "records": {"version": HEAD_RECORD_VERSION},
    }


def _describe_others(pipeline: Pipeline) -> dict[str, Any]:
    """Name the layers that do not attend; nothing of a model whose layers all do."""
    others = model_heads(pipeline).other_layers
    return {"other_layers": [{"layer": layer, "kind": kind} for layer, kind in others.items()]} if others else {}


def _describe_prompt(name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    described = parse_json(files["prompt.json"])
    return {"name": name, "n_tokens": len(described["tokens"]), **{key: described[key] for key in ("both_ways", "form", "columns", "thumb")}}


def _read_prompt(pipeline: Pipeline, store: Store, name: str) -> dict[str, bytes]:
    from interp_assets.harvest.heads.prompts import FILES, join_targets  # noqa: PLC0415 - transformers
    from interp_assets.visualize.prompt_targets import FILES as TARGET_FILES  # noqa: PLC0415 - as above

    def read(ref: ArtifactRef, files: Sequence[str]) -> dict[str, bytes]:
        manifest = load_manifest(store, ref)
        return {file: read_file(store, ref.path, manifest, file) for file in files}

    own = read(prompt_ref(pipeline, name), FILES)
    return join_targets(own, read(prompt_targets_ref(pipeline, name), TARGET_FILES)) if name in heads_of(pipeline).explained else own


def _read_records(pipeline: Pipeline, store: Store, layers: Sequence[int]) -> Iterator[bytes]:
    for layer in layers:
        ref = records_ref(pipeline, layer)
        manifest = load_manifest(store, ref)
        where = f"{store.url}/{ref.path}/{INDEX}"
        offsets = decode_offsets(read_file(store, ref.path, manifest, INDEX), manifest.facts["n_heads"], where).tolist()
        data = read_file(store, ref.path, manifest, RECORDS)
        for start, stop in pairwise(offsets):
            yield data[start:stop]


def _shorten(value: float | int | None) -> float | int | None:  # noqa: PYI041 - types are checked at run time, too
    return value if value is None or isinstance(value, int) else float(f"{value:.{_DIGITS}g}")
