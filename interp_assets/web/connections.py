"""A web application becomes a server that idle, slow and silent clients cannot stop.

Before any request is complete nobody has shown a token, so what a connection may cost until then is bounded:

1. a request, with its body, is complete `REQUEST_S` after the connection was made or the last answer was sent, or the connection ends. A long
   body has a second more for every `BODY_BYTES` that came: a trickle gains nothing by it;
2. a client that takes nothing of its answer for `WRITE_S` seconds is let go;
3. there are at most `MAX_CONNECTIONS`, and never more than half of the descriptors that this process may have: when one more comes, the
   one that has been without a complete request for longest makes room. So a flood of idle sockets cannot keep a real request out.

uvicorn has a time limit between two requests only, and its limit on connections refuses the newest, which is the real one. h11 is its one
protocol that is always installed; a short queue of unaccepted connections keeps a burst from taking all descriptors before (3) sees it.
"""

import asyncio
import resource
from typing import Any, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S: Final = 15.0
WRITE_S: Final = 60.0
BODY_BYTES: Final = 256 << 10
MAX_CONNECTIONS: Final = 256
_QUEUE: Final = 32
"""Connections that the kernel keeps unaccepted, and that are accepted in one go."""
_STOP_S: Final = 5
_INCOMPLETE: Final = (h11.IDLE, h11.SEND_BODY)


class Connection(H11Protocol):
    """One connection; it ends when its client is silent for too long."""

    request_s, write_s, body_bytes, max_connections = REQUEST_S, WRITE_S, BODY_BYTES, MAX_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Hold what uvicorn gives a protocol."""
        super().__init__(*args, **kwargs)
        self._asked: asyncio.TimerHandle | None = None
        self._written: asyncio.TimerHandle | None = None
        self._since = self.loop.time()

    @property
    def is_waiting(self) -> bool:
        """Whether there is no complete request."""
        return self._asked is not None and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - as in uvicorn
        """Wait for a request, and make room."""
        super().connection_made(transport)
        self._wait_for_request()
        others = [other for other in self.connections if other is not self and not other.transport.is_closing()]
        if len(others) >= self.max_connections:
            waiting = [other for other in others if isinstance(other, Connection) and other.is_waiting]
            min(waiting, key=lambda other: other._since, default=self).transport.abort()  # noqa: SLF001 - its own kind

    def data_received(self, data: bytes) -> None:
        """Handle bytes; a complete request has all the time it needs."""
        super().data_received(data)
        if self.conn.their_state not in _INCOMPLETE:
            self._asked = _cancel(self._asked)
        elif self._asked is not None and self.conn.their_state is h11.SEND_BODY:
            end = self._asked.when() + len(data) / self.body_bytes
            self._asked.cancel()
            self._asked = self.loop.call_at(end, self.transport.abort)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection on: WebSockets have pings."""
        self._asked = _cancel(self._asked)
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state in _INCOMPLETE:
            self._wait_for_request()

    def pause_writing(self) -> None:
        """Watch a client that takes nothing."""
        super().pause_writing()
        self._written = _cancel(self._written) or self.loop.call_later(self.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client takes what it is sent."""
        super().resume_writing()
        self._written = _cancel(self._written)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._asked, self._written = _cancel(self._asked), _cancel(self._written)
        super().connection_lost(exc)

    def _wait_for_request(self) -> None:
        _cancel(self._asked)
        self._since = self.loop.time()
        self._asked = self.loop.call_later(self.request_s, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def make_server(app: Any, host: str, port: int, protocol: type[Connection] = Connection) -> uvicorn.Server:
    """Make the server of an application; its `run` serves until it is interrupted."""
    n_descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = protocol.max_connections if n_descriptors == resource.RLIM_INFINITY else min(protocol.max_connections, max(n_descriptors // 2, 1))
    kind = type(protocol.__name__, (protocol,), {"max_connections": limit})
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=kind,
        loop="asyncio",
        backlog=_QUEUE,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_STOP_S,
    )
    return uvicorn.Server(config)
