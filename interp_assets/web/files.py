"""One file of a bundle becomes an HTTP answer: whole, one byte range, or not modified (RFC 9110 sections 13 and 14).

Files are sent as they are. Record files hold gzip members, but no `Content-Encoding` is set: a range of an encoded body could not be
decoded; the page unpacks the one member it asked for.
"""

import re
from itertools import chain
from typing import Final, NamedTuple

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from interp_assets.web.opened import OpenFiles

_RANGE: Final = re.compile(r"bytes=(?:(\d{1,18})-(\d{1,18})?|-(\d{1,18}))")
_TYPES: Final = {"json": "application/json; charset=utf-8"}


class Span(NamedTuple):
    """Bytes [start, start + n_bytes) of a file."""

    start: int
    n_bytes: int


def parse_range(header: str | None, size: int) -> Span | None:
    """Return the span that a `Range` header asks for, or None for the whole file.

    Several ranges, other units and malformed headers mean the whole file, as the standard has it. Raises `ValueError` when the range lies
    outside the file.
    """
    found = _RANGE.fullmatch(header.strip()) if header else None
    if not found:
        return None
    first, last, suffix = found.groups()
    if suffix is not None:
        n_bytes = min(int(suffix), size)
        start = size - n_bytes
    else:
        start = int(first)
        stop = min(int(last) + 1, size) if last is not None else size
        if last is not None and int(last) < start:
            return None
        n_bytes = stop - start
    if n_bytes <= 0:
        raise ValueError(f"bytes {header} of {size}")
    return Span(start, n_bytes)


def file_response(bundle: OpenFiles, name: str, request: Request) -> Response:
    """Answer a request for one file of a bundle. Raises `ArtifactCorruptError` when the first piece differs from its checksum."""
    size, etag = bundle.manifest.file(name).n_bytes, bundle.etag(name)
    headers = {"etag": etag, "accept-ranges": "bytes", "cache-control": "private, max-age=3600"}
    if etag in [item.strip().removeprefix("W/") for item in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    is_fresh = request.headers.get("if-range", etag) == etag
    try:
        span = parse_range(request.headers.get("range"), size) if is_fresh else None
    except ValueError:
        return Response(status_code=416, headers={**headers, "content-range": f"bytes */{size}"})
    if span:
        headers["content-range"] = f"bytes {span.start}-{span.start + span.n_bytes - 1}/{size}"
    wanted = span or Span(0, size)
    headers |= {"content-length": str(wanted.n_bytes), "content-type": _TYPES.get(name.rsplit(".", 1)[-1], "application/octet-stream")}
    status = 206 if span else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    pieces = bundle.stream(name, *wanted)
    first = next(pieces, b"")  # an error here still becomes an answer that says so
    if len(first) == wanted.n_bytes:
        return Response(first, status_code=status, headers=headers)
    return StreamingResponse(chain([first], pieces), status_code=status, headers=headers)
