"""Tensors in safetensors files whose data start at a multiple of 4 KiB, written as a stream and read by row ranges.

The file is plain safetensors (any reader opens it): 8 bytes of header length, JSON, spaces up to the next 4 KiB, data. Tensors lie in
the order in which they are declared, so a writer streams them one after the other, and rows [a, b) of a tensor are one byte range.

NumPy and Arrow have no bfloat16: rows travel as bytes and become `torch.bfloat16` in `as_tensor`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.errors import ArtifactCorruptError
from interp_assets.storage.dtypes import ITEM_BYTES
from interp_assets.storage.foreign import parse_json
from interp_assets.storage.manifest import ArtifactWriter, Manifest, read_range
from interp_assets.storage.store import Store

ALIGNMENT: Final = 4096
_AT_ONCE_BYTES: Final = 16 << 20
"""A file of less is read whole; of a larger one no tensor is in memory twice."""
_MAX_HEADER_BYTES: Final = 1 << 20
_SHORT: Final = {"bfloat": "BF", "float": "F", "uint": "U", "int": "I", "bool": "BOOL"}
_CODES: Final = {name: _SHORT[name.rstrip("0123456789")] + name.lstrip("abcdefghijklmnopqrstuvwxyz") for name in ITEM_BYTES}
"""By dtype, its name in the file: `BF16`, `I64`."""
_NAMES: Final = {code: name for name, code in _CODES.items()}


class TensorSpec(NamedTuple):
    """What a tensor will be, before it is written: dtype by name (`bfloat16`), and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class TensorSpan(NamedTuple):
    """Where a tensor lies in its file: dtype by name, shape, first byte and size."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]


def make_header(specs: Mapping[str, TensorSpec]) -> bytes:
    """Return the bytes before the data: length, JSON and padding. The tensors' data must follow in the order of `specs`."""
    entries: dict[str, dict[str, object]] = {}
    offset = 0
    for name, spec in specs.items():
        entries[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, offset + spec.n_bytes]}
        offset += spec.n_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = text + b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(padded).to_bytes(8, "little") + padded


def parse_header(data: bytes, where: str) -> dict[str, TensorSpan]:
    """Read the header at the start of a safetensors file; `where` names it in messages. Raises `ArtifactCorruptError`."""
    n_header = int.from_bytes(data[:8], "little")
    try:
        entries = parse_json(data[8 : 8 + n_header], _MAX_HEADER_BYTES)
        spans = {
            name: TensorSpan(
                _NAMES[entry["dtype"]],
                tuple(entry["shape"]),
                8 + n_header + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        }
        _check_spans(spans, 8 + n_header)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactCorruptError(f"{where} does not start with a safetensors header ({error}). Re-materialize its partition.") from error
    return spans


def _check_spans(spans: Mapping[str, TensorSpan], first: int) -> None:
    """Raise `ValueError` unless each tensor has the bytes that its shape needs, behind the header."""
    for name, span in spans.items():
        if min((*span.shape, 0)) < 0 or span.start < first or span.n_bytes != math.prod(span.shape) * ITEM_BYTES[span.dtype]:
            raise ValueError(f"{name}: {span.n_bytes} bytes from {span.start} for {list(span.shape)} of {span.dtype}")


def save_tensors(art: ArtifactWriter, name: str, tensors: Mapping[str, Tensor | NDArray[np.generic]], *, n_rows: int | None = None) -> None:
    """Write tensors that are in memory as one file of an artifact."""
    specs = {key: TensorSpec(_dtype_name(value), tuple(value.shape)) for key, value in tensors.items()}
    save_stream(art, name, specs, (as_bytes(value) for value in tensors.values()), n_rows=n_rows)


def save_stream(
    art: ArtifactWriter, name: str, specs: Mapping[str, TensorSpec], parts: Iterable[bytes | memoryview], *, n_rows: int | None = None
) -> None:
    """Write one file from a stream of bytes: the tensors of `specs` one after the other, cut anywhere.

    Raises `AssertionError` when the stream is longer or shorter than the specs say; nothing is published then.
    """
    first = next(iter(specs.values()))
    expected = sum(spec.n_bytes for spec in specs.values())
    n_written = 0
    with art.open(name, n_rows=n_rows, dtype=first.dtype, shape=first.shape) as sink:
        sink.write(make_header(specs))
        for part in parts:
            n_written += len(part) if isinstance(part, bytes) else part.nbytes
            sink.write(part)
        assert n_written == expected, f"{name}: {n_written} bytes streamed, the tensors need {expected}"


def read_spans(store: Store, path: str, manifest: Manifest, name: str) -> dict[str, TensorSpan]:
    """Read where the tensors of a file lie. Verified; costs one block."""
    entry = manifest.file(name)
    head = read_range(store, path, manifest, name, 0, min(entry.n_bytes, ALIGNMENT))
    n_header = 8 + int.from_bytes(head[:8], "little")
    if n_header > min(entry.n_bytes, _MAX_HEADER_BYTES):
        raise ArtifactCorruptError(f"{store.url}/{path}/{name} claims a header of {n_header:,} bytes. Re-materialize its partition.")
    if n_header > len(head):
        head = read_range(store, path, manifest, name, 0, n_header)
    return parse_header(head, f"{store.url}/{path}/{name}")


def read_row_bytes(store: Store, path: str, manifest: Manifest, name: str, span: TensorSpan, start: int, stop: int) -> bytes:
    """Read and verify rows [start, stop) of a tensor as raw bytes."""
    return read_range(store, path, manifest, name, span.start + start * span.row_bytes, (stop - start) * span.row_bytes)


def read_rows(store: Store, path: str, manifest: Manifest, name: str, span: TensorSpan, start: int, stop: int) -> Tensor:
    """Read and verify rows [start, stop) of a tensor: `[stop - start, ...]` in its stored dtype."""
    return as_tensor(read_row_bytes(store, path, manifest, name, span, start, stop), span.dtype, (stop - start, *span.shape[1:]))


def load_tensors(store: Store, path: str, manifest: Manifest, name: str) -> dict[str, Tensor]:
    """Read and verify all tensors of a file: at once where that is little, because tensors that share a block would each read all of it."""
    spans = read_spans(store, path, manifest, name)
    first, stop = min((span.start for span in spans.values()), default=0), max((span.start + span.n_bytes for span in spans.values()), default=0)
    whole = memoryview(read_range(store, path, manifest, name, first, stop - first)) if stop - first <= _AT_ONCE_BYTES else None

    def read(span: TensorSpan) -> bytes | memoryview:
        if whole is None:
            return read_range(store, path, manifest, name, span.start, span.n_bytes)
        return whole[span.start - first : span.start - first + span.n_bytes]

    return {key: as_tensor(read(span), span.dtype, span.shape) for key, span in spans.items()}


def as_tensor(data: bytes | bytearray | memoryview, dtype: str, shape: Sequence[int]) -> Tensor:
    """View bytes as a tensor of `dtype` and `shape` (copies read-only bytes once, so that the tensor may be written)."""
    buffer = data if isinstance(data, bytearray) else bytearray(data)
    if not buffer:
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype))
    return torch.frombuffer(buffer, dtype=getattr(torch, dtype)).reshape(tuple(shape))


def as_bytes(value: Tensor | NDArray[np.generic]) -> memoryview:
    """View a tensor or array as bytes without a copy when it is contiguous."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.numel() == 0:
            return memoryview(b"")
        return flat.view(torch.uint8).numpy().data.cast("B")
    array = np.ascontiguousarray(value)
    return memoryview(b"") if array.size == 0 else array.reshape(-1).view(np.uint8).data.cast("B")


def _dtype_name(value: Tensor | NDArray[np.generic]) -> str:
    name = str(value.dtype).removeprefix("torch.")
    assert name in _CODES, f"safetensors files here hold {sorted(_CODES)}, not {name}"
    return name
