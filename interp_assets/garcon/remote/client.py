"""A model on a server becomes one that a notebook holds: plans go there as messages, answers come back, and errors are what they would be here.

One connection is kept for each thread. An answer is read into one buffer of its announced length, of which the tensors are views: nothing is
copied on the way. Interrupting a wait closes the connection, and the server drops the work. This module needs neither transformers nor a web
framework, and HTTP of the standard library alone.
"""

import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from torch import Tensor

from interp_assets import errors
from interp_assets.errors import InputError, InterpError, ServiceError, TooLargeError
from interp_assets.garcon.backend import Answer, Chats, Controls, Generated, PointRow, Token
from interp_assets.garcon.plan import Asked, GeneratePlan, Metric, Plan, ReducePlan, SweepPlan, TensorName, name_tensor
from interp_assets.garcon.remote.message import (
    JSON,
    load_generated,
    load_token,
    pack_plan,
    read_answer,
    read_cells,
    read_controls,
    read_reduced,
    read_tensor,
)

MAX_ANSWER: Final = 1 << 32
"""Bytes of an answer, at most: what is announced beyond is no answer."""
_IDLE_S: Final = 10.0
"""A connection that was silent for longer may have been closed by the server."""
_WAIT_S: Final = 1
"""Of one question how far a job is."""


class RemoteSae(NamedTuple):
    """An SAE that a server has beside its model."""

    hook_point: str
    written_at: str
    d_sae: int


class _Http(http.client.HTTPConnection):
    def __del__(self) -> None:
        self.close()


class _Https(http.client.HTTPSConnection):
    def __del__(self) -> None:
        self.close()


class Connection:
    """HTTP to one server: a connection for each thread, with the token."""

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 120.0) -> None:
        """Take the server's address. Raises `InputError` for one that is none."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise InputError(f"{url!r} is no address of a server: give scheme, name and port, such as 'http://gpu7:8420'.")
        self.url = url.rstrip("/")
        make: Any = _Https if parts.scheme == "https" else _Http
        self._make: Callable[[], http.client.HTTPConnection] = lambda: make(parts.hostname, parts.port, timeout=timeout_s)
        self._headers = {"X-Interp-Client": os.urandom(16).hex(), **({"Authorization": f"Bearer {token}"} if token else {})}
        self._local = threading.local()

    def json(self, method: str, path: str, content: object = None) -> Any:
        """Ask for JSON."""
        body = None if content is None else [json.dumps(content).encode()]
        return json.loads(self.ask(method, path, JSON if body else "", body))

    def ask(self, method: str, path: str, kind: str = "", body: Sequence[bytes | memoryview] | None = None) -> bytearray:
        """Return the body of an answer. Raises the server's error, and `ServiceError` where there is no server."""
        try:
            response = self._send(method, path, kind, body)
            content = self._read(response)
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise ServiceError(
                f"{self.url} does not answer ({reason}). Is `interp serve --model ...` running there, and is the address right?"
            ) from error
        except BaseException:
            self._drop()  # what is left of the answer would be taken for the next one; and the server sees that nobody waits
            raise
        if response.status >= 400:
            raise _read_error(self.url, response.status, content)
        return content

    def lines(self, method: str, path: str, kind: str, body: Sequence[bytes | memoryview]) -> Iterator[bytes]:
        """Yield the lines of an answer as they come. Raises as `ask`."""
        is_over = False
        try:
            response = self._send(method, path, kind, body)
            if response.status >= 400:
                raise _read_error(self.url, response.status, self._read(response))
            while line := response.readline():
                yield line
            is_over = True
        except (OSError, http.client.HTTPException) as error:
            raise ServiceError(f"{self.url} broke off ({type(error).__name__}: {error}).") from error
        finally:
            if not is_over:
                self._drop()

    def _send(self, method: str, path: str, kind: str, body: Sequence[bytes | memoryview] | None) -> http.client.HTTPResponse:
        headers = dict(self._headers)
        if body is not None:
            headers |= {"Content-Type": kind, "Content-Length": str(sum(map(len, body)))}
        was_open = time.monotonic() - getattr(self._local, "used", -_IDLE_S) < _IDLE_S
        if not was_open:
            self._drop()
        for is_last in (False, True) if was_open else (True,):
            connection = self._local.connection = getattr(self._local, "connection", None) or self._make()
            try:
                connection.request(method, path, body=body, headers=headers)
                return connection.getresponse()
            except (ConnectionError, http.client.BadStatusLine):
                self._drop()
                if is_last:  # else the server had closed a silent connection
                    raise
        raise AssertionError

    def _read(self, response: http.client.HTTPResponse) -> bytearray:
        length = int(response.headers.get("Content-Length", -1))
        if not 0 <= length <= MAX_ANSWER:
            raise ServiceError(f"{self.url} announces an answer of {length:,} bytes: it is no server of `interp serve`.")
        body = bytearray(length)
        view = memoryview(body)
        reached = 0
        while reached < length and (n_bytes := response.readinto(view[reached:])):
            reached += n_bytes
        view.release()
        if reached < length:
            raise ServiceError(f"{self.url} broke off: {reached:,} of {length:,} bytes came.")
        response.close()
        self._local.used = time.monotonic()
        return body

    def _drop(self) -> None:
        if connection := getattr(self._local, "connection", None):
            connection.close()
        self._local.connection = None


class RemoteBackend:
    """A model on a server, as `backend.py` has it."""

    def __init__(self, connection: Connection, model: str) -> None:
        """Find a model by its name on the server, or by the name it was loaded by. Raises `InputError` with the names there are."""
        self._connection = connection
        there = connection.json("GET", "/api/models")["models"]
        found = [item for item in there if model in (item["name"], item["model"])]
        if len(found) != 1:
            raise InputError(f"{connection.url} serves no model {model!r}; it serves {[item['name'] for item in there]}.")
        self.about: dict[str, Any] = found[0]
        """What the server says of it: limits, SAEs, queue."""
        self._path = f"/api/models/{quote(self.about['name'], safe='')}"
        self.saes = {name: RemoteSae(sae["hook_point"], sae["written_at"], sae["d_sae"]) for name, sae in self.about["saes"].items()}
        self._points = [PointRow(**point) for point in connection.json("GET", f"{self._path}/points")["points"]]
        self._names = {point.name: point.name for point in self._points if not point.refused}
        self.pieces = Vocabulary(connection, self._path)

    def list_points(self) -> list[PointRow]:
        """List the canonical points, as the server has told."""
        return self._points

    def find_point(self, name: str) -> str:
        """Return the canonical name of a point; what is not in the list is asked for once."""
        if name not in self._names:
            self._names[name] = self._connection.json("GET", f"{self._path}/points?name={quote(name, safe='')}")["name"]
        return self._names[name]

    def tokenize(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Return the token ids of each text."""
        return self._tokenize({"texts": list(texts), "special": special})["ids"]

    def _tokenize(self, given: dict[str, Any]) -> dict[str, Any]:
        """Ask for tokens, and remember how they are written."""
        found = self._connection.json("POST", f"{self._path}/tokenize", given)
        for ids, pieces in zip(found["ids"], found["pieces"], strict=True):
            self.pieces.learn(ids, pieces)
        return found

    def run(self, plan: Plan, tensors: Mapping[str, Tensor], *, exact: bool = False, keep: bool = False) -> Answer:
        """Execute a plan on the server."""
        query = "&".join(name for name, is_set in (("exact=1", exact), ("keep=1", keep)) if is_set)
        return read_answer(self._post(f"run?{query}", plan, tensors), self, self.fetch)

    def measure(self, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the bytes that every operation of a plan would answer, without a forward."""
        return json.loads(self._post("run?dry=1", plan, tensors))["bytes"]

    def sweep(self, row: Sequence[int], names: Sequence[str], source: Mapping[str, Tensor] | str, metric: Metric, by: str) -> tuple[float, Tensor]:
        """Sweep as a job of the server, and wait for it; interrupting the wait ends the job."""
        tensors = {} if isinstance(source, str) else {name: source[name] for name in names}
        named = {name: name_tensor(tensor) for name, tensor in tensors.items()}
        given: Any = source if isinstance(source, str) else tuple(named.values())
        plan = SweepPlan(row=tuple(row), points=tuple(names), source=given, metric=metric, by=by)
        job = json.loads(self._post("sweep", plan, {named[name].tensor: tensor for name, tensor in tensors.items()}))["job"]
        return read_cells(self._follow(job, lambda _: None))

    def reduce(self, plan: ReducePlan, progress: Callable[[int], None] | None = None) -> dict[str, dict[str, Any]]:
        """Reduce as a job of the server, and wait for it; interrupting the wait ends the job."""
        job = json.loads(self._post("reduce", plan, {}))["job"]
        return read_reduced(self._follow(job, progress or (lambda _: None)))

    def _follow(self, job: str, progress: Callable[[int], None]) -> bytearray:
        """Wait for a job's end and return its answer; `progress` is advanced by what was done."""
        reached, state = 0, "waiting"
        try:
            while state in ("waiting", "running"):
                told = self._connection.json("GET", f"/api/jobs/{job}?wait={_WAIT_S}")
                state = told["state"]
                progress(told["done"] - reached)
                reached = told["done"]
            return self._connection.ask("GET", f"/api/jobs/{job}/result")
        except KeyboardInterrupt:
            self._connection.json("DELETE", f"/api/jobs/{job}")
            raise

    def weight(self, name: str, head: int | None = None) -> Tensor:
        """Return a copy of a weight by its name, of one head if `head` is given."""
        query = "" if head is None else f"?head={head}"
        return read_tensor(self._connection.ask("GET", f"{self._path}/weights/{quote(name, safe='')}{query}"))

    @property
    def name(self) -> str:
        """What the model was loaded by."""
        return self.about["model"]

    @property
    def special_tokens(self) -> tuple[int, ...]:
        """Ids that stand for no text."""
        return tuple(self.about["special_tokens"])

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a text."""
        return tuple(self.about["stop_tokens"])

    def chats(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Chats:
        """Render conversations by the model's own template."""
        found = self._tokenize({"conversations": [[dict(message) for message in messages] for messages in conversations]})
        return Chats(tuple(map(tuple, found["ids"])), tuple(None if roles is None else tuple(roles) for roles in found["roles"]))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return what token ids say together."""
        return self._connection.json("POST", f"{self._path}/tokenize", {"ids": [list(tokens)]})["texts"][0]

    @property
    def most_texts(self) -> int:
        """How many texts one plan may write."""
        return self.about["limits"]["rows"]

    def controls(self, sae: str, latent: int, seed: int) -> Controls:
        """Return what a latent is compared with."""
        query = urlencode({"sae": sae, "latent": latent, "seed": seed})
        return read_controls(self._connection.ask("GET", f"{self._path}/controls?{query}"))

    def latent_strength(self, written: str | float, sae: str, latent: int) -> float:
        """Return the number of a latent's strength."""
        return self._strength(written=written, sae=sae, latent=latent)

    def vector_strength(self, written: str | float, point: str, length: float) -> float:
        """Return how many times a vector is added."""
        return self._strength(written=written, point=point, length=length)

    def _strength(self, **asked: Any) -> float:
        return float(self._connection.json("GET", f"{self._path}/strength?{urlencode(asked)}")["strength"])

    def generate(self, plan: GeneratePlan, tensors: Mapping[str, Tensor], on_token: Callable[[Token], None] | None = None) -> Generated:
        """Continue texts on the server, and hand out their tokens as they come; interrupting it ends the work."""
        kind, body = pack_plan(plan, tensors)
        told: Any = {}
        for line in self._connection.lines("POST", f"{self._path}/generate", kind, body):
            told = json.loads(line)
            if "token" in told and on_token is not None:
                on_token(load_token(told["token"]))
        if "generated" not in told:
            raise _read_error(self._connection.url, 0, bytearray(json.dumps(told).encode()))
        return load_generated(told["generated"])

    def _post(self, path: str, plan: Asked, tensors: Mapping[str, Tensor]) -> bytearray:
        kind, body = pack_plan(plan, tensors)
        n_bytes, most = sum(map(len, body)), self.about["limits"]["body_bytes"]
        if n_bytes > most:  # the server would hang up before it has read it
            raise TooLargeError(f"The request has {n_bytes:,} bytes; {self._connection.url} reads at most {most:,}. Patch fewer points or positions.")
        return self._connection.ask("POST", f"{self._path}/{path}", kind, body)

    def fetch(self, name: TensorName) -> Tensor:
        """Get a tensor that the server keeps."""
        return read_tensor(self._connection.ask("GET", f"/api/kept/{name.tensor}"))


class Vocabulary:
    """How a server's tokenizer writes tokens; what is not known yet is asked for."""

    def __init__(self, connection: Connection, path: str) -> None:
        """Know nothing yet."""
        self._connection, self._path = connection, path
        self._known: dict[int, str] = {}

    def learn(self, ids: Sequence[int], pieces: Sequence[str]) -> None:
        """Remember how tokens are written."""
        self._known.update(zip(ids, pieces, strict=True))

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[list[str]]:
        """Write every token of some rows."""
        if unknown := sorted({token for row in rows for token in row} - set(self._known)):
            self.learn(unknown, self._connection.json("POST", f"{self._path}/tokenize", {"ids": [unknown]})["pieces"][0])
        return [[self._known[token] for token in row] for row in rows]


def _read_error(url: str, status: int, body: bytearray) -> InterpError:
    """Return the error that a server tells of, of the class that it has there."""
    try:
        told = json.loads(body)["error"]
        what, kind = str(told["what"]), str(told.get("kind", ""))
    except (ValueError, TypeError, LookupError):
        return ServiceError(f"{url} answers {status} and no reason: it is no server of `interp serve`.")
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, InterpError):
        return found(what)
    return ServiceError(f"{what} {told.get('do', '')}".strip())
