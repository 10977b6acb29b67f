"""A proxy in front of an S3 server that does to requests what networks and servers do: refuse, reset, truncate, stall, corrupt.

A rule says which requests it meets and what happens to them. Requests are parsed as HTTP/1.1 heads with a Content-Length body; signatures
stay valid, because the client signs the proxy's address and the proxy passes the Host header through.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Self

Action = Literal["refuse", "reset_request", "reset_answer", "truncate", "slow", "corrupt"]


class Request:
    """What a rule may look at."""

    def __init__(self, method: str, path: str, has_range: bool) -> None:
        self.method, self.path, self.has_range = method, path, has_range


@dataclass
class Rule:
    """Do `action` to the requests that `meets` picks, at most `times`."""

    action: Action
    meets: Callable[[Request], bool] = lambda _request: True
    times: int = 1 << 30
    hits: int = field(default=0)


class FaultProxy:
    """A running proxy on loopback; a context manager."""

    def __init__(self, upstream: str) -> None:
        """Stand in front of `http://host:port`."""
        host, _, port = upstream.removeprefix("http://").partition(":")
        self._upstream = (host, int(port))
        self.rules: list[Rule] = []
        self.endpoint = ""
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Self:
        """Start the proxy in a thread of its own."""
        ready = threading.Event()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20))
            self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            ready.set()
            self._loop.run_forever()
            server.close()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(asyncio.sleep(0.05))
            self._loop.close()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert ready.wait(5)
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _pick(self, request: Request) -> Rule | None:
        for rule in self.rules:
            if rule.hits < rule.times and rule.meets(request):
                rule.hits += 1
                return rule
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            answers: asyncio.StreamReader | None = None
            while True:
                head, line, headers = await _read_head(reader)
                method, path, _ = line.split(" ", 2)
                rule = self._pick(Request(method, path, "range" in headers))
                action = rule.action if rule else None
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if action == "refuse":
                    answer = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                    answer = b"" if method == "HEAD" else answer
                    writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
                    await writer.drain()
                    continue
                if upstream is None or answers is None:
                    answers, upstream = await asyncio.open_connection(*self._upstream, limit=1 << 20)
                if action == "reset_request":
                    upstream.write(head + body[: len(body) // 2])
                    await upstream.drain()
                    _reset(upstream)
                    _reset(writer)
                    return
                upstream.write(head + body)
                await upstream.drain()
                if not await self._answer(answers, writer, method, action):
                    _reset(upstream)
                    return
        except (asyncio.IncompleteReadError, ConnectionError, OSError):
            pass
        finally:
            for each in (writer, upstream):
                if each is not None:
                    each.close()

    async def _answer(self, answers: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, action: Action | None) -> bool:
        """Pass an answer on; False when the connection is broken on purpose."""
        head, line, headers = await _read_head(answers)
        is_empty = method == "HEAD" or line.split(" ")[1] in ("204", "304")
        if not is_empty and headers.get("transfer-encoding", "").lower() == "chunked":
            body = await _read_chunks(answers)
        else:
            body = b"" if is_empty else await answers.readexactly(int(headers.get("content-length", 0)))
        writer.write(head)
        if action == "corrupt" and body and line.split(" ")[1] in ("200", "206"):
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if action in ("truncate", "reset_answer"):
            writer.write(body[: len(body) // 2])
            await writer.drain()
            if action == "reset_answer":
                _reset(writer)
            return False
        for start in range(0, len(body), 4096):
            writer.write(body[start : start + 4096])
            await writer.drain()
            if action == "slow":
                await asyncio.sleep(0.05)
        return True


async def _read_head(reader: asyncio.StreamReader) -> tuple[bytes, str, dict[str, str]]:
    raw = await reader.readuntil(b"\r\n\r\n")
    lines = raw.decode("latin1").split("\r\n")
    headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines[1:] if line)}
    return raw, lines[0], headers


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    """Read a chunked body as it came, frames included."""
    body = b""
    while True:
        size = await reader.readuntil(b"\r\n")
        body += size + await reader.readexactly(int(size.split(b";")[0], 16) + 2)
        if int(size.split(b";")[0], 16) == 0:
            return body


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST."""
    found = writer.get_extra_info("socket")
    if found is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
