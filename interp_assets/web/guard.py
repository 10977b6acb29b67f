"""Every request passes here first: who may ask, from where, how much, and what a page may load.

A server on one's own machine is reachable by every page open in the same browser, so

1. `Host` must be a name of this machine (or one that was named): a foreign site cannot rebind its name to the loopback address;
2. `Origin`, where a browser sends one, must be the server itself, and so must `Sec-Fetch-Site`; another page may hold a link to a page
   here, and nothing else. WebSockets are asked the same;
3. what is not a GET must be JSON of a stated and limited length: a form of another site cannot send that without asking first. Below
   `Rules.messages` it may be a safetensors file too, and longer. A DELETE sends nothing. Where a GET could do what a POST does
   (`Rules.posted`), it is refused;
4. when there are tokens, one or one a user, one of them must come as `Authorization: Bearer`, as `?token=` (which is turned into a cookie and
   removed from the address), or as that cookie, which holds a hash of it; all are compared in constant time. The application finds in the
   request's state whose it was;
5. an address longer than `Rules.query_bytes` is refused;
6. every answer carries `Rules.headers`: here a content security policy under which nothing but the server's own files is loaded and no
   inline script runs.

Written as plain ASGI, so that streamed answers stay streams. Dagster's UI stands behind the same guard (`graph/ui.py`).
"""

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_QUERY_BYTES: Final = 4096
MAX_BODY_BYTES: Final = 64 << 10
MAX_MESSAGE_BYTES: Final = 64 << 20
MESSAGE_TYPES: Final = ("application/json", "application/safetensors")
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
COOKIE: Final = "interp_token"
SECURITY_HEADERS: Final = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


class Rules(NamedTuple):
    """What differs between the applications behind a guard."""

    headers: tuple[tuple[bytes, bytes], ...] = SECURITY_HEADERS
    query_bytes: int = MAX_QUERY_BYTES
    body_bytes: int = MAX_BODY_BYTES
    messages: str = ""
    """Addresses that begin so take messages of up to `MAX_MESSAGE_BYTES`; none where it is empty."""
    posted: tuple[str, ...] = ()
    """Paths whose GET is refused, unless it asks for a page."""
    command: str = "interp serve"
    """What a person types to start the server."""


BROWSER: Final = Rules(messages="/api/models/")
"""The rules of the feature browser."""


class Guard:
    """Refuses requests that must not be answered; adds the security headers to all others."""

    def __init__(
        self, app: App, token: str | None, hosts: tuple[str, ...], rules: Rules = BROWSER, users: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Guard `app`. `hosts` are allowed besides the loopback names; `"*"` allows any and is for servers with a token.

        `users` are names with the SHA-256 of their tokens, in hexadecimal; the one `token` is nobody's in particular.
        """
        self._app, self._rules = app, rules
        self._users = {**users, **({"": hash_token(token)} if token else {})}
        self._hosts = {*LOOPBACK, *hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = _read_headers(scope)
        refusal = self._refuse(scope, headers)
        if refusal and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it was accepted: the client sees 403
        elif refusal:
            await _answer(send, self._rules.headers, *refusal)
        elif scope["type"] == "http" and scope["method"] == "GET" and self._users and (token := _query_token(scope)) is not None:
            await _redirect(send, self._rules.headers, scope, token)
        else:
            scope.setdefault("state", {})["user"] = self._find_user(scope, headers) or ""
            await self._app(scope, receive, _with_headers(send, self._rules.headers))

    def _refuse(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        """Return status, what and what to do, or None when the request is welcome."""
        host, rules = headers.get("host", ""), self._rules
        if "*" not in self._hosts and _host_name(host) not in self._hosts:
            do = f"Open the address that `{rules.command}` printed. Under other names only a server with a token answers."
            return 421, f"This server does not answer for the host {host!r:.100}.", do
        if not _is_own(scope, headers, host):
            what = f"A page of {headers.get('origin', 'another site')!r:.100} may not ask this server."
            return 403, what, "Open the pages of this server itself."
        if len(scope["query_string"]) > rules.query_bytes:
            what = f"The query has {len(scope['query_string']):,} bytes, at most {rules.query_bytes:,} are read."
            return 414, what, "Ask for less: a shorter search, fewer filters."
        return self._refuse_method(scope, headers) or self._ask_for_token(scope, headers)

    def _refuse_method(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        rules = self._rules
        if scope["type"] == "websocket":
            return None
        if scope["method"] in ("GET", "HEAD"):
            if scope["path"].rstrip("/") in rules.posted and "text/html" not in headers.get("accept", ""):
                return 405, f"{scope['path']:.100} takes no GET: any page could send one.", "Send a POST of JSON."
            return None
        if scope["method"] == "DELETE" and not {"content-length", "transfer-encoding"} & set(headers):
            return None
        takes_messages = bool(rules.messages) and scope["path"].startswith(rules.messages)
        limit = MAX_MESSAGE_BYTES if takes_messages else rules.body_bytes
        if not _is_small(headers.get("content-length", ""), limit):
            return 413, f"What is sent needs a Content-Length of at most {limit:,} bytes.", "Send less."
        kinds = MESSAGE_TYPES if takes_messages else MESSAGE_TYPES[:1]
        if headers.get("content-type", "").split(";")[0].strip().lower() not in kinds:
            words = "JSON or a safetensors file" if takes_messages else "JSON"
            do = f"Send Content-Type: {' or '.join(kinds)}."
            return 415, f"What is sent must be {words}, and not {headers.get('content-type', '')!r:.100}.", do
        return None

    def _ask_for_token(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        if not self._users or self._find_user(scope, headers) is not None:
            return None
        do = "Open the address once with ?token=THE_TOKEN at its end, or send it as `Authorization: Bearer THE_TOKEN`."
        return 401, f"This server asks for the token that `{self._rules.command}` was started with.", do

    def _find_user(self, scope: Scope, headers: dict[str, str]) -> str | None:
        """Return whose token was sent; None for nobody's."""
        given = [hash_token(text) for text in (headers.get("authorization", "").removeprefix("Bearer "), _query_token(scope) or "") if text]
        header, found = headers.get("cookie", ""), None
        for user, wanted in self._users.items():
            name, value = _make_cookie(wanted)
            is_known = any(hmac.compare_digest(text.encode(), value.encode()) for text in _cookies(header, name))
            if is_known or any(hmac.compare_digest(text, wanted) for text in given):
                found = user
        return found


def hash_token(token: str) -> str:
    """Return the SHA-256 of a token, in hexadecimal: what a file of users holds, and `printf %s TOKEN | sha256sum` prints."""
    return hashlib.sha256(token.encode()).hexdigest()


def _read_headers(scope: Scope) -> dict[str, str]:
    """Return the headers by lower-case name; what was sent twice is joined, and then equals nothing that is allowed."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}{';' if name == 'cookie' else ','} {value}" if name in headers else value
    return headers


def _is_own(scope: Scope, headers: dict[str, str], host: str) -> bool:
    """Say whether a page of this server asks, or a person, or a program that is no browser."""
    origin = headers.get("origin")
    if origin is not None and _network_location(origin) != host:
        return False
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return True
    is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return is_link and scope.get("method") in ("GET", "HEAD")


def _cookies(header: str, name: str) -> list[str]:
    """Return the values of our cookie. Not by `http.cookies`, which stops at the first one of another application that it does not like."""
    pairs = (item.strip().partition("=") for item in header.split(";"))
    return [value for key, _, value in pairs if key == name]


def _is_small(length: str, limit: int) -> bool:
    return length.isascii() and length.isdigit() and len(length) < 10 and int(length) <= limit


def _query_token(scope: Scope) -> str | None:
    return dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("token")


def _make_cookie(hashed: str) -> tuple[str, str]:
    """Return name and value for a token's hash. Cookies know no ports: with a piece of the hash in the name, two servers of a host keep one each."""
    value = hashlib.blake2b(hashed.encode(), digest_size=24, person=b"interp-cookie").hexdigest()
    return f"{COOKIE}_{value[:8]}", value[8:]


def _host_name(host: str) -> str:
    """Return the name of a `Host` header: without port and without the brackets of an IPv6 address."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _with_headers(send: Send, headers: tuple[tuple[bytes, bytes], ...]) -> Send:
    async def wrapped(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *headers]
        await send(message)

    return wrapped


async def _answer(send: Send, security: tuple[tuple[bytes, bytes], ...], status: int, what: str, do: str) -> None:
    body = json.dumps({"error": {"status": status, "what": what, "do": do}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *security]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _redirect(send: Send, security: tuple[tuple[bytes, bytes], ...], scope: Scope, token: str) -> None:
    """Keep the token in a cookie and take it out of the address, so that it does not end in histories and screenshots."""
    rest = [(name, value) for name, value in parse_qsl(scope["query_string"].decode("latin-1")) if name != "token"]
    path = "/" + scope.get("raw_path", scope["path"].encode()).split(b"?")[0].decode("latin-1").lstrip("/")
    location = path + (f"?{urlencode(rest)}" if rest else "")
    cookie = f"{'='.join(_make_cookie(hash_token(token)))}; HttpOnly; SameSite=Strict; Path=/"
    headers = [(b"location", location.encode()), (b"set-cookie", cookie.encode()), (b"content-length", b"0"), *security]
    await send({"type": "http.response.start", "status": 303, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _network_location(origin: str) -> str:
    """Return host and port of an Origin header; a malformed one is nobody's."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
