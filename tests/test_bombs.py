"""Small files that become large ones: each reader of what comes from elsewhere refuses them before it unpacks, parses or allocates."""

import gzip
import io
import json
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from synthetic_bundle import build_synthetic_bundle

from interp_assets.corpus.files import TextIn, iter_file
from interp_assets.errors import ArtifactCorruptError, ConfigError, InputError
from interp_assets.planning.config import load_config
from interp_assets.storage.foreign import MAX_YAML_NODES, parse_json, parse_yaml, read_line, unpack_gzip, unpack_zstd
from interp_assets.storage.manifest import decode_manifest
from interp_assets.storage.store import Store, open_store
from interp_assets.storage.tensors import parse_header
from interp_assets.train.exchange.folders import read_foreign
from interp_assets.visualize.packing import MAX_RECORD_BYTES, unpack_record
from interp_assets.web.columns import decode_words
from interp_assets.web.labels import import_labels
from interp_assets.web.notes import Notebook
from interp_assets.web.opened import OpenBundle, list_bundles
from interp_assets.web.vocabulary import decode_vocabulary

DEEP = b"[" * 200_000
ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
MB = 1 << 20


@contextmanager
def cheaply(n_bytes: int = 150 * MB, seconds: float = 20) -> Iterator[None]:
    """Fail when more memory or time than that is taken."""
    started = time.monotonic()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < n_bytes
        assert time.monotonic() - started < seconds
    finally:
        tracemalloc.stop()


def gzip_of_zeros(n_bytes: int) -> bytes:
    """Return a gzip member that unpacks to so many zeros, without making them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([packer.compress(bytes(MB)) for _ in range(n_bytes // MB)]) + packer.flush()


BOMB = gzip_of_zeros(300 * MB)
ZSTD_BOMB = bytes(pa.compress(bytes(10 * MB), codec="zstd", asbytes=True)) * 30


def test_gzip_stops_at_the_limit_over_all_members() -> None:
    """Many members, each below it, would add up."""
    with cheaply(), pytest.raises(ValueError, match="more than the 1,048,576 bytes"):
        unpack_gzip(BOMB, MB)
    with cheaply(), pytest.raises(ValueError, match="more than"):
        unpack_gzip(gzip.compress(bytes(MB)) * 100, 64 * MB)
    with cheaply(), pytest.raises(ValueError, match="more than the 1,048,576 bytes"):
        unpack_zstd(ZSTD_BOMB, MB)
    text = gzip.compress(b"one ") + gzip.compress(b"two") + b"\0\0"
    assert unpack_gzip(text, 7) == b"one two"
    for damaged in (text[:-10], b"not gzip", gzip.compress(b"x" * 999)[:-9]):
        with pytest.raises(ValueError, match="gzip"):
            unpack_gzip(damaged, MB)


def test_a_record_that_unpacks_without_end_is_refused() -> None:
    """A member of 2.9 MB became 5.8 GB, in `interp export` and in every reader of records."""
    with cheaply(), pytest.raises(ArtifactCorruptError, match=f"more than the {MAX_RECORD_BYTES:,} bytes"):
        unpack_record(BOMB, [0], "records.bin, feature 3")
    with cheaply(), pytest.raises(ArtifactCorruptError, match="nested too deeply"):
        unpack_record(gzip.compress(DEEP), [0], "records.bin, feature 3")


def test_a_record_whose_lists_repeat_a_window_without_end_is_refused() -> None:
    """One character in a list shows a whole window: lists and windows multiply."""
    golden = json.loads((Path(__file__).parent / "golden" / "packed_record.json").read_text(encoding="utf-8"))
    packed = golden["packed"]
    packed["lists"]["top"] = packed["lists"]["top"][:1] * 3_000_000
    with cheaply(400 * MB), pytest.raises(ArtifactCorruptError, match="its lists show"):
        unpack_record(gzip.compress(json.dumps(packed).encode(), 1), golden["order"], "records.bin, feature 3")


@pytest.mark.parametrize("text", [ALIASES, "a: &a [*a]", "[" * 100_000, f"name: 1{':1' * 500_000}", "x: y\n" * 2_000_000])
def test_a_configuration_that_grows_is_refused(text: str, tmp_path: Path) -> None:
    """Nine aliases of nine aliases, thirty times: the configuration is checked value by value, and never ends."""
    (tmp_path / "p.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"p\.yaml is (no configuration|not YAML)"):
        load_config(tmp_path / "p.yaml")
    assert time.monotonic() - started < 20


def test_aliases_that_mean_a_few_values_are_read() -> None:
    """Anchors are how people write a configuration of ten SAEs."""
    text = "base: &base {a: 1, b: [2, 3]}\nfirst: {<<: *base, b: 4}\nsecond: *base\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("") is None
    assert len(parse_yaml("[" + "1," * (MAX_YAML_NODES - 10) + "]")) == MAX_YAML_NODES - 10


@pytest.mark.parametrize(
    "read",
    [
        lambda data: decode_manifest(data, "manifest.json"),
        lambda data: decode_words(data, "words.json"),
        lambda data: decode_vocabulary(data, "vocabulary.json"),
        lambda data: parse_header(len(data).to_bytes(8, "little") + data, "a.safetensors"),
    ],
)
def test_json_without_a_bottom_is_refused(read: Callable[[bytes], object]) -> None:
    """Python gives up after a thousand levels, with an error that is none of ours."""
    with pytest.raises(ArtifactCorruptError):
        read(DEEP)
    with pytest.raises(ValueError, match="bytes of JSON"):
        parse_json(b" " * 100, 99)


def test_notes_without_a_bottom_are_refused(tmp_path: Path) -> None:
    """The file is for people, and for editors."""
    (tmp_path / "b.json").write_bytes(DEEP)
    with pytest.raises(ArtifactCorruptError, match="nested too deeply"):
        Notebook(tmp_path, "b").read()


def test_a_line_without_an_end_is_a_problem_of_its_file(tmp_path: Path) -> None:
    """A corpus of a third of a MB whose one line has a third of a gigabyte; and lines that are cut, damaged or too deep."""
    (tmp_path / "a.jsonl.gz").write_bytes(BOMB)
    with cheaply(700 * MB), pytest.raises(ValueError, match="a line has more than"):
        list(iter_file(tmp_path, "a.jsonl.gz", TextIn("plain", "text"), []))
    (tmp_path / "a.txt.zst").write_bytes(ZSTD_BOMB)
    with cheaply(900 * MB), pytest.raises(ValueError, match="one document has more than"):
        list(iter_file(tmp_path, "a.txt.zst", TextIn("plain", "text"), []))
    (tmp_path / "b.jsonl").write_bytes(DEEP + b'\n{"text": "good"}\n')
    problems: list[str] = []
    assert [found.text for found in iter_file(tmp_path, "b.jsonl", TextIn("plain", "text"), problems)] == ["good"]
    assert "nested too deeply" in problems[0]
    with pytest.raises(ValueError, match="more than the 3 bytes"):
        read_line(io.BytesIO(b"abcd\n"), 3)


SHAPES = [([1 << 40], [0, 4]), ([-1, -1], [0, 4]), ([2], [-100, -92]), ([3], [0, 8]), ([1], [8, 4])]


@pytest.mark.parametrize(("shape", "offsets"), SHAPES)
def test_a_tensor_has_the_bytes_that_its_shape_needs(shape: list[int], offsets: list[int]) -> None:
    """A header is a few numbers, and memory is allocated by them."""
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    with pytest.raises(ArtifactCorruptError, match="does not start with a safetensors header"):
        parse_header(len(header).to_bytes(8, "little") + header, "a.safetensors")


def test_weights_that_unpack_without_end_are_refused(tmp_path: Path) -> None:
    """A zip of zeros, an array's header that claims more than there is, a tensor that repeats one number."""
    for name in ("zeros", "claimed", "repeated"):
        (tmp_path / name).mkdir()
    with zipfile.ZipFile(tmp_path / "zeros" / "params.npz", "w", zipfile.ZIP_DEFLATED) as file:
        content = io.BytesIO()
        np.save(content, np.zeros((64 * MB,), np.uint8))
        file.writestr("W_enc.npy", content.getvalue())
    with zipfile.ZipFile(tmp_path / "claimed" / "params.npz", "w") as file:
        content = io.BytesIO()
        np.lib.format.write_array_header_1_0(content, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50,)})
        file.writestr("W_enc.npy", content.getvalue() + bytes(64))
    (tmp_path / "repeated" / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    torch.save({"bias": torch.zeros(1).expand(1 << 40)}, tmp_path / "repeated" / "ae.pt")
    for name in ("zeros", "claimed", "repeated"):
        with cheaply(), pytest.raises(InputError):
            read_foreign(open_store(str(tmp_path / name)))


def test_labels_that_unpack_without_end_are_refused(memory_store: Store, tmp_path: Path) -> None:
    """One endless line, and a long text that a Parquet file stores once for a million rows."""
    build_synthetic_bundle(memory_store, n_features=20, n_documents=8)
    bundle = OpenBundle(list_bundles(memory_store)[0])
    (tmp_path / "b.jsonl").write_bytes(b'{"label": "' + b"x" * MB + b'"}')
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), pa.array(["x" * MB]))
    pq.write_table(pa.table({"latent": pa.array(np.zeros(100_000, np.int64)), "label": texts}), tmp_path / "c.parquet", write_statistics=False)
    for name in ("b.jsonl", "c.parquet"):
        with cheaply(200 * MB), pytest.raises(InputError, match=f"{name} cannot be read"):
            import_labels(bundle, tmp_path / name, source="x")
