"""Models on a server: every bad request has its answer, users are apart, and what was asked can be taken back."""

import hashlib
import http.client
import json
import pickle
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from model_server import Clock, ModelServer, make_served, serve_model

from interp_assets.errors import ConfigError, NotFoundError
from interp_assets.garcon.plan import Add, Operation, Patch, Plan, Read, Scale, name_tensor
from interp_assets.garcon.points import find_point, module_of
from interp_assets.garcon.remote.batch import Line
from interp_assets.garcon.remote.limits import Limits
from interp_assets.garcon.remote.message import FILE, pack_plan, unpack
from interp_assets.web.guard import hash_token
from interp_assets.web.kept import KeptTensors
from interp_assets.web.server import check_bind

JSON = {"Content-Type": "application/json"}
RUN = "/api/models/tiny/run"
READ = Read(name="a", point="resid_post.1")
SMALL = Limits(operations=4, rows=2, tokens=12, cells=20, answer_bytes=2000, kept_bytes=4000, kept_s=600.0)


def _plan(*operations: Operation, rows: tuple[str, ...] = ("hello",)) -> str:
    return Plan(rows=tuple(tuple(row.encode()) for row in rows), operations=operations or (READ,)).json()


def _file(*operations: Operation, tensors: dict[str, torch.Tensor]) -> bytes:
    plan = Plan(rows=(tuple(b"hello"),), operations=operations)
    return b"".join(pack_plan(plan, tensors)[1])


def _problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    problem = response.json()["error"]
    assert problem["status"] == status
    assert problem["what"]
    assert problem["do"]
    return problem


@pytest.fixture(scope="module")
def clock() -> Clock:
    """The server's clock."""
    return Clock()


@pytest.fixture(scope="module")
def server(clock: Clock) -> Iterator[ModelServer]:
    """A server with small limits, for two users."""
    users = {"anna": hash_token("anna's long token"), "bert": hash_token("bert's long token")}
    with serve_model(make_served(), SMALL, users=users, weights=False, clock=clock) as server:
        yield server


@pytest.fixture(scope="module")
def anna(server: ModelServer) -> Iterator[httpx.Client]:
    """Anna, who may ask."""
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer anna's long token"}, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def bert(server: ModelServer) -> Iterator[httpx.Client]:
    """Bert, who may ask too."""
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer bert's long token"}, timeout=60) as client:
        yield client


def test_what_is_served_is_told(anna: httpx.Client) -> None:
    """A page or a notebook finds out what it may ask."""
    told = anna.get("/api/models").json()
    (model,) = told["models"]
    assert {key: model[key] for key in ("name", "model", "revision", "type", "n_layers", "d_model", "vocabulary", "max_context", "dtype")} == {
        "name": "tiny",
        "model": "tiny gpt2",
        "revision": "main",
        "type": "gpt2",
        "n_layers": 2,
        "d_model": 16,
        "vocabulary": 259,
        "max_context": 48,
        "dtype": "float32",
    }
    assert model["limits"]["operations"] == 4
    assert model["limits"]["in_flight"] == 4
    assert set(model["queue"]) == {"waiting", "answered", "forwards", "stopped"}
    assert told["weights"] is False
    points = {point["name"]: point for point in anna.get("/api/models/tiny/points").json()["points"]}
    assert points["z.1"]["shape"] == "[batch, context, 2, 8]"
    assert anna.get("/api/models/tiny/points?name=blocks.1.attn.hook_z").json() == {"name": "z.1"}


def test_a_plan_can_be_asked_by_anybody_who_writes_json(anna: httpx.Client) -> None:
    """Curl will do: the plan is its text, the answer a safetensors file."""
    ids = anna.post("/api/models/tiny/tokenize", json={"texts": ["hi", "</s>"]}).json()
    told = {"pieces": [["h", "i"], ["</s>"]], "special": [[False, False], [True]], "roles": [None, None], "texts": ["hi", "</s>"]}
    assert ids == {"ids": [[71, 72], [257]], **told}
    answer = anna.post(RUN, json={"rows": [ids["ids"][0]], "operations": [{"op": "read", "name": "a", "point": "blocks.1.hook_resid_post"}]})
    assert (answer.status_code, answer.headers["content-type"]) == (200, FILE)
    message = unpack(bytearray(answer.content))
    assert json.loads(message.texts["answer"]) == {"tensors": {"a": "0"}, "derivatives": {}, "batch": [1, 2]}
    assert message.tensors["0"].shape == (1, 2, 16)
    assert anna.post(f"{RUN}?dry=1", json={"rows": [[104, 105]], "operations": [{"op": "read", "name": "a", "point": "z.1"}]}).json() == {
        "bytes": {"a": 128},
        "total": 128,
    }


@pytest.mark.parametrize(
    ("body", "status", "what", "op", "point"),
    [
        (_plan(Read(name="a", point="resid_pots.1")), 400, "has no hook point 'resid_pots.1'. Near: resid_post.1", "read", "resid_pots.1"),
        (_plan(Read(name="a", point="z.2")), 400, "Near: z.1, z.0", "read", "z.2"),
        (_plan(Read(name="a", point="z.1", heads=(2,))), 400, "Heads [2] of 'z.1': it has heads 0 to 1", "read", "z.1"),
        (_plan(Read(name="a", point="z.1", pos=5)), 400, "row 0 has 5 tokens", "read", "z.1"),
        ('{"rows":[[1]],"operations":[{"op":"reed","point":"z.1"}]}', 400, "Input tag 'reed' found", "", ""),
        ('{"rows":[[1]],"operations":[{"op":"scale","point":"z.1","times":NaN}]}', 400, "The plan is wrong", "scale", ""),
        ('{"rows":[[1]],"version":2,"operations":[]}', 400, "at version: Input should be 1", "", ""),
        ('{"rows":[[9999]],"operations":[{"op":"read","name":"a","point":"z.1"}]}', 400, "Token id 9,999 is outside the 259", "", ""),
        ('{"rows":[[]],"operations":[{"op":"read","name":"a","point":"z.1"}]}', 400, "has no tokens", "", ""),
        ("no json", 400, "The plan is wrong", "", ""),
        (_plan(READ, READ.model_copy(update={"name": "b"}), *[Scale(point="z.0", times=2.0)] * 3), 413, "has 5 operations; at most 4", "", ""),
        (_plan(rows=("a", "b", "c")), 413, "has 3 rows; at most 2", "", ""),
        (_plan(rows=("x" * 13,)), 413, "has 13 tokens in a row; at most 12", "", ""),
        (_plan(Read(name="a", point="logits")), 413, "would take 0.0 MB, 0.0 MB of them a at logits; at most 0.0 MB are sent", "", "logits"),
        (_plan(Scale(point="resid_post.0", times=1e38), Scale(point="resid_post.0", times=1e38), READ), 422, "a is ", "", ""),
        (_plan(Add(point="z.0", value=name_tensor(torch.ones(8)))), 404, "Nothing of yours is kept under", "", ""),
        (_plan(Read(name="a", point="module:h.9")), 400, "has no module 'h.9'", "read", "module:h.9"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(anna: httpx.Client, body: str, status: int, what: str, op: str, point: str) -> None:
    """With the status of its kind, what to do, and operation and point where they are known."""
    problem = _problem(anna.post(RUN, content=body, headers=JSON), status)
    assert what in problem["what"]
    assert (problem.get("op", ""), problem.get("point", "")) == (op, point)
    assert problem["kind"] in ("InputError", "NotFoundError", "NonFiniteError", "TooLargeError")


def test_a_large_answer_is_told_with_what_fits(anna: httpx.Client) -> None:
    """Positions, or keeping it there; both are allowed then."""
    body = _plan(Read(name="a", point="resid_post.1"), Read(name="b", point="mlp_act.1"), rows=("hello", "wine!"))
    problem = _problem(anna.post(RUN, content=body, headers=JSON), 413)
    assert "choose positions (up to 3 of 5 would fit, pos=-1 takes" in problem["what"]
    assert "leave the answer on the server with keep=True" in problem["what"]
    assert problem["point"] == "mlp_act.1"
    assert anna.post(f"{RUN}?keep=1", content=body, headers=JSON).status_code == 200
    small = _plan(Read(name="a", point="resid_post.1", pos=-1), Read(name="b", point="mlp_act.1", pos=-1), rows=("hello", "wine!"))
    assert anna.post(RUN, content=small, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    ("kind", "body", "status", "what"),
    [
        (FILE, pickle.dumps({"plan": 1}), 400, "its header shall have"),
        ("application/octet-stream", pickle.dumps({"plan": 1}), 415, "must be JSON or a safetensors file"),
        ("text/plain", _plan().encode(), 415, "must be JSON or a safetensors file"),
        (FILE, struct.pack("<Q", 1 << 62) + b"{}", 400, "its header shall have 4,611,686,018,427,387,904 bytes, and 2 follow"),
        (FILE, struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}'[:60], 400, "its header is no JSON"),
        (
            FILE,
            _file(Add(point="z.0", value=name_tensor(torch.ones(8))), tensors={name_tensor(torch.ones(8)).tensor: torch.zeros(8)}),
            400,
            "is not what",
        ),
        (
            FILE,
            _file(Patch(point="z.0", value=name_tensor(torch.ones(2, 7))), tensors={name_tensor(torch.ones(2, 7)).tensor: torch.ones(2, 7)}),
            400,
            "[2, 7]",
        ),
        ("application/json", b'{"rows":"' + b"x" * (1 << 20) + b'"}', 413, "at most 1,048,576 are read"),
    ],
)
def test_a_message_that_lies_is_refused(anna: httpx.Client, kind: str, body: bytes, status: int, what: str) -> None:
    """Pickles, lying headers, tensors that are not what their plan says, shapes that do not fit."""
    assert what in _problem(anna.post(RUN, content=body, headers={"Content-Type": kind}), status)["what"]


@pytest.mark.parametrize(
    "path", ["/api/models/../../etc/passwd", "/api/models/%2e%2e%2fetc/run", "/api/models/other/run", "/api/models/other/points"]
)
def test_models_are_named_by_their_listed_names(anna: httpx.Client, path: str) -> None:
    """No path of the server's disk is ever opened for a client."""
    response = anna.post(path, content=_plan(), headers=JSON) if path.endswith("run") else anna.get(path)
    assert response.status_code in (404, 405)  # 405: the address is one of the built pages, which take no POST


def test_the_guard_stands_before_models_too(server: ModelServer) -> None:
    """Strangers, other sites' pages, other names of this machine, long bodies, forms."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/api/models").status_code == 401
        assert client.post(RUN, content=_plan(), headers={**JSON, "Authorization": "Bearer wrong"}).status_code == 401
        assert client.delete("/api/runs/x").status_code == 401
        mine = {"Authorization": "Bearer anna's long token"}
        assert client.post(RUN, content=_plan(), headers={**JSON, **mine, "Origin": "http://evil.example"}).status_code == 403
        assert client.delete("/api/jobs/x", headers={**mine, "Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert client.delete("/api/runs/x", headers=mine).status_code == 404
        assert client.request("DELETE", "/api/runs/x", headers=mine, content=b"x").status_code == 415
        assert client.post(RUN, data={"plan": _plan()}, headers=mine).status_code == 415
        response = client.post(RUN, content=iter([b"{}"]), headers={**JSON, **mine})
        assert response.status_code == 413  # no length is stated
        assert "content-security-policy" in response.headers
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("POST", RUN, headers={**JSON, **mine, "Content-Length": str((64 << 20) + 1)})
    assert connection.getresponse().status == 413
    connection.close()
    with pytest.raises(ConfigError, match="or one of users with --users"):
        check_bind("0.0.0.0", None)
    check_bind("0.0.0.0", None, {"anna": hash_token("x")})
    assert hash_token("x") == hashlib.sha256(b"x").hexdigest()


def test_what_one_keeps_is_nobody_elses_and_ends(anna: httpx.Client, bert: httpx.Client, clock: Clock) -> None:
    """Another's, an expired and an invented name have the same words."""
    kept = anna.post(f"{RUN}?keep=1", content=_plan(), headers=JSON)
    name = json.loads(unpack(bytearray(kept.content)).texts["answer"])["tensors"]["a"]
    assert (name["dtype"], name["shape"]) == ("float32", [1, 5, 16])
    digest = name["tensor"]
    found = anna.get(f"/api/kept/{digest}")
    assert unpack(bytearray(found.content)).tensors["tensor"].shape == (1, 5, 16)
    part = anna.get(f"/api/kept/{digest}", headers={"Range": "bytes=8-19"})
    assert (part.status_code, part.content) == (206, found.content[8:20])
    assert anna.get(f"/api/kept/{digest}", headers={"Range": "bytes=99999-"}).status_code == 416
    patch = _plan(Patch(point="resid_post.1", value=name_tensor(unpack(bytearray(found.content)).tensors["tensor"])), READ)
    assert anna.post(RUN, content=patch, headers=JSON).status_code == 200
    strange = [_problem(bert.get(f"/api/kept/{digest}"), 404)["what"], _problem(bert.post(RUN, content=patch, headers=JSON), 404)["what"]]
    clock.now += 601
    ended = [_problem(anna.get(f"/api/kept/{digest}"), 404)["what"], _problem(anna.post(RUN, content=patch, headers=JSON), 404)["what"]]
    invented = _problem(anna.get(f"/api/kept/{'0' * 32}"), 404)["what"].replace("0" * 32, digest)
    assert {*strange, *ended} == {invented}


def test_what_is_kept_makes_room(anna: httpx.Client) -> None:
    """A user's oldest goes when his share is full; one answer that is larger than the share is refused."""
    digests = []
    for pos in range(5):
        kept = anna.post(f"{RUN}?keep=1", content=_plan(Read(name="a", point="logits", pos=pos)), headers=JSON)
        digests.append(json.loads(unpack(bytearray(kept.content)).texts["answer"])["tensors"]["a"]["tensor"])
    assert [anna.get(f"/api/kept/{digest}").status_code for digest in digests] == [404, 404, 200, 200, 200]
    problem = _problem(anna.post(f"{RUN}?keep=1", content=_plan(Read(name="a", point="logits")), headers=JSON), 413)
    assert "are kept" in problem["what"]
    assert "keep=True" not in problem["what"]


def test_clients_without_a_name_of_their_own_share_what_one_user_may_keep() -> None:
    """Whoever chooses what he is called could come as a thousand, and fill the server's memory."""
    seconds = iter(range(100))
    kept = KeptTensors(100, 600.0, lambda: float(next(seconds)))
    digests = {}
    for user in ("?one", "?two", "anna", "bert", "?three"):
        (name,) = kept.keep(user, [torch.full((10,), float(len(digests)))])  # 40 bytes
        digests[user] = name.tensor
    assert [len(kept.get(user, digests[user])) for user in ("?two", "anna", "bert", "?three")] == [10] * 4
    with pytest.raises(NotFoundError, match="Nothing of yours is kept"):
        kept.get("?one", digests["?one"])


def test_weights_are_sent_unless_they_are_not(anna: httpx.Client) -> None:
    """A model's weights may be its owner's secret."""
    assert "--no-weights" in _problem(anna.get("/api/models/tiny/weights/W_E"), 404)["what"]
    assert "--no-weights" in _problem(anna.get("/api/models/tiny/controls?sae=any&latent=1&seed=0"), 404)["what"]


def test_a_sweep_is_a_job(anna: httpx.Client, bert: httpx.Client) -> None:
    """It is followed, fetched and ended by its owner alone."""
    metric = {"op": "metric", "metric": "logit_diff", "name": "d", "token": 5, "other": 9}
    sweep = {"row": list(b"hello"), "points": ["resid_post.0", "resid_post.1"], "source": "zero", "metric": metric, "by": "position"}
    begun = anna.post("/api/models/tiny/sweep", json=sweep)
    assert begun.status_code == 202
    job = begun.json()["job"]
    assert anna.get(f"/api/jobs/{job}?wait=30").json() == {"job": job, "state": "done", "done": 10, "of": 10}
    message = unpack(bytearray(anna.get(f"/api/jobs/{job}/result").content))
    assert message.tensors["cells"].shape == (2, 5)
    assert isinstance(json.loads(message.texts["base"]), float)
    for stranger in (bert.get(f"/api/jobs/{job}"), bert.get(f"/api/jobs/{job}/result"), bert.delete(f"/api/jobs/{job}"), anna.get("/api/jobs/0")):
        assert "No job of yours is called" in _problem(stranger, 404)["what"]
    assert anna.delete(f"/api/jobs/{job}").json()["state"] == "cancelled"
    _problem(anna.get(f"/api/jobs/{job}"), 404)
    for change, status, what in (
        ({"points": ["resid_post.0"] * 5}, 413, "is too large"),
        ({"points": ["logits"]}, 400, "is neither"),
        ({"by": "token"}, 400, "by 'position' or by 'head'"),
        ({"source": "mean"}, 400, "or 'zero'; found 'mean'"),
        ({"row": []}, 400, "The plan is wrong at row"),
        ({"code": "import os"}, 400, "Extra inputs"),
    ):
        assert what in _problem(anna.post("/api/models/tiny/sweep", json={**sweep, **change}), status)["what"]


class Busy:
    """A server whose model stands still until a test lets it go on."""

    def __init__(self) -> None:
        """Stand before block 1."""
        self.served = make_served(line=Line(in_flight=2, queued=2))
        self.entered, self.open = threading.Semaphore(0), threading.Event()
        net = self.served.backend.subject.net
        module_of(net, find_point(net, "resid_pre.0")).register_forward_pre_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        self.entered.release()
        assert self.open.wait(60)


@pytest.fixture
def busy() -> Iterator[tuple[Busy, ModelServer]]:
    """Such a server, without tokens: clients are told apart by what they call themselves."""
    busy = Busy()
    try:
        with serve_model(busy.served) as server:
            yield busy, server
            busy.open.set()
    finally:
        busy.open.set()


def _ask_in_background(url: str, client: str, path: str = RUN) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    ask = lambda: answers.append(httpx.post(url + path, content=_plan(), headers={**JSON, "X-Interp-Client": client}, timeout=60))  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    return thread, answers


def test_a_run_is_taken_back_by_its_name_or_by_hanging_up(busy: tuple[Busy, ModelServer]) -> None:
    """The model is free for others at the next block; only its owner can."""
    gate, server = busy
    first, answers = _ask_in_background(server.url, "anna", f"{RUN}?id=mine")
    assert gate.entered.acquire(timeout=60)
    _problem(httpx.delete(f"{server.url}/api/runs/mine", headers={"X-Interp-Client": "bert"}), 404)
    assert httpx.delete(f"{server.url}/api/runs/mine", headers={"X-Interp-Client": "anna"}).json() == {"id": "mine", "state": "cancelled"}
    with httpx.Client(base_url=server.url) as client, pytest.raises(httpx.ReadTimeout):
        client.post(RUN, content=_plan(), headers={**JSON, "X-Interp-Client": "carl"}, timeout=0.2)
    deadline = time.monotonic() + 30
    while server.thread.n_waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.thread.n_waiting == 0  # who hung up no longer waits, though nothing moves
    gate.open.set()
    first.join(60)
    assert _problem(answers[0], 409)["kind"] == "CancelledError"
    assert httpx.post(server.url + RUN, content=_plan(), headers=JSON, timeout=60).status_code == 200
    _problem(httpx.delete(f"{server.url}/api/runs/mine", headers={"X-Interp-Client": "anna"}), 404)


def test_a_full_line_says_when_to_come_again(busy: tuple[Busy, ModelServer]) -> None:
    """For one user and for all; nothing is lost of those who wait."""
    gate, server = busy
    threads = [_ask_in_background(server.url, "anna")]
    assert gate.entered.acquire(timeout=60)
    threads.append(_ask_in_background(server.url, "anna"))
    deadline = time.monotonic() + 30
    while server.thread.n_waiting < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    refused = httpx.post(server.url + RUN, content=_plan(), headers={**JSON, "X-Interp-Client": "anna"}, timeout=60)
    assert "You have 2 requests here" in _problem(refused, 503)["what"]
    assert refused.headers["retry-after"] == "1"
    threads.append(_ask_in_background(server.url, "bert"))
    while server.thread.n_waiting < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    refused = httpx.post(server.url + RUN, content=_plan(), headers={**JSON, "X-Interp-Client": "carl"}, timeout=60)
    assert "2 requests wait for this model" in _problem(refused, 503)["what"]
    gate.open.set()
    for thread, answers in threads:
        thread.join(60)
        assert answers[0].status_code == 200
