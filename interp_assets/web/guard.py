"""Every request passes here first: who may ask, from where, how much, and what a page may load.

A server on one's own machine is reachable by every page open in the same browser, so

1. `Host` must be a name of this machine (or one that was named): a foreign site cannot rebind its name to the loopback address;
2. `Origin`, where a browser sends one, must be the server itself;
3. when a token is set, it must come as `Authorization: Bearer`, as `?token=` (which is turned into a cookie and removed from the
   address), or as that cookie, which holds a hash of it; all are compared in constant time;
4. an address longer than `MAX_QUERY_BYTES` is refused, and a body longer than `MAX_BODY_BYTES`, or of unknown length;
5. every answer carries a content security policy under which nothing but the server's own files is loaded and no inline script runs.

Written as plain ASGI, so that streamed answers stay streams.
"""

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_QUERY_BYTES: Final = 4096
MAX_BODY_BYTES: Final = 64 << 10
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
COOKIE: Final = "interp_token"
SECURITY_HEADERS: Final = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


class Guard:
    """Refuses requests that must not be answered; adds the security headers to all others."""

    def __init__(self, app: App, token: str | None, hosts: tuple[str, ...]) -> None:
        """Guard `app`. `hosts` are allowed besides the loopback names; `"*"` allows any and is for servers with a token."""
        self._app, self._token = app, token or None
        self._hosts = {*LOOPBACK, *hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # nothing here speaks WebSocket
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refuse(scope, headers)
        if refusal:
            await _answer(send, *refusal)
        elif self._wants_cookie(scope):
            await _redirect(send, scope, self._token or "")
        else:
            await self._app(scope, receive, _with_headers(send))

    def _refuse(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        """Return status, what and what to do, or None when the request is welcome."""
        host = headers.get("host", "")
        if "*" not in self._hosts and _host_name(host) not in self._hosts:
            do = "Open the address that `interp serve` printed, or name the host with --host-name."
            return 421, f"This server does not answer for the host {host!r:.100}.", do
        origin = headers.get("origin")
        if origin is not None and _network_location(origin) != host:
            return 403, f"A page of {origin!r:.100} may not read from this server.", "Open the browser pages of this server itself."
        if len(scope["query_string"]) > MAX_QUERY_BYTES:
            what = f"The query has {len(scope['query_string']):,} bytes, at most {MAX_QUERY_BYTES:,} are read."
            return 414, what, "Ask for less: a shorter search, fewer filters."
        if scope["method"] not in ("GET", "HEAD") and not _is_small(headers.get("content-length", "")):
            return 413, f"What is sent needs a Content-Length of at most {MAX_BODY_BYTES:,} bytes.", "Send less."
        if self._token is not None and not self._is_known(scope, headers):
            return 401, "This server asks for its token.", "Open the address that `interp serve` printed; it ends in ?token=..."
        return None

    def _is_known(self, scope: Scope, headers: dict[str, str]) -> bool:
        token = self._token or ""
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        if cookie and hmac.compare_digest(cookie.value.encode(), _cookie_value(token).encode()):
            return True
        given = (headers.get("authorization", "").removeprefix("Bearer "), _query_token(scope) or "")
        return any(hmac.compare_digest(text.encode(), token.encode()) for text in given)

    def _wants_cookie(self, scope: Scope) -> bool:
        return self._token is not None and scope["method"] == "GET" and _query_token(scope) is not None


def _is_small(length: str) -> bool:
    return length.isdigit() and len(length) < 10 and int(length) <= MAX_BODY_BYTES


def _query_token(scope: Scope) -> str | None:
    return dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("token")


def _cookie_value(token: str) -> str:
    return hashlib.blake2b(token.encode(), digest_size=24, person=b"interp-cookie").hexdigest()


def _host_name(host: str) -> str:
    """Return the name of a `Host` header: without port and without the brackets of an IPv6 address."""
    name = urlsplit(f"//{host}").hostname if host.count("[") == host.count("]") <= 1 else None
    return name or ""


def _with_headers(send: Send) -> Send:
    async def wrapped(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *SECURITY_HEADERS]
        await send(message)

    return wrapped


async def _answer(send: Send, status: int, what: str, do: str) -> None:
    body = json.dumps({"error": {"status": status, "what": what, "do": do}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *SECURITY_HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _redirect(send: Send, scope: Scope, token: str) -> None:
    """Keep the token in a cookie and take it out of the address, so that it does not end in histories and screenshots."""
    rest = [(name, value) for name, value in parse_qsl(scope["query_string"].decode("latin-1")) if name != "token"]
    path = "/" + scope.get("raw_path", scope["path"].encode()).split(b"?")[0].decode("latin-1").lstrip("/")
    location = path + (f"?{urlencode(rest)}" if rest else "")
    cookie = f"{COOKIE}={_cookie_value(token)}; HttpOnly; SameSite=Strict; Path=/"
    headers = [(b"location", location.encode()), (b"set-cookie", cookie.encode()), (b"content-length", b"0"), *SECURITY_HEADERS]
    await send({"type": "http.response.start", "status": 303, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _network_location(origin: str) -> str:
    """Return host and port of an Origin header; a malformed one is nobody's."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
