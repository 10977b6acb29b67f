"""Models become routes: what a notebook asks of a model on a server, in the same application as the browser's pages and behind the same guard.

    GET    /api/models                        what is served: revision, SAEs, limits, queue
    GET    /api/models/{m}/points             every point with its shape, or why it is not there; `name=`: what a name means here
    POST   /api/models/{m}/tokenize           texts, conversations (by the model's template) or ids: ids, how each is written, which are special,
                                              whose words they are of, and all of a row together
    GET    /api/models/{m}/strength           the number of a strength with a unit: `written`, and `sae` and `latent`, or `point` and `length`
    POST   /api/models/{m}/run                a plan's answer. `dry=1`: its bytes, without a forward; `exact=1`: nobody shares its forward;
                                              `keep=1`: it stays here, and its tensors' names come; `id=`: what it is called to be taken back
    DELETE /api/runs/{id}                     take it back; so does closing the connection
    POST   /api/models/{m}/generate           NDJSON: a line a token as it comes, the last one with all that it gave, or with an error
    POST   /api/models/{m}/sweep, /reduce     202 and a job
    GET    /api/jobs/{job}                    how far it is; `wait=`: seconds to wait for its end. `/result`: its answer. DELETE: end it
    GET    /api/kept/{digest}                 a tensor that was kept, as a file of one tensor; by Range
    GET    /api/models/{m}/weights/{name}     a weight likewise; `head=`
    POST   /api/models/{m}/attention, /pairs, /cut, /cuts    heads over a text of one's own, what an edge is of, and without some: `attention_live.py`

Messages are `garcon/remote/message.py`'s; `guard.py` bounds their length. All else is checked here before anything is run: `garcon/remote/limits.py`.
Errors are JSON: status, what, do, the error's class, and operation and point where they are known. Logs hold no text of anybody's.
"""

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import suppress
from functools import partial, wraps
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import torch
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from interp_assets.errors import (
    BusyError,
    CancelledError,
    InputError,
    InterpError,
    NonFiniteError,
    NoRoomError,
    NotFoundError,
    OverdueError,
    ServiceError,
    TooLargeError,
)
from interp_assets.garcon.backend import Answer, Chats, Generated, Kept, Token
from interp_assets.garcon.local import LocalBackend
from interp_assets.garcon.plan import Asked, GeneratePlan, Plan, ReducePlan, SweepPlan, explain_plan
from interp_assets.garcon.points import n_layers
from interp_assets.garcon.reduce import reduce_steps
from interp_assets.garcon.remote.batch import ModelThread, Steps, Ticket
from interp_assets.garcon.remote.limits import Limits, answer_bytes, check_answer, check_plan, check_texts, needs_forward
from interp_assets.garcon.remote.message import (
    FILE,
    LINES,
    MAX_TEXT,
    dump_generated,
    pack,
    pack_answer,
    pack_cells,
    pack_controls,
    pack_reduced,
    read_plan,
)
from interp_assets.garcon.steering.decode import stream_tokens
from interp_assets.garcon.sweep import begin_sweep
from interp_assets.planning.progress import format_count
from interp_assets.web.attention_live import ATTENTION, BYTES, read_asked
from interp_assets.web.files import parse_range
from interp_assets.web.kept import NAMELESS, KeptTensors

CLIENT: Final = "x-interp-client"
"""Header of a random text by which clients without a name of their own are told apart."""
_PIECE: Final = 1 << 20
_SMALL: Final = 1 << 14
"""Bytes of a request or an answer: some hundred operations."""
_STATUSES: Final[Sequence[tuple[type[InterpError], int, str]]] = (
    (NotFoundError, 404, "Look at /api/models for what is served."),
    (TooLargeError, 413, "Ask for less at once."),
    (NonFiniteError, 422, "Write smaller values, or serve the model in float32."),
    (InputError, 400, "Change the request."),
    (BusyError, 503, "Come again in a second."),
    (OverdueError, 504, "Ask for less at once, or come again when fewer wait."),
    (CancelledError, 409, "Send it again if it is wanted after all."),
    (NoRoomError, 507, "Ask for less at once."),
    (ServiceError, 503, "Look at the server's terminal."),
    (InterpError, 502, "Look at the server's terminal."),
)
T = TypeVar("T", bound=Asked)
U = TypeVar("U")


class Served(NamedTuple):
    """A model that is served, by its short name."""

    name: str
    backend: LocalBackend
    thread: ModelThread
    facts: Mapping[str, Any]
    """What else is told of it: the name that it was loaded by, its revision, and what was measured of its SAEs."""


class _Job(NamedTuple):
    user: str
    thread: ModelThread
    ticket: Ticket
    pack: Callable[[Any], list[bytes | memoryview]] = pack_answer
    """What makes a message of its result."""


class _Texts(BaseModel):
    """What is tokenized, or written."""

    model_config = ConfigDict(extra="forbid")
    texts: list[str] = Field(default=[], max_length=1024)
    conversations: list[list[dict[str, Any]]] = Field(default=[], max_length=1024)
    ids: list[list[Annotated[int, Field(ge=0, lt=1 << 62)]]] = Field(default=[], max_length=1024)
    special: bool = True


class Models:
    """The models of a server, and what it keeps for their users."""

    def __init__(
        self, served: Sequence[Served], limits: Limits | None = None, *, weights: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Serve models; `weights` says whether theirs are read too."""
        self._served = {item.name: item for item in served}
        self._limits, self._weights, self._clock = limits or Limits(), weights, clock
        self._kept = KeptTensors(self._limits.kept_bytes, self._limits.kept_s, clock)
        self._runs: dict[tuple[str, str], _Job] = {}
        self._jobs: dict[str, _Job] = {}
        self._tokenizing = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Their short names."""
        return list(self._served)

    def add(self, app: FastAPI) -> None:
        """Add the routes to an application."""
        one = "/api/models/{name}"
        app.get("/api/models")(_answered(self.list_models))
        app.get(f"{one}/points")(_answered(self.list_points))
        app.post(f"{one}/tokenize")(_answered(self.tokenize))
        app.post(f"{one}/run")(_answered(self.run))
        app.post(f"{one}/generate")(_answered(self.generate))
        app.get(f"{one}/strength")(_answered(self.strength))
        app.get(f"{one}/controls")(_answered(self.read_controls))
        app.post(f"{one}/sweep")(_answered(self.sweep))
        app.post(f"{one}/reduce")(_answered(self.reduce))
        for path, looking in ATTENTION.items():
            app.post(f"{one}/{path}")(_answered(self._looking(*looking)))
        app.get(f"{one}/weights/{{weight:path}}")(_answered(self.read_weight))
        app.delete("/api/runs/{id}")(_answered(self.cancel))
        app.get("/api/jobs/{job}")(_answered(self.follow))
        app.get("/api/jobs/{job}/result")(_answered(self.read_result))
        app.delete("/api/jobs/{job}")(_answered(self.end))
        app.get("/api/kept/{digest}")(_answered(self.read_kept))

    async def list_models(self) -> Response:
        """Tell what is served."""
        return JSONResponse({"models": [self._describe(item) for item in self._served.values()], "weights": self._weights})

    async def list_points(self, name: str, request: Request) -> Response:
        """Tell the points of a model, or what one name means."""
        backend = self.find(name).backend
        if (wanted := request.query_params.get("name")) is not None:
            return JSONResponse({"name": backend.find_point(wanted)})
        return JSONResponse({"points": [point._asdict() for point in backend.list_points()]})

    async def tokenize(self, name: str, request: Request) -> Response:
        """Tokenize texts and conversations, or write tokens."""
        backend = self.find(name).backend
        try:
            given = _Texts.model_validate_json(bytes(await _read_body(request, MAX_TEXT)))
        except ValidationError as error:
            raise InputError(explain_plan(error).replace("The plan", "What is to be tokenized", 1)) from error
        return JSONResponse(await run_in_threadpool(self._write, backend, given))

    async def run(
        self,
        name: str,
        request: Request,
        dry: bool = False,  # noqa: FBT001, FBT002 - as above
        exact: bool = False,  # noqa: FBT001, FBT002 - as above
        keep: bool = False,  # noqa: FBT001, FBT002 - as above
        id: Annotated[str, Query(pattern=r"^[A-Za-z0-9_-]{0,64}$")] = "",  # noqa: A002 - the word in the address
    ) -> Response:
        """Run a plan."""
        served, user = self.find(name), _user_of(request)
        plan, tensors = await self._read(request, user, Plan)
        check_plan(plan, self._limits)
        sizes = await self._measure(served, user, plan, _length_of(request))
        if dry:
            return JSONResponse({"bytes": sizes, "total": sum(sizes.values())})
        check_answer(sizes, plan, self._limits, keep=keep)
        ticket = await _off(_length_of(request), partial(served.thread.ask, user, plan, tensors, exact=exact))
        job = _Job(user, served.thread, ticket)
        if id:
            self._runs[user, id] = job
        try:
            answer = await _wait(request, job)
        finally:
            if self._runs.get((user, id)) is job:
                del self._runs[user, id]
        return _send(await _off(sum(sizes.values()), partial(self._pack, user, answer, keep=keep)))

    async def generate(self, name: str, request: Request) -> Response:
        """Continue texts, and send tokens as they come."""
        served, user = self.find(name), _user_of(request)
        plan, tensors = await self._read(request, user, GeneratePlan)
        check_texts(plan, self._limits)
        come: asyncio.Queue[bytes | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(line: bytes | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(come.put_nowait, line)

        backend = served.backend
        tokens = stream_tokens(backend.subject, plan, tensors, backend.saes)
        ticket = served.thread.start(user, _write_tokens(tokens, plan.new_tokens, tell))
        ticket.future.add_done_callback(lambda _: tell(None))
        job = _Job(user, served.thread, ticket)
        first = await come.get()
        if first is None and (error := ticket.future.exception()):  # refused before the first token: then its status can say so
            raise error
        return StreamingResponse(_stream_lines(first, come, job), media_type=LINES)

    async def strength(self, name: str, written: str, sae: str = "", latent: int = 0, point: str = "", length: float = 1.0) -> Response:
        """Tell the number of a strength."""
        backend = self.find(name).backend
        number = backend.latent_strength(written, sae, latent) if sae else backend.vector_strength(written, point, length)
        return JSONResponse({"strength": number})

    async def read_controls(self, name: str, sae: str, latent: int, seed: int) -> Response:
        """Send what a latent is compared with when it is steered."""
        backend = self.find(name).backend
        self._require_weights()
        return _send(pack_controls(await run_in_threadpool(backend.controls, sae, latent, seed)))

    async def sweep(self, name: str, request: Request) -> Response:
        """Begin a sweep."""
        served, user = self.find(name), _user_of(request)
        plan, tensors = await self._read(request, user, SweepPlan)
        if len(plan.row) > self._limits.tokens or len(plan.points) * len(plan.row) > self._limits.cells:
            what = f"A sweep of {format_count(len(plan.points), 'point')} over {format_count(len(plan.row), 'token')}"
            raise TooLargeError(f"{what} is too large: {self._limits.tokens:,} tokens and {self._limits.cells:,} cells are swept. Name fewer points.")
        source: Any = (
            plan.source if isinstance(plan.source, str) else dict(zip(plan.points, (tensors[tensor.tensor] for tensor in plan.source), strict=True))
        )
        steps = begin_sweep(served.backend.subject, plan.row, plan.points, source, plan.metric, plan.by)
        return self._begin(user, served, steps, lambda found: pack_cells(*found))

    async def reduce(self, name: str, request: Request) -> Response:
        """Begin to reduce."""
        served, user = self.find(name), _user_of(request)
        plan, _ = await self._read(request, user, ReducePlan)
        if (longest := max(map(len, plan.rows))) > self._limits.tokens:
            raise TooLargeError(f"A text has {longest:,} tokens; at most {self._limits.tokens:,} are run at once. Cut it.")
        return self._begin(user, served, reduce_steps(served.backend.subject, plan), pack_reduced)

    def _looking(self, kind: type[BaseModel], begin: Callable[..., Steps]) -> Callable[..., Awaitable[Response]]:
        """Return a route that gets in line with a job of attention, and sends what it returns."""

        async def look(name: str, request: Request) -> Response:
            served, user = self.find(name), _user_of(request)
            asked = read_asked(kind, await _read_body(request, MAX_TEXT))

            def prepare() -> Steps:
                with self._tokenizing:
                    return begin(served.backend, asked, self._limits)

            steps = await run_in_threadpool(prepare)
            found = await _wait(request, _Job(user, served.thread, served.thread.start(user, steps)))
            return _send(found, kind=BYTES) if isinstance(found, list) else JSONResponse(found)

        return look

    def _begin(self, user: str, served: Served, steps: Steps, pack_result: Callable[[Any], list[bytes | memoryview]]) -> Response:
        job = secrets.token_hex(12)
        self._drop_old_jobs()
        self._jobs[job] = _Job(user, served.thread, served.thread.start(user, steps), pack_result)
        return JSONResponse({"job": job}, status_code=202)

    async def follow(self, job: str, request: Request, wait: Annotated[float, Query(ge=0, le=30)] = 0) -> Response:
        """Tell how far a job is."""
        found = self._find_job(job, request)
        if wait and not found.ticket.future.done():
            await asyncio.wait([asyncio.wrap_future(found.ticket.future)], timeout=wait)
        done, of = found.ticket.progress
        return JSONResponse({"job": job, "state": found.ticket.state, "done": done, "of": of})

    async def read_result(self, job: str, request: Request) -> Response:
        """Send what a job gave."""
        found = self._find_job(job, request)
        if not found.ticket.future.done():
            raise InputError(f"The job {job} is still {found.ticket.state}. Ask /api/jobs/{job}?wait=10 for its end.")
        return _send(await run_in_threadpool(found.pack, found.ticket.future.result()))

    async def end(self, job: str, request: Request) -> Response:
        """End a job and forget it."""
        found = self._find_job(job, request)
        found.thread.cancel(found.ticket)
        del self._jobs[job]
        return JSONResponse({"job": job, "state": "cancelled"})

    async def cancel(self, id: str, request: Request) -> Response:  # noqa: A002 - as above
        """Take a run back."""
        found = self._runs.get((_user_of(request), id))
        if found is None:
            raise NotFoundError(f"No run of yours is called {id:.64} here, or it was answered already.")
        found.thread.cancel(found.ticket)
        return JSONResponse({"id": id, "state": "cancelled"})

    async def read_kept(self, digest: str, request: Request) -> Response:
        """Send a tensor that was kept."""
        return _send(pack({}, {"tensor": self._kept.get(_user_of(request), digest)}), request.headers.get("range"))

    async def read_weight(self, name: str, weight: str, request: Request, head: int | None = None) -> Response:
        """Send a copy of a weight."""
        backend = self.find(name).backend
        self._require_weights()
        return _send(pack({}, {"tensor": await run_in_threadpool(backend.weight, weight, head)}), request.headers.get("range"))

    def _require_weights(self) -> None:
        if not self._weights:
            raise NotFoundError("This server sends no weights, nor a latent's direction: it was started with --no-weights.")

    def find(self, name: str) -> Served:
        """Return a model by its short name. Raises `NotFoundError` with the names there are."""
        if name not in self._served:
            raise NotFoundError(f"No model is called {name!r:.200} here; there are {', '.join(self._served)}.")
        return self._served[name]

    def _find_job(self, job: str, request: Request) -> _Job:
        found = self._jobs.get(job)
        if found is None or found.user != _user_of(request):
            raise NotFoundError(f"No job of yours is called {job:.64} here.")
        return found

    def _describe(self, served: Served) -> dict[str, Any]:
        subject, thread = served.backend.subject, served.thread
        facts = served.facts.get("saes", {})
        saes = {
            name: {"hook_point": item.hook_point, "written_at": item.written_at, "d_sae": item.sae.d_sae}
            | {"is_crosscoder": bool(item.more), **facts.get(name, {})}
            for name, item in served.backend.saes.items()
        }
        return {
            **served.facts,
            "name": served.name,
            "type": subject.net.config.model_type,
            "dtype": str(subject.net.dtype).removeprefix("torch."),
            "device": str(subject.device),
            "n_layers": n_layers(subject.net),
            "d_model": subject.d_model,
            "vocabulary": subject.vocabulary_size,
            "max_context": subject.max_context,
            "can_measure": subject.net.get_output_embeddings() is not None,
            "saes": saes,
            "special_tokens": served.backend.special_tokens,
            "stop_tokens": served.backend.stop_tokens,
            "limits": {**self._limits._asdict(), **thread.line._asdict()},
            "queue": {"waiting": thread.n_waiting, "answered": thread.n_answered, "forwards": thread.n_forwards, "stopped": thread.stopped},
        }

    def _write(self, backend: LocalBackend, given: _Texts) -> dict[str, Any]:
        for row in given.ids:
            backend.subject.check_tokens(torch.tensor(row))
        with self._tokenizing:  # tokenizers forbid two calls at once
            chats = backend.chats(given.conversations) if given.conversations else Chats((), ())
            ids = [*backend.tokenize(given.texts, special=given.special), *chats.rows, *given.ids]
            pieces = backend.pieces(ids)
            special = set(backend.special_tokens)
            texts = [backend.decode(row) for row in ids]
        roles = [*[None] * len(given.texts), *chats.roles, *[None] * len(given.ids)]
        marks = [[token in special for token in row] for row in ids]
        return {"ids": ids, "pieces": pieces, "special": marks, "roles": roles, "texts": texts}

    async def _read(self, request: Request, user: str, kind: type[T]) -> tuple[T, dict[str, Tensor]]:
        """Read a plan and its tensors, of which the user may keep some here."""
        content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        body = await _read_body(request, MAX_TEXT if content_type != FILE else None)

        def read() -> tuple[T, dict[str, Tensor]]:
            plan, beside = read_plan(content_type, body, kind)
            return plan, {name.tensor: beside[name.tensor] if name.tensor in beside else self._kept.get(user, name.tensor) for name in plan.tensors()}

        return await _off(len(body), read)

    async def _measure(self, served: Served, user: str, plan: Plan, n_bytes: int) -> dict[str, int]:
        """Return the bytes of an answer; where that takes a forward it gets in line like any other."""
        backend = served.backend
        if not needs_forward(plan):
            return await _off(n_bytes, partial(answer_bytes, backend.subject, plan, backend.saes))

        def steps() -> Any:
            yield (0, 1)
            return answer_bytes(backend.subject, plan, backend.saes)

        return await asyncio.wrap_future(served.thread.start(user, steps()).future)

    def _pack(self, user: str, answer: Answer, *, keep: bool) -> list[bytes | memoryview]:
        if not keep:
            return pack_answer(answer)

        def stay(tensors: Mapping[str, Tensor]) -> dict[str, Kept]:
            names = self._kept.keep(user, tensors.values())
            return {name: Kept(kept, None, _never) for name, kept in zip(tensors, names, strict=True)}

        return pack_answer(Answer(stay(answer.tensors), {name: stay(found) for name, found in answer.derivatives.items()}, answer.batch))

    def _drop_old_jobs(self) -> None:
        """Forget results that nobody fetched for as long as answers are kept."""
        for job, found in list(self._jobs.items()):
            if found.ticket.ended is not None and self._clock() - found.ticket.ended > self._limits.kept_s:
                del self._jobs[job]


def explain(error: InterpError) -> JSONResponse:
    """Return the answer that tells of an error."""
    status, do = next((status, do) for kind, status, do in _STATUSES if isinstance(error, kind))
    told = {"status": status, "what": str(error), "do": do, "kind": type(error).__name__, "op": error.op, "point": error.point}
    if isinstance(error.__cause__, ValidationError):
        place = error.__cause__.errors(include_url=False)[0]["loc"]
        told["op"] = told["op"] or next((str(part) for part in place[2:3]), "")
    headers = {"retry-after": "1"} if isinstance(error, BusyError) else None
    return JSONResponse({"error": {key: value for key, value in told.items() if value}}, status_code=status, headers=headers)


def _answered(answer: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """Let errors be answers."""

    @wraps(answer)
    async def wrapped(**given: Any) -> Response:
        try:
            return await answer(**given)
        except InterpError as error:
            return explain(error)

    return wrapped


def _user_of(request: Request) -> str:
    """Return who asks: by name where tokens have names, else by what the client calls itself, or by its address."""
    name = getattr(request.state, "user", "")
    return name or f"{NAMELESS}{request.headers.get(CLIENT, '')[:64] or getattr(request.client, 'host', '')}"


async def _off(n_bytes: int, do: Callable[[], U]) -> U:
    """Do something in another thread, so that others are answered meanwhile; what is small is done here, which takes less than the change."""
    return do() if n_bytes <= _SMALL else await run_in_threadpool(do)


def _length_of(request: Request) -> int:
    return int(request.headers["content-length"])


async def _read_body(request: Request, most: int | None) -> bytearray:
    """Read a body of the length that the guard has bounded into one buffer. Raises `TooLargeError` beyond `most`."""
    length = _length_of(request)
    if most is not None and length > most:
        raise TooLargeError(f"The JSON has {length:,} bytes; at most {most:,} are read. Send tensors as a safetensors file.")
    body, reached = bytearray(length), 0
    async for piece in request.stream():
        body[reached : reached + len(piece)] = piece
        reached += len(piece)
    return body


async def _wait(request: Request, job: _Job) -> Any:
    """Wait for an answer, and take the request back when its client goes away."""
    answer = asyncio.wrap_future(job.ticket.future)
    gone = asyncio.ensure_future(_leave(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise CancelledError("The client has gone.")
        return answer.result()
    finally:
        job.thread.cancel(job.ticket)
        gone.cancel()


def _never(name: Any) -> Tensor:
    raise NotImplementedError(name)


async def _leave(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _write_tokens(tokens: Generator[Token, None, Generated], of: int, tell: Callable[[bytes], None]) -> Steps:
    """Hand out tokens as lines, a step each, and return the last line."""
    while True:
        try:
            token = next(tokens)
        except StopIteration as end:
            return json.dumps({"generated": dump_generated(end.value)}).encode() + b"\n"
        tell(json.dumps({"token": token}).encode() + b"\n")
        yield token.place + 1, of


async def _stream_lines(first: bytes | None, come: "asyncio.Queue[bytes | None]", job: _Job) -> AsyncIterator[bytes]:
    line = first
    try:
        while line is not None:
            yield line
            line = await come.get()
        error = job.ticket.future.exception()
        if error is not None and not isinstance(error, InterpError):
            raise error
        yield bytes(explain(error).body) + b"\n" if error else job.ticket.future.result()
    finally:
        job.thread.cancel(job.ticket)


def _send(pieces: Sequence[bytes | memoryview], wanted: str | None = None, *, kind: str = FILE) -> Response:
    """Answer with a file, or with the range of it that is wanted."""
    total = sum(map(len, pieces))
    headers = {"accept-ranges": "bytes", "cache-control": "no-store"}
    try:
        span = parse_range(wanted, total)
    except ValueError:
        return Response(status_code=416, headers={**headers, "content-range": f"bytes */{total}"})
    start, n_bytes = span or (0, total)
    if span:
        headers["content-range"] = f"bytes {start}-{start + n_bytes - 1}/{total}"
    headers["content-length"] = str(n_bytes)
    status = 206 if span else 200
    if n_bytes <= _PIECE:
        return Response(b"".join(_cut(pieces, start, n_bytes)), status_code=status, headers=headers, media_type=kind)
    return StreamingResponse(_stream(pieces, start, n_bytes), status_code=status, headers=headers, media_type=kind)


def _cut(pieces: Sequence[bytes | memoryview], start: int, n_bytes: int) -> list[memoryview]:
    """Return the bytes of a range, in pieces that are sent one by one."""
    found, stop, offset = [], start + n_bytes, 0
    for piece in pieces:
        view = memoryview(piece)
        first, last = max(start - offset, 0), min(stop - offset, len(view))
        found += [view[place : min(place + _PIECE, last)] for place in range(first, last, _PIECE)]
        offset += len(view)
    return found


async def _stream(pieces: Sequence[bytes | memoryview], start: int, n_bytes: int) -> AsyncIterator[memoryview]:
    for piece in _cut(pieces, start, n_bytes):
        yield piece
