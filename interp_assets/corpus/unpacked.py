"""A compressed file becomes a stream of what it holds, which stays open between shards: whoever reads on does not unpack again what lies before.

gzip and zstd have no places at which unpacking may begin, so the way to byte n leads over n bytes. The shards of one file are read in order, by one
process or by several that each take some of them; a process therefore keeps the streams that it read from last, and unpacks a file once for all of
its shards, not once for each. Only who reads backwards begins again.
"""

import atexit
import gzip
import io
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

SUFFIXES: Final = (".gz", ".zst")
"""How the names of files end that are unpacked."""
_KEPT: Final = 4
"""Streams that stay open: a thread of shards each."""
_PIECE: Final = 1 << 20


class Content:
    """What a file holds, from its first byte on; `position` counts bytes of it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.position = 0
        self.has_ended = False

    def readline(self, size: int = -1, /) -> bytes:
        """Read up to the next line's end, and at most `size` bytes."""
        line = self._stream.readline(size)
        self.position += len(line)
        self.has_ended = not line
        return line

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes; fewer only at the end."""
        data = self._stream.read(size)
        self.position += len(data)
        self.has_ended = len(data) < size
        return data

    def skip_to(self, position: int) -> None:
        """Pass over bytes. Raises `EOFError` when there are not as many."""
        while self.position < position:
            if not self.read(min(_PIECE, position - self.position)):
                raise EOFError(f"it has {self.position:,} bytes, and {position:,} were expected")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class OpenFiles:
    """Compressed files that are being read. `n_unpacked` counts the bytes that came out, of all of them, since the beginning."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Any, ...], Content] = OrderedDict()
        self.n_unpacked = 0

    @contextmanager
    def at(self, path: Path, position: int) -> Iterator[Content]:
        """Open a file at a byte of its content. Raises what `gzip` and Arrow raise for what they cannot unpack."""
        facts = path.stat()
        key = (path, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        content = self._kept.pop(key, None)
        if content is None or content.position > position:
            if content is not None:
                content.close()
            content = Content(_open(path))
        start = content.position
        try:
            content.skip_to(position)
            yield content
        except BaseException:
            content.close()
            raise
        finally:
            self.n_unpacked += content.position - start
        if content.has_ended:
            content.close()
            return
        self._kept[key] = content
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)[1].close()

    def close(self) -> None:
        """Close all files."""
        while self._kept:
            self._kept.popitem()[1].close()


def _open(path: Path) -> Any:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path)
    return io.BufferedReader(pa.input_stream(path.open("rb"), compression="zstd"), _PIECE)  # type: ignore[arg-type] - it is a raw stream in all but name


OPEN_FILES: Final = OpenFiles()
"""Those of this process."""
atexit.register(OPEN_FILES.close)
