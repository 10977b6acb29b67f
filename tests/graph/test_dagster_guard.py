"""Dagster's webserver runs code for whoever may ask it: a page of another site may not, by any method."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import httpx
import pytest
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import EmptyWorkspaceTarget
from dagster._daemon.asset_daemon import get_auto_materialize_paused, set_auto_materialize_paused
from dagster_webserver.app import create_app_from_workspace_process_context
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from interp_assets.graph.ui import guard_ui

HOST = "127.0.0.1:3000"
OWN = {"Origin": f"http://{HOST}", "Sec-Fetch-Site": "same-origin"}
MUTATION = {"query": "mutation { setAutoMaterializePaused(paused: true) }"}
QUERY = {"query": "{ version }"}

pytestmark = pytest.mark.filterwarnings("ignore")  # Dagster's and graphene's own


class Ui:
    """Dagster's application behind the guard, and what it changed."""

    def __init__(self, instance: dg.DagsterInstance, app: Any) -> None:
        self.instance, self.app = instance, app
        self.client = self.with_token(None)

    def with_token(self, token: str | None) -> TestClient:
        return TestClient(guard_ui(self.app, token), base_url=f"http://{HOST}", raise_server_exceptions=False)

    @property
    def is_changed(self) -> bool:
        return get_auto_materialize_paused(self.instance)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dg.DagsterInstance, Any]]:
    """Build Dagster's application without any code location."""
    home = str(tmp_path_factory.mktemp("home"))
    with dg.DagsterInstance.local_temp(home) as instance, WorkspaceProcessContext(instance, EmptyWorkspaceTarget()) as context:
        yield instance, create_app_from_workspace_process_context(context)


@pytest.fixture
def ui(app: tuple[dg.DagsterInstance, Any]) -> Ui:
    """Return it with nothing changed."""
    set_auto_materialize_paused(app[0], False)
    return Ui(*app)


def refused(response: httpx.Response, status: int) -> bool:
    """Say whether an answer is the guard's."""
    return response.status_code == status and set(response.json()["error"]) == {"status", "what", "do"}


def test_a_get_changes_nothing(ui: Ui) -> None:
    """An image on any page sends a GET; Dagster would run what its address says."""
    for path in ("/graphql", "/graphql/"):
        assert refused(ui.client.get(path, params=MUTATION), 405)
        assert refused(ui.client.get(path, params=QUERY, headers=OWN), 405)
    page = ui.client.get("/graphql", params=MUTATION, headers={"Accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")  # the playground, which executes nothing
    assert not ui.is_changed


@pytest.mark.parametrize("host", ["evil.example:3000", "evil.example", "127.0.0.1.evil.example", "", "[", "localhost@evil.example"])
def test_a_foreign_host_is_refused(ui: Ui, host: str) -> None:
    """A site can point its own name at the loopback address, and is then of the same origin."""
    for path in ("/", "/graphql"):
        assert refused(ui.client.post(path, json=MUTATION, headers={"Host": host}), 421)
    assert not ui.is_changed


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8420"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
        {**OWN, "Sec-Fetch-Site": "cross-site"},
    ],
)
def test_a_page_of_another_origin_is_refused(ui: Ui, headers: dict[str, str]) -> None:
    """Another port of this machine is another origin too."""
    for path in ("/graphql", "/report_asset_materialization/activations"):
        assert refused(ui.client.post(path, json=MUTATION, headers=headers), 403)
    assert not ui.is_changed


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "text/plain; application/json", "application/graphql", ""])
def test_what_a_form_can_send_is_refused(ui: Ui, kind: str) -> None:
    """A browser sends these without asking first; Dagster takes any type that has the word in it."""
    content = b'{"query": "mutation { setAutoMaterializePaused(paused: true) }"}'
    for path in ("/graphql", "/report_asset_materialization/activations"):
        assert refused(ui.client.post(path, content=content, headers={**OWN, "Content-Type": kind}), 415)
    assert not ui.is_changed


def test_its_own_page_asks_and_changes(ui: Ui) -> None:
    """What the UI does all day."""
    assert ui.client.post("/graphql", json=QUERY, headers=OWN).json()["data"] == {"version": ""}
    assert ui.client.post("/graphql", json=MUTATION, headers=OWN).json()["data"] == {"setAutoMaterializePaused": True}
    assert ui.is_changed


def test_the_page_opens_and_stays_out_of_frames(ui: Ui) -> None:
    """From an address that was typed, from a link on another site, and not inside another page."""
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    for headers in ({}, {"Sec-Fetch-Site": "none"}, link):
        page = ui.client.get("/assets", headers=headers)
        assert (page.status_code, "<html" in page.text) == (200, True)
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert refused(ui.client.get("/assets", headers={**link, "Sec-Fetch-Dest": "iframe"}), 403)


def test_only_its_own_page_may_subscribe(ui: Ui) -> None:
    """A WebSocket is bound to no origin: the server has to look."""
    with ui.client.websocket_connect(f"ws://{HOST}/graphql", headers=OWN) as socket:
        socket.send_json({"type": "connection_init"})
        assert socket.receive_json() == {"type": "connection_ack"}
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Origin": "https://evil.example", "Host": "evil.example"}):
        with pytest.raises(WebSocketDisconnect), ui.client.websocket_connect(f"ws://{HOST}/graphql", headers=headers):
            pass


def test_with_a_token_all_of_it_asks(ui: Ui) -> None:
    """Beyond the loopback address the token is what protects."""
    client = ui.with_token("a long random text")
    assert refused(client.post("/graphql", json=MUTATION, headers={"Host": "runs.example"}), 401)
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(f"ws://{HOST}/graphql"):
        pass
    assert not ui.is_changed
    client.get("/", params={"token": "a long random text"})  # keeps the cookie
    assert client.post("/graphql", json=MUTATION).status_code == 200
    assert ui.is_changed
