"""Bundles become a web site: the built pages, the bundles' files by range, and a small JSON interface for lists.

    GET /                                   the pages (static files built from `frontend/`)
    GET /api/bundles                        every bundle that is served, with what is wrong with those that cannot be shown
    GET /api/bundles/{name}                 description, columns, distributions
    GET /api/bundles/{name}/features        rows of the list: sort, descending, life, filter (repeated), q, offset, limit
    GET /api/bundles/{name}/rows            rows of the named latents: latent (repeated)
    GET /api/bundles/{name}/place           where `latent` stands in that list, and its neighbours there
    GET /bundles/{name}/{file}              a file of the bundle: Range, ETag, verified against the manifest

A feature page needs only the last one, so it works on any static host too. Errors are JSON: what is wrong, and what to do.
`guard.py` decides who may ask; credentials and stores come from the caller.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from interp_assets.errors import ArtifactError, ConfigError, InputError, InterpError, StoreError
from interp_assets.web import table
from interp_assets.web.files import file_response
from interp_assets.web.guard import LOOPBACK, Guard
from interp_assets.web.opened import BrokenBundle, BundlePlace, OpenBundle, open_bundle

STATIC: Final = Path(__file__).parent / "static"
"""The built pages; `frontend/build.py` makes them, wheels carry them."""
DEFAULT_PORT: Final = 8420
_BUILD_HINT: Final = "python frontend/build.py"
_LISTED: Final = ("is_synthetic", "pipeline", "model", "hook_point", "sae", "d_sae", "n_live", "evaluation", "tokens_scanned")


class NotFoundError(InterpError):
    """The address names nothing that is served."""


def make_app(bundles: Sequence[BundlePlace], *, token: str | None = None, hosts: Sequence[str] = (), static: Path = STATIC) -> FastAPI:
    """Make the web application for `bundles`.

    `token` is asked for from everyone when set; `hosts` are names that requests may use besides the loopback ones (`"*"`: any, only
    sensible with a token). `static` is the folder of the built pages.
    """
    app = FastAPI(title="interp-assets feature browser", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")
    opened = {place.name: open_bundle(place) for place in bundles}
    _add_errors(app)
    _add_lists(app, opened)
    _add_files(app, opened)
    _add_pages(app, static)
    app.add_middleware(Guard, token=token, hosts=tuple(hosts))
    return app


def serve(
    bundles: Sequence[BundlePlace], *, host: str = "127.0.0.1", port: int = DEFAULT_PORT, token: str | None = None, hosts: Sequence[str] = ()
) -> None:
    """Serve until interrupted. Raises `ConfigError` when `host` is not a loopback address and no token protects it."""
    check_bind(host, token)
    allowed = tuple(hosts) or (("*",) if token else ())
    uvicorn.run(make_app(bundles, token=token, hosts=allowed), host=host, port=port, log_level="warning", access_log=False, server_header=False)


def check_bind(host: str, token: str | None) -> None:
    """Refuse to open the server to other machines without a token. Raises `ConfigError`."""
    if host not in LOOPBACK and not token:
        raise ConfigError(
            f"Serving on {host} would let every machine that reaches this one read the bundles. Give --token (any long random text), "
            "or stay on 127.0.0.1 and use an SSH tunnel."
        )


def _add_lists(app: FastAPI, bundles: dict[str, OpenBundle | BrokenBundle]) -> None:
    @app.get("/api/bundles")
    def list_all() -> dict[str, Any]:
        return {"bundles": [_summary(bundle) for bundle in bundles.values()]}

    @app.get("/api/bundles/{name}")
    def describe(name: str) -> dict[str, Any]:
        return {"name": name, **_find(bundles, name).description}

    @app.get("/api/bundles/{name}/features")
    def list_features(
        name: str, request: Request, offset: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=1, le=table.MAX_ROWS)] = 100
    ) -> dict[str, Any]:
        page = _find(bundles, name).table().page(_read_query(request), offset, limit)
        return {**page._asdict(), "offset": offset}

    @app.get("/api/bundles/{name}/rows")
    def list_rows(name: str, latent: Annotated[list[int], Query()]) -> dict[str, Any]:
        return {"rows": _find(bundles, name).table().rows(latent)}

    @app.get("/api/bundles/{name}/place")
    def find_place(name: str, request: Request, latent: Annotated[int, Query(ge=0)]) -> dict[str, Any]:
        return _find(bundles, name).table().place(_read_query(request), latent)._asdict()


def _add_files(app: FastAPI, bundles: dict[str, OpenBundle | BrokenBundle]) -> None:
    @app.api_route("/bundles/{name}/{file:path}", methods=["GET", "HEAD"])
    def send_file(name: str, file: str, request: Request) -> Response:
        bundle = _find(bundles, name)
        if bundle.size(file) is None:  # only what the manifest lists is ever opened
            raise NotFoundError(f"Bundle {name!r} has no file {file!r:.200}. Its manifest lists {len(bundle.manifest.files)} files.")
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


def _find(bundles: dict[str, OpenBundle | BrokenBundle], name: str) -> OpenBundle:
    bundle = bundles.get(name)
    if bundle is None:
        raise NotFoundError(f"No bundle is called {name!r:.200}. This server has {len(bundles)}: {', '.join(list(bundles)[:10])}.")
    if isinstance(bundle, BrokenBundle):
        raise ArtifactError(bundle.reason)
    return bundle


def _summary(bundle: OpenBundle | BrokenBundle) -> dict[str, Any]:
    if isinstance(bundle, BrokenBundle):
        return {"name": bundle.name, "error": {"what": bundle.reason, "do": ""}}
    described = {key: bundle.description.get(key) for key in _LISTED}
    return {"name": bundle.name, "created": bundle.manifest.created, "n_bytes": bundle.manifest.n_bytes, **described}


def _read_query(request: Request) -> table.Query:
    given = request.query_params
    is_descending = given.get("descending", "false").lower() in ("1", "true")
    filters = tuple(given.getlist("filter"))
    return table.Query(given.get("sort", "latent"), is_descending, given.get("life", "all"), filters, given.get("q", ""))
