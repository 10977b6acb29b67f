"""Padded safetensors files: readable by everybody, row ranges by us."""

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_assets.errors import ArtifactCorruptError
from interp_assets.storage.manifest import Manifest, create_artifact, load_manifest, make_ref
from interp_assets.storage.store import Store, open_store
from interp_assets.storage.tensors import TensorSpec, as_bytes, load_tensors, parse_header, read_rows, read_spans, save_stream, save_tensors
from interp_assets.storage.traffic import METER

REF = make_ref("example", "x", identity={}, inputs={}, label="a")
DTYPES = ["float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool"]


def _save(store: Store, tensors: dict[str, torch.Tensor | np.ndarray]) -> Manifest:
    with create_artifact(store, REF) as art:
        save_tensors(art, "t.safetensors", tensors)
    return load_manifest(store, REF)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.integers(1, 9), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_any_tensor_makes_the_round_trip(n_rows: int, width: int, dtype: str, seed: int) -> None:
    """Every dtype, also no rows at all, also through the public safetensors reader."""
    store = open_store("memory://x")
    x = torch.randint(0, 2, (n_rows, width), generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    manifest = _save(store, {"x": x, "ids": np.arange(n_rows, dtype=np.uint64)})
    ours = load_tensors(store, REF.path, manifest, "t.safetensors")
    theirs = safetensors.torch.load(store.get(f"{REF.path}/t.safetensors"))
    for found in (ours, theirs):
        assert found["x"].dtype == x.dtype
        assert torch.equal(found["x"], x)
        assert found["ids"].tolist() == list(range(n_rows))


def test_tensors_that_share_a_block_are_read_once(memory_store: Store) -> None:
    """Eleven statistics of a layer read its whole file eleven times: 38 MB of 4."""
    manifest = _save(memory_store, {f"t{i}": torch.full((1000,), float(i)) for i in range(11)})
    n_bytes, before = manifest.file("t.safetensors").n_bytes, METER.total()
    found = load_tensors(memory_store, REF.path, manifest, "t.safetensors")
    assert METER.total().since(before).read_bytes <= 3 * n_bytes  # the header's block twice at most, and all
    assert [float(found[f"t{i}"][-1]) for i in range(11)] == [float(i) for i in range(11)]


def test_rows_are_one_aligned_range(memory_store: Store) -> None:
    """A reader fetches rows [a, b) alone, and O_DIRECT wants 4 KiB."""
    x = torch.arange(700).reshape(100, 7).to(torch.bfloat16)
    manifest = _save(memory_store, {"rows": x})
    span = read_spans(memory_store, REF.path, manifest, "t.safetensors")["rows"]
    assert span.start % 4096 == 0
    assert torch.equal(read_rows(memory_store, REF.path, manifest, "t.safetensors", span, 13, 29), x[13:29])


def test_a_stream_cut_anywhere_is_the_same_file(memory_store: Store) -> None:
    """Stages stream blocks whose borders mean nothing."""
    x = torch.arange(60, dtype=torch.float32).reshape(20, 3)
    whole = _save(memory_store, {"rows": x})
    data = bytes(as_bytes(x))
    with create_artifact(memory_store, REF) as art:
        save_stream(art, "t.safetensors", {"rows": TensorSpec("float32", (20, 3))}, [data[:7], data[7:8], data[8:]])
    assert load_manifest(memory_store, REF).files[0].checksums == whole.files[0].checksums


def test_a_short_stream_is_never_published(memory_store: Store) -> None:
    """The header promises rows; a file without them must not exist."""
    with pytest.raises(AssertionError, match="8 bytes streamed, the tensors need 240"), create_artifact(memory_store, REF) as art:
        save_stream(art, "t.safetensors", {"rows": TensorSpec("float32", (20, 3))}, [bytes(8)])
    assert list(memory_store.list()) == []


def test_a_foreign_file_is_no_safetensors() -> None:
    """A damaged header must name the file."""
    with pytest.raises(ArtifactCorruptError, match=r"rows\.safetensors does not start with a safetensors header"):
        parse_header(b"\x10\0\0\0\0\0\0\0not json at all!", "rows.safetensors")
