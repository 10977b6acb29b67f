r"""Bytes from elsewhere become values, within bounds that are checked before anything is unpacked, parsed or allocated.

A few kilobytes can say that they are gigabytes: gzip by a thousand, JSON by twenty, YAML by any factor through aliases, an array's header by a
number. Whoever reads what somebody else may have written reads it here:

    unpack_gzip     at most so many bytes come out, over all members
    unpack_zstd     likewise, over all frames
    read_line       no line of a (compressed) file is longer
    parse_json      no deeper than Python can follow, no longer than `MAX_JSON_BYTES`; its strings are text
    parse_yaml      no more nodes than `MAX_YAML_NODES` after aliases are followed; plain data only
    check_zip       members do not grow by more than weights can
    check_npz       and its arrays are as large as their headers say
    check_parquet   rows and bytes as the footer states them

All raise `ValueError`, which says what was found and what is allowed: callers know the file and the next step. `DAMAGE` lists what libraries
raise for files that are cut off, damaged or something else.

Half of a surrogate pair (`"\ud83d"` alone) is valid in JSON, YAML and file names, and no character: no UTF-8 holds it, and whoever writes it
later fails. It becomes U+FFFD here, as in every decoder (Unicode 16, section 3.9).
"""

import io
import json
import lzma
import math
import re
import struct
import tarfile
import zipfile
import zlib
from typing import Any, Final, Protocol, runtime_checkable

import yaml

MAX_JSON_BYTES: Final = 512 << 20
MAX_LINE_BYTES: Final = 256 << 20
MAX_YAML_BYTES: Final = 1 << 20
MAX_YAML_NODES: Final = 50_000
MAX_YAML_NUMBER: Final = 100
"""Characters of a number: `1:1:1:...` is one in base 60."""
_GROWTH: Final = 20
"""Weights hardly shrink when they are packed; sparse ones by less than this."""
_SLACK: Final = 1 << 20
_GZIP: Final = zlib.MAX_WBITS | 16
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE: Final = re.compile(rb"\\[uU](?:0000)?[dD][89a-fA-F]|\xed[\xa0-\xbf]")
DAMAGE: Final = (
    *(OSError, EOFError, ValueError, OverflowError, MemoryError),
    *(zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, struct.error),
)
"""What libraries raise for bytes that are not what they should be; Arrow's own errors besides."""


@runtime_checkable
class Lines(Protocol):
    """An opened file of lines."""

    def readline(self, size: int = -1, /) -> bytes:
        """Read up to the next line's end, and at most `size` bytes."""
        ...


def unpack_gzip(data: bytes, most: int) -> bytes:
    """Decompress gzip members one after the other, to at most `most` bytes. Raises `ValueError`."""
    pieces, n_bytes, rest = [], 0, data
    while rest:
        member = zlib.decompressobj(_GZIP)
        try:
            piece = member.decompress(rest, most - n_bytes + 1)
        except zlib.error as error:
            raise ValueError(f"no gzip: {error}") from error
        n_bytes += len(piece)
        if n_bytes > most:
            raise ValueError(f"{len(data):,} bytes of gzip unpack to more than the {most:,} bytes that are allowed")
        if not member.eof:
            raise ValueError("the gzip stream ends too early")
        pieces.append(piece)
        rest = member.unused_data.lstrip(b"\0")  # as `gzip` does: padding after the last member
    return b"".join(pieces)


def unpack_zstd(data: bytes, most: int) -> bytes:
    """Decompress zstd frames one after the other, to at most `most` bytes. Raises `ValueError`."""
    import pyarrow as pa  # noqa: PLC0415 - a configuration is read without it

    try:
        with pa.input_stream(pa.py_buffer(data), compression="zstd") as stream:
            content = stream.read(most + 1)
    except OSError as error:
        raise ValueError(f"no zstd: {error}") from error
    if len(content) > most:
        raise ValueError(f"{len(data):,} bytes of zstd unpack to more than the {most:,} bytes that are allowed")
    return content


def mend_text(text: str) -> str:
    """Return a text that UTF-8 can hold: pairs of surrogates become their character, single ones U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _SURROGATE.search(text) else text


def read_line(lines: Lines, most: int = MAX_LINE_BYTES) -> bytes:
    """Read one line, with its end. Raises `ValueError` for one that is longer than `most` bytes."""
    line = lines.readline(most + 1)
    if len(line) > most:
        raise ValueError(f"a line has more than the {most:,} bytes that are allowed")
    return line


def parse_json(data: bytes | str, most: int = MAX_JSON_BYTES) -> Any:
    """Parse JSON. Raises `ValueError`."""
    if len(data) > most:
        raise ValueError(f"{len(data):,} bytes of JSON, and {most:,} are allowed")
    try:
        value = json.loads(data)
        return _mend(value) if _has_surrogates(data) else value
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _has_surrogates(data: bytes | str) -> bool:
    """Tell whether strings in JSON or YAML may hold surrogates: as escapes, or as they are, which Python's JSON lets pass."""
    if isinstance(data, str):
        if _SURROGATE.search(data):
            return True
        data = data.encode()
    return _ESCAPED_SURROGATE.search(data) is not None


def _mend(value: Any) -> Any:
    if isinstance(value, str):
        return mend_text(value)
    if isinstance(value, dict):
        return {_mend(key): _mend(item) for key, item in value.items()}
    return [_mend(item) for item in value] if isinstance(value, list) else value


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain data. Raises `ValueError` for a bomb, and `yaml.YAMLError` for what is no YAML."""
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"{len(text):,} characters of YAML, and {MAX_YAML_BYTES:,} are allowed")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {})
        value = loader.construct_document(node)
        return _mend(value) if _has_surrogates(text) else value
    except RecursionError as error:
        raise ValueError("YAML nested too deeply") from error
    finally:
        loader.dispose()


def explain_yaml(error: yaml.YAMLError) -> str:
    """Say in a line where a file stops being YAML."""
    mark = getattr(error, "problem_mark", None)
    what = str(getattr(error, "problem", None) or str(error).splitlines()[0])
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else what


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Count what a node is when its aliases are followed; `known` holds what was counted, and 0 for what is being counted."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("YAML that contains itself")
        return known[id(node)]
    known[id(node)] = 0
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_YAML_NUMBER:
            raise ValueError(f"a number of {len(node.value):,} characters")
        n_nodes = 1
    elif isinstance(node, yaml.MappingNode):
        n_nodes = 1 + sum(_count_nodes(key, known) + _count_nodes(value, known) for key, value in node.value)
    else:
        n_nodes = 1 + sum(_count_nodes(item, known) for item in node.value)
    if n_nodes > MAX_YAML_NODES:
        raise ValueError(f"YAML whose aliases make more than {MAX_YAML_NODES:,} values of {len(known):,}")
    known[id(node)] = n_nodes
    return n_nodes


def check_zip(data: bytes) -> None:
    """Look at the members of a zip file of weights. Raises `ValueError` when they are much larger than the file; nothing for what is no zip."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            n_bytes = sum(member.file_size for member in file.infolist())
        if n_bytes > _GROWTH * len(data) + _SLACK:
            raise ValueError(f"{len(data):,} bytes that unpack to {n_bytes:,}, which weights never do")


def check_npz(data: bytes) -> None:
    """Look at the arrays of an .npz file, too: memory is taken by their headers. Raises `ValueError`."""
    import numpy as np  # noqa: PLC0415 - a configuration is read without it

    check_zip(data)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        for member in file.infolist():
            with file.open(member) as array:
                is_old = np.lib.format.read_magic(array) == (1, 0)
                shape, _, dtype = (np.lib.format.read_array_header_1_0 if is_old else np.lib.format.read_array_header_2_0)(array)
            if math.prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(f"{member.filename} has {member.file_size:,} bytes, and claims {list(shape)} of {dtype}")


def check_parquet(footer: Any, *, rows: int, n_bytes: int) -> None:
    """Compare what a Parquet file says of itself with what is allowed. Raises `ValueError`."""
    found = sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
    if footer.num_rows > rows or found > n_bytes:
        raise ValueError(f"{footer.num_rows:,} rows and {found:,} bytes, and {rows:,} rows and {n_bytes:,} bytes are allowed")
