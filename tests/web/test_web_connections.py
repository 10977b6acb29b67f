"""Clients that say nothing, too little or too slowly are let go: a real request is answered beside any number of them."""

import resource
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import websockets.sync.client

from interp_assets.web.connections import Connection, make_server
from interp_assets.web.guard import Guard

HEAD = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"
POST = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n"
LARGE = 32 << 20
SMALL_SERVER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from interp_assets.web.server import serve
serve([], port=int(sys.argv[1]))
"""


class Impatient(Connection):
    """The limits of the test."""

    request_s, write_s, max_connections = 1.0, 1.0, 20


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answer `/` with a word after the whole request has come, and `/large` with more than a socket holds."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] != "websocket.disconnect":
            if message["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": message["text"]})
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    body = b"x" * LARGE if scope["path"] == "/large" else b"here"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(protocol: type[Connection]) -> Iterator[int]:
    """Serve the application behind the guard, in a thread."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = make_server(Guard(application, None, ()), "127.0.0.1", port, protocol)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Serve with short limits."""
    with serving(Impatient) as number:
        yield number


def fetch(port: int) -> str:
    """Ask as a browser does."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
        return answer.read().decode()


def connect(port: int, sent: bytes = b"") -> socket.socket:
    """Open a connection and send something."""
    client = socket.create_connection(("127.0.0.1", port), timeout=5)
    client.sendall(sent)
    return client


def until_closed(client: socket.socket, feed: Callable[[], bytes] = lambda: b"") -> float:
    """Go on feeding a connection until the other side closes it; return how long that took."""
    started = time.monotonic()
    client.settimeout(0.1)
    with client, suppress(ConnectionError, BrokenPipeError):
        while time.monotonic() - started < 10:
            with suppress(TimeoutError):
                if client.recv(1 << 16) == b"":
                    break
            client.sendall(feed())
    return time.monotonic() - started


@pytest.mark.parametrize("sent", [b"", HEAD, POST + b"{"])
def test_an_incomplete_request_is_not_waited_for(port: int, sent: bytes) -> None:
    """Nothing, half a head and half a body: each holds a descriptor of a server that has not seen a token yet."""
    assert 0.5 < until_closed(connect(port, sent)) < 5


def test_a_trickle_does_not_prolong_it(port: int) -> None:
    """A byte now and then would hold a connection for ever, were the time counted from the last one."""
    assert until_closed(connect(port, HEAD), lambda: b"X") < 5
    assert until_closed(connect(port, POST), lambda: b"x") < 5


def test_a_long_body_has_the_time_that_it_needs() -> None:
    """A notebook behind a slow line sends 64 MB; one that sends nothing of them is not waited for."""

    class Slow(Impatient):
        request_s, body_bytes = 0.5, 100

    head = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 400\r\n\r\n"
    with serving(Slow) as port, connect(port, head) as client:
        for _ in range(4):
            time.sleep(0.3)
            client.sendall(b"x" * 100)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
    with serving(Slow) as port:
        assert until_closed(connect(port, head + b"x" * 50)) < 4


def test_a_client_that_takes_nothing_is_let_go(port: int) -> None:
    """Answers wait in memory."""
    with connect(port, b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as client:
        time.sleep(3)
        client.settimeout(2)
        n_bytes = 0
        with suppress(ConnectionError):
            while piece := client.recv(1 << 20):
                n_bytes += len(piece)
        assert n_bytes < LARGE


def test_a_connection_answers_more_than_once(port: int) -> None:
    """The limit is for waiting, not for living: a page sends many requests over one connection."""
    with connect(port) as client:
        for _ in range(6):
            client.sendall(HEAD + b"\r\n")
            said = b""
            while not said.endswith(b"here"):
                piece = client.recv(1 << 16)
                assert piece
                said += piece
            time.sleep(0.3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # uvicorn's choice of a protocol
def test_a_web_socket_may_be_silent(port: int) -> None:
    """Dagster's UI waits for events over one."""
    with websockets.sync.client.connect(f"ws://127.0.0.1:{port}/", origin=f"http://127.0.0.1:{port}") as client:  # pyright: ignore[reportArgumentType]
        time.sleep(2)
        client.send("still there")
        assert client.recv() == "still there"


def test_a_real_request_is_answered_beside_more_idle_ones_than_there_is_room_for() -> None:
    """The one that has waited longest makes room, so a flood pushes out itself."""

    class Patient(Impatient):
        request_s = 60.0

    with serving(Patient) as port, ExitStack() as stack:
        for i in range(60):
            stack.enter_context(connect(port, HEAD if i % 2 else b""))
        for _ in range(3):
            assert fetch(port) == "here"


@pytest.mark.slow
def test_four_hundred_idle_sockets_do_not_stop_a_server_with_two_hundred_descriptors() -> None:
    """The measured attack, on the real server: it answers while they are there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 1024)), hard))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", SMALL_SERVER, str(port)])
    try:
        with ExitStack() as stack:
            for _ in range(600):
                with suppress(OSError):
                    connect(port).close()
                    break
                time.sleep(0.1)
            for i in range(400):
                stack.enter_context(connect(port, HEAD if i % 2 else b""))
            started = time.monotonic()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/bundles", timeout=10) as answer:
                assert answer.status == 200
            assert time.monotonic() - started < 5
    finally:
        process.kill()
        process.wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
