"""Bundles become a web site: the built pages, the bundles' files by range, and a small JSON interface for lists.

    GET /                                   the pages (static files built from `frontend/`)
    GET /site.json, /api/bundles            every bundle that is served, with what is wrong with those that cannot be shown
    GET /api/bundles/{name}                 description, columns, distributions
    GET /api/bundles/{name}/features        rows of the list: sort, descending, life, filter (repeated), q, offset, limit
    GET /api/bundles/{name}/rows            rows of the named latents: latent (repeated)
    GET /api/bundles/{name}/place           where `latent` stands in that list, and its neighbours there
    GET /api/bundles/{name}/labels          what was imported about `latent`, with provenance
    GET /api/bundles/{name}/notes           lists and notes, kept in a local file
    GET /api/bundles/{name}/try             the features that fire on `text`, and how `latent` does, where model and SAE are at hand
    PUT /api/bundles/{name}/notes/{latent}  set the note of one latent, and the lists that it stands in
    GET /bundles/{name}/{file}              a file of the bundle: Range, ETag, verified against the manifest
    GET /sweeps/{name}.json                 the SAEs of a pipeline beside each other, as they are now
    /api/models, /api/runs, /api/jobs, ...  models, where some are served: `models.py`

A feature page needs only files of the bundle, so it works on any static host too. Errors are JSON: what is wrong, and what to do.
`guard.py` decides who may ask; credentials and stores come from the caller.
"""

import ctypes
import html
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from numpy.typing import NDArray
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from interp_assets.errors import ArtifactCorruptError, ArtifactError, ConfigError, InputError, InterpError, NotFoundError, StoreError
from interp_assets.planning.progress import format_count
from interp_assets.storage.store import Store
from interp_assets.web import table
from interp_assets.web.comparison import Comparisons, find_pipelines
from interp_assets.web.connections import make_server
from interp_assets.web.files import file_response
from interp_assets.web.guard import LOOPBACK, Guard
from interp_assets.web.notes import Notebook
from interp_assets.web.opened import BrokenBundle, BundlePlace, OpenAttention, OpenBundle, open_bundle

STATIC: Final = Path(__file__).parent / "static"
"""The built pages; `frontend/build.py` makes them, wheels carry them."""
DEFAULT_PORT: Final = 8420
_logger = logging.getLogger(__name__)
_M_MMAP_THRESHOLD: Final = -3
"""`mallopt`'s number in <malloc.h>."""
_BUILD_HINT: Final = "python frontend/build.py"
_LISTED: Final = ("is_synthetic", "pipeline", "model", "hook_point", "sae", "d_sae", "n_live", "evaluation", "corpus", "tokens_scanned")


Bundles = dict[str, OpenBundle | OpenAttention | BrokenBundle]


@runtime_checkable
class Asker(Protocol):
    """Answers which features fire on a text."""

    def ask(self, text: str, latent: int | None = None) -> dict[str, Any]:
        """Run a text; of `latent` it is told how it fires, however weakly."""
        ...


@runtime_checkable
class Routes(Protocol):
    """Adds routes to the application."""

    def add(self, app: FastAPI) -> None:
        """Add them."""
        ...


class Desk(NamedTuple):
    """What a server has besides bundles."""

    notes: Path | None = None
    """The folder of lists and notes; None: pages keep none."""
    examples: Mapping[str, Asker] = {}
    """Model and SAE of some bundles, by name."""
    models: Routes | None = None
    """Models that notebooks ask (`models.py`, which brings transformers and is imported by who serves some)."""
    pipelines: Mapping[str, Store] = {}
    """Folders of pipelines whose SAEs are compared, by name, besides those that bundles lie in."""
    users: Mapping[str, str] = {}
    """Who may ask: names with the SHA-256 of their tokens."""


NO_DESK: Final = Desk()


class Change(BaseModel):
    """What a page sends about one latent."""

    note: str = ""
    lists: list[str] = []


def make_app(
    bundles: Sequence[BundlePlace], *, token: str | None = None, hosts: Sequence[str] = (), static: Path = STATIC, desk: Desk = NO_DESK
) -> FastAPI:
    """Make the web application for `bundles`. `desk` is what there is besides them.

    `token` is asked for from everyone when set; `hosts` are names that requests may use besides the loopback ones (`"*"`: any, only
    sensible with a token). `static` is the folder of the built pages.
    """
    app = FastAPI(title="interp-assets feature browser", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")
    opened = {place.name: open_bundle(place) for place in bundles}
    _add_errors(app)
    notebooks = {name: Notebook(desk.notes, name) for name in opened} if desk.notes else {}
    desk = desk._replace(pipelines={**find_pipelines(bundles), **desk.pipelines})
    _add_lists(app, opened, notebooks, desk)
    _add_comparisons(app, desk.pipelines)
    _add_notes(app, opened, notebooks)
    _add_files(app, opened)
    if desk.models:
        desk.models.add(app)
    _add_pages(app, static)
    app.add_middleware(Guard, token=token, hosts=tuple(hosts), users=desk.users)
    return app


def serve(
    bundles: Sequence[BundlePlace],
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    token: str | None = None,
    hosts: Sequence[str] = (),
    desk: Desk = NO_DESK,
) -> None:
    """Serve until interrupted. Raises `ConfigError` when `host` is not a loopback address and no token protects it."""
    check_bind(host, token, desk.users)
    allowed = tuple(hosts) or (("*",) if token or desk.users else ())
    app = make_app(bundles, token=token, hosts=allowed, desk=desk)
    return_large_memory()
    make_server(app, host, port).run()


def return_large_memory() -> bool:
    """Have the C library give pieces above a megabyte back as soon as they are freed; answer whether it does (glibc).

    By itself it keeps pieces of up to 32 MB for reuse, in as many heaps as there are threads: a server of ten million features grew to 540 MB
    and more, of which half was in use. With the limit fixed it stays at 260 MB, and no slower.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20))


def check_bind(host: str, token: str | None, users: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuse to open the server to other machines without a token. Raises `ConfigError`."""
    if host not in LOOPBACK and not token and not users:
        raise ConfigError(
            f"Serving on {host} would answer every machine that reaches this one. Set INTERP_TOKEN, or name a file with --token-file, to a long "
            "random text that is asked for, or one of users with --users, or stay on 127.0.0.1 and use an SSH tunnel."
        )


def _add_notes(app: FastAPI, bundles: Bundles, notebooks: dict[str, Notebook]) -> None:
    @app.get("/api/bundles/{name}/notes")
    @_explained
    def read_notes(name: str) -> dict[str, Any]:
        _find(bundles, name)
        return notebooks[name].read() if name in notebooks else {"file": None, "lists": {}, "notes": {}}

    @app.put("/api/bundles/{name}/notes/{latent}")
    @_explained
    def change_notes(name: str, latent: Annotated[int, PathParameter(ge=0)], change: Change) -> dict[str, Any]:
        d_sae = _find(bundles, name).description["d_sae"]
        if latent >= d_sae:
            raise InputError(f"There is no feature {latent:,}: the SAE has {d_sae:,}.")
        if name not in notebooks:
            raise InputError("This server keeps no notes: start `interp serve` with --notes FOLDER.")
        return notebooks[name].change(latent, change.note, change.lists)


def _add_lists(app: FastAPI, bundles: Bundles, notebooks: dict[str, Notebook], desk: Desk) -> None:
    examples = desk.examples

    @app.get("/api/bundles")
    @app.get("/site.json")
    def list_all() -> dict[str, Any]:
        can_try = {name: name in examples for name in bundles}
        told = {"mode": "server", "notes": bool(notebooks), "models": desk.models is not None, "examples": can_try, "sweeps": list(desk.pipelines)}
        return {**told, "bundles": [summarize(bundle) for bundle in bundles.values()]}

    @app.get("/api/bundles/{name}")
    @_explained
    def describe(name: str) -> dict[str, Any]:
        bundle = _find(bundles, name)
        columns = {**bundle.description["columns"], "labels": "label" in bundle.table().sortable}
        return {"name": name, **bundle.description, "columns": columns}

    @app.get("/api/bundles/{name}/try")
    @_explained
    def run_text(name: str, text: str, latent: Annotated[int | None, Query(ge=0)] = None) -> dict[str, Any]:
        d_sae = _find(bundles, name).description["d_sae"]
        if latent is not None and latent >= d_sae:
            raise InputError(f"There is no feature {latent:,}: the SAE has {d_sae:,}.")
        if name not in examples:
            raise InputError("Model and SAE of this bundle are not at hand: start `interp serve` with the pipeline's --config, beside its artifacts.")
        return examples[name].ask(text) if latent is None else examples[name].ask(text, latent)

    @app.get("/api/bundles/{name}/labels")
    @_explained
    def list_labels(name: str, latent: Annotated[int, Query(ge=0)]) -> dict[str, Any]:
        return {"labels": _find(bundles, name).table().labels([latent]).get(latent, [])}

    @app.get("/api/bundles/{name}/features")
    @_explained
    def list_features(
        name: str, request: Request, offset: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=1, le=table.MAX_ROWS)] = 100
    ) -> dict[str, Any]:
        bundle = _find(bundles, name)
        page = bundle.table().page(_read_query(request), offset, limit, _listed(bundle, notebooks, request))
        return {**page._asdict(), "offset": offset}

    @app.get("/api/bundles/{name}/rows")
    @_explained
    def list_rows(name: str, latent: Annotated[list[int], Query()]) -> dict[str, Any]:
        return {"rows": _find(bundles, name).table().rows(latent)}

    @app.get("/api/bundles/{name}/place")
    @_explained
    def find_place(name: str, request: Request, latent: Annotated[int, Query(ge=0)]) -> dict[str, Any]:
        bundle = _find(bundles, name)
        return bundle.table().place(_read_query(request), latent, _listed(bundle, notebooks, request))._asdict()


def _add_comparisons(app: FastAPI, pipelines: Mapping[str, Store]) -> None:
    comparisons = Comparisons(pipelines)

    @app.get("/sweeps/{name}.json")
    @_explained
    def compare(name: str, request: Request) -> Response:
        stamp, content = comparisons.find(name)
        headers = {"etag": f'"{stamp}"', "cache-control": "private, no-cache"}
        if headers["etag"] in [item.strip().removeprefix("W/") for item in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type="application/json", headers=headers)


def _add_files(app: FastAPI, bundles: Bundles) -> None:
    @app.api_route("/bundles/{name}/{file:path}", methods=["GET", "HEAD"])
    @_explained
    def send_file(name: str, file: str, request: Request) -> Response:
        bundle = _find_any(bundles, name)
        if bundle.size(file) is None:  # only what the manifest lists is ever opened
            raise NotFoundError(f"Bundle {name!r} has no file {file!r:.200}. Its manifest lists {format_count(len(bundle.manifest.files), 'file')}.")
        return file_response(bundle, file, request)


def _add_pages(app: FastAPI, static: Path) -> None:
    if (static / "index.html").exists():
        app.mount("/", StaticFiles(directory=static, html=True))
        return

    @app.get("/")
    def explain() -> HTMLResponse:
        title = "The pages are not built"
        text = f"{title}: run <code>{html.escape(_BUILD_HINT)}</code> in the checkout, then start the server again. The interface under /api works."
        return HTMLResponse(f"<!doctype html><html lang=en><title>{title}</title><p>{text}</p></html>", status_code=503)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(InterpError)
    def explain(_: Request, error: Exception) -> JSONResponse:
        status = 404 if isinstance(error, NotFoundError) else 400 if isinstance(error, InputError) else 502
        if isinstance(error, ArtifactError | StoreError):
            return _problem(status, str(error), "Run `interp verify` on the bundle's folder and materialize `feature_browser` again.")
        return _problem(status, str(error), "Go back to the list of bundles." if status == 404 else "Change the query.")

    @app.exception_handler(RequestValidationError)
    def explain_query(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        lines = [f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in error.errors()]
        return _problem(400, f"The query is wrong: {'; '.join(lines)}.", "Change the query.")

    @app.exception_handler(HTTPException)
    def explain_status(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _problem(error.status_code, f"{error.detail}.", "Check the address; the pages start at /.")

    @app.exception_handler(Exception)
    def explain_bug(_: Request, error: Exception) -> JSONResponse:
        return _problem(500, f"The server met an error it did not expect: {type(error).__name__}: {error}", "Look at its terminal, and report it.")


def _problem(status: int, what: str, do: str) -> JSONResponse:
    return JSONResponse({"error": {"status": status, "what": what, "do": do}}, status_code=status)


def _explained(answer: Callable[..., Any]) -> Callable[..., Response]:
    """Let whatever goes wrong with one bundle be its fault, named as such: bundles come from elsewhere, and may be wrong in any way."""

    @wraps(answer)
    def wrapped(**given: Any) -> Response:
        try:
            made = answer(**given)
            return made if isinstance(made, Response) else JSONResponse(made)  # here, because not everything is JSON
        except InterpError:
            raise
        except Exception as error:
            _logger.exception("The bundle %s cannot be read", given["name"])
            what = f"The bundle {given['name']!r:.200} cannot be read here ({type(error).__name__}: {error!s:.200})."
            raise ArtifactCorruptError(what) from error

    return wrapped


def _find(bundles: Bundles, name: str) -> OpenBundle:
    bundle = _find_any(bundles, name)
    if isinstance(bundle, OpenAttention):
        raise NotFoundError(f"The bundle {name!r:.200} is of attention heads: it has no features. Its files lie under /bundles/.")
    return bundle


def _find_any(bundles: Bundles, name: str) -> OpenBundle | OpenAttention:
    bundle = bundles.get(name)
    if bundle is None:
        raise NotFoundError(f"No bundle is called {name!r:.200}. This server has {len(bundles)}: {', '.join(list(bundles)[:10])}.")
    if isinstance(bundle, BrokenBundle):
        raise ArtifactError(bundle.reason)
    return bundle


def summarize(bundle: OpenBundle | OpenAttention | BrokenBundle) -> dict[str, Any]:
    """Return what the first page shows of a bundle."""
    if isinstance(bundle, BrokenBundle):
        return {"name": bundle.name, "error": {"what": bundle.reason, "do": ""}}
    told = {"name": bundle.name, "created": bundle.manifest.created, "n_bytes": bundle.manifest.n_bytes}
    if isinstance(bundle, OpenAttention):
        layers = bundle.description["layers"]
        counted = {"n_layers": len(layers), "n_heads": sum(layer["n_heads"] for layer in layers), "n_prompts": len(bundle.description["prompts"])}
        return {
            **told,
            "kind": "attention",
            **{key: bundle.description.get(key) for key in ("is_synthetic", "pipeline", "model", "corpus")},
            **counted,
        }
    return {**told, "kind": "features", **{key: bundle.description.get(key) for key in _LISTED}}


def _listed(bundle: OpenBundle, notebooks: dict[str, Notebook], request: Request) -> NDArray[np.bool_] | None:
    """Mark the latents of the person's list that the query names."""
    wanted = request.query_params.get("list")
    if wanted is None:
        return None
    lists = notebooks[bundle.name].read()["lists"] if bundle.name in notebooks else {}
    if wanted not in lists:
        raise InputError(f"There is no list called {wanted!r:.80}; there are {', '.join(lists) or 'none'}.")
    mask = np.zeros(bundle.description["d_sae"], bool)
    mask[[latent for latent in lists[wanted] if latent < len(mask)]] = True
    return mask


def _read_query(request: Request) -> table.Query:
    given = request.query_params
    is_descending = given.get("descending", "false").lower() in ("1", "true")
    filters = tuple(given.getlist("filter"))
    return table.Query(given.get("sort", "latent"), is_descending, given.get("life", "all"), filters, given.get("q", ""))
