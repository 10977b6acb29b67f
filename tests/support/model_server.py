"""A server of tiny models on this machine, and notebooks that talk to it."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tiny_models import make_net, make_tokenizer

from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.local import LocalBackend
from interp_assets.garcon.remote.batch import Line, ModelThread
from interp_assets.garcon.remote.client import Connection, RemoteBackend
from interp_assets.garcon.remote.limits import Limits
from interp_assets.garcon.session import Model
from interp_assets.garcon.subject import SubjectModel
from interp_assets.web.connections import make_server
from interp_assets.web.models import Models, Served
from interp_assets.web.opened import BundlePlace
from interp_assets.web.server import Desk, make_app


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        """Start at 1,000 s."""
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class ModelServer:
    """One tiny model that is served, and a copy of it here."""

    def __init__(self, url: str, served: Served) -> None:
        """`serve_model` makes it."""
        self.url, self.served, self.thread = url, served, served.thread
        backend, name = served.backend, served.backend.subject.name
        self.local = Model(SubjectModel(make_net(name.removeprefix("tiny ")), name), backend.tokenizer, backend.saes)

    def connect(self, token: str | None = None) -> Model:
        """Return the model as another notebook has it, with a connection of its own."""
        return Model.over(RemoteBackend(Connection(self.url, token, 60.0), self.served.name))


def make_served(
    kind: str = "gpt2", *, saes: Mapping[str, AttachedSae] | None = None, line: Line | None = None, clock: Any = time.monotonic
) -> Served:
    """Build a tiny model of its own and the thread that runs it."""
    backend = LocalBackend(SubjectModel(make_net(kind), f"tiny {kind}"), make_tokenizer(is_encoder=kind == "bert"), saes)
    return Served("tiny", backend, ModelThread(backend.subject, backend.saes, line, clock), {"model": f"tiny {kind}", "revision": "main"})


@contextmanager
def serve_model(
    served: Served,
    limits: Limits | None = None,
    *,
    token: str | None = None,
    users: Mapping[str, str] | None = None,
    weights: bool = True,
    clock: Any = time.monotonic,
    bundles: Sequence[BundlePlace] = (),
) -> Iterator[ModelServer]:
    """Serve a model, and bundles beside it, on a free port while this is open."""
    models = Models([served], limits, weights=weights, clock=clock)
    app = make_app(bundles, token=token, desk=Desk(models=models, users=users or {}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = make_server(app, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        yield ModelServer(f"http://127.0.0.1:{port}", served)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        served.thread.close()
