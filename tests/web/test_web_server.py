"""The server sends exactly the bytes that were asked for, to those who may ask, and explains everything else."""

import asyncio
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_names import ODD_NAME
from synthetic_bundle import build_synthetic_bundle

from interp_assets.errors import ConfigError
from interp_assets.storage.manifest import create_artifact, make_ref
from interp_assets.storage.store import Store, open_store
from interp_assets.web.files import parse_range
from interp_assets.web.guard import MAX_QUERY_BYTES, SECURITY_HEADERS
from interp_assets.web.opened import BundlePlace, list_bundles
from interp_assets.web.server import check_bind, make_app, return_large_memory

HOST = "http://127.0.0.1:8420"


class Site:
    """Asks one application, as a client on the same machine would."""

    def __init__(self, bundles: list[BundlePlace], static: Path, **options: Any) -> None:
        self._app = make_app(bundles, static=static, **options)
        self.bundles = bundles

    @property
    def name(self) -> str:
        return self.bundles[0].name

    def get(self, path: str, method: str = "GET", host: str = HOST, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=host) as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def raw(self, path: bytes) -> tuple[int, bytes]:
        """Send a path that a well-behaved client would clean up first."""

        async def ask() -> tuple[int, bytes]:
            sent: list[dict] = []

            async def send(message: Any) -> None:
                sent.append(message)

            async def receive() -> dict:
                return {"type": "http.request", "body": b"", "more_body": False}

            from urllib.parse import unquote

            scope = {
                "type": "http",
                "method": "GET",
                "path": unquote(path.decode("latin-1")),
                "raw_path": path,
                "query_string": b"",
                "headers": [(b"host", b"127.0.0.1")],
                "scheme": "http",
                "root_path": "",
                "http_version": "1.1",
            }
            await self._app(scope, receive, send)
            return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a folder with one invented bundle, and a secret beside it."""
    root = tmp_path_factory.mktemp("served")
    (root / "secret.txt").write_text("secret")
    store = open_store(str(root / ODD_NAME))
    build_synthetic_bundle(store, n_features=40, n_documents=8)
    return store


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that stands for the built pages."""
    folder = tmp_path_factory.mktemp("static")
    (folder / "index.html").write_text("<!doctype html><title>pages</title>")
    return folder


@pytest.fixture(scope="module")
def site(store: Store, static: Path) -> Site:
    """Return a server of that bundle, without a token."""
    return Site(list_bundles(store), static)


def _problem(response: httpx.Response) -> dict[str, Any]:
    problem = response.json()["error"]
    assert problem["what"]
    assert problem["do"]
    return problem


def _bytes(store: Store, name: str) -> bytes:
    return store.get(f"{list_bundles(store)[0].path}/{name}")


# Ranges


@pytest.mark.parametrize(
    ("header", "expected"),
    [("bytes=0-0", (0, 1)), ("bytes=10-19", (10, 10)), ("bytes=-5", (-5, 5)), ("bytes=100-", (100, None)), ("bytes=5-99999999", (5, None))],
)
def test_a_range_is_answered_with_those_bytes(site: Site, store: Store, header: str, expected: tuple[int, int | None]) -> None:
    """Opening a feature is one such request."""
    data = _bytes(store, "records/00000.bin")
    start = expected[0] if expected[0] >= 0 else len(data) + expected[0]
    wanted = data[start : start + expected[1]] if expected[1] else data[start:]
    response = site.get(f"/bundles/{site.name}/records/00000.bin", headers={"Range": header})
    assert response.status_code == 206
    assert response.content == wanted
    assert response.headers["content-range"] == f"bytes {start}-{start + len(wanted) - 1}/{len(data)}"
    assert response.headers["content-type"] == "application/octet-stream"
    assert "content-encoding" not in response.headers


@pytest.mark.parametrize("header", ["bytes=5-2", "bytes=0-1,4-5", "lines=1-2", "bytes=a-b", "", "bytes=-"])
def test_a_header_that_is_no_single_range_brings_the_whole_file(site: Site, store: Store, header: str) -> None:
    """RFC 9110: what a server does not understand it ignores."""
    response = site.get(f"/bundles/{site.name}/records/00000.idx", headers={"Range": header})
    assert (response.status_code, response.content) == (200, _bytes(store, "records/00000.idx"))


@pytest.mark.parametrize("header", ["bytes=99999999-", "bytes=99999999-99999999", "bytes=-0"])
def test_a_range_outside_the_file_is_416_with_its_size(site: Site, store: Store, header: str) -> None:
    """The client learns the size and can ask again."""
    response = site.get(f"/bundles/{site.name}/records/00000.bin", headers={"Range": header})
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{len(_bytes(store, 'records/00000.bin'))}"


@given(st.integers(1, 2000), st.integers(0, 3000), st.integers(0, 3000))
def test_a_range_never_leaves_the_file(size: int, first: int, last: int) -> None:
    """Whatever is asked for, start and length lie inside."""
    data = bytes(index % 251 for index in range(size))
    for header in (f"bytes={first}-{last}", f"bytes={first}-", f"bytes=-{last}"):
        try:
            span = parse_range(header, size)
        except ValueError:
            continue
        if span is not None:
            assert 0 <= span.start < size
            assert 0 < span.n_bytes <= size - span.start
            assert len(data[span.start : span.start + span.n_bytes]) == span.n_bytes


def test_large_files_arrive_whole_in_pieces(static: Path, memory_store: Store) -> None:
    """A stream is cut at checksum blocks; nothing may be lost or doubled at the cuts."""
    data = bytes(range(256)) * 12_000
    build_synthetic_bundle(memory_store, n_features=2, n_documents=4)
    place = list_bundles(memory_store)[0]
    ref = make_ref("feature_bundle", "6-web", identity={}, inputs={}, label="big")
    with create_artifact(memory_store, ref) as art:
        art.put("bundle.json", memory_store.get(f"{place.path}/bundle.json"))
        art.put("list/rows.bin", memory_store.get(f"{place.path}/list/rows.bin"))
        art.put("big.bin", data, block_bytes=1 << 18)
    site = Site([BundlePlace(memory_store, ref.path)], static)
    address = f"/bundles/{site.name}/big.bin"
    assert site.get(address).content == data
    assert site.get(address, headers={"Range": "bytes=1000-2900000"}).content == data[1000:2900001]


# Validators


def test_an_unchanged_file_is_not_sent_again(site: Site) -> None:
    """The entity tag follows from the manifest's checksums."""
    address = f"/bundles/{site.name}/vocabulary.json"
    first = site.get(address)
    again = site.get(address, headers={"If-None-Match": f'"other", {first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert site.get(address, headers={"If-None-Match": '"other"'}).status_code == 200


def test_a_range_of_a_changed_file_brings_the_new_file(site: Site) -> None:
    """`If-Range` keeps a page from joining bytes of two versions."""
    address = f"/bundles/{site.name}/vocabulary.json"
    tag = site.get(address).headers["etag"]
    assert site.get(address, headers={"Range": "bytes=0-3", "If-Range": tag}).status_code == 206
    assert site.get(address, headers={"Range": "bytes=0-3", "If-Range": '"old"'}).status_code == 200


def test_head_tells_the_size_and_sends_nothing(site: Site, store: Store) -> None:
    """Clients look before they ask."""
    response = site.get(f"/bundles/{site.name}/records/00000.bin", "HEAD")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == str(len(_bytes(store, "records/00000.bin")))


# Who may ask


@pytest.mark.parametrize(
    "host", ["http://evil.example", "http://127.0.0.1.evil.example", "http://169.254.169.254", "http://localhost.evil.example:8420"]
)
def test_foreign_host_names_are_refused(site: Site, host: str) -> None:
    """Otherwise any page could point its own name at this machine and read the bundles."""
    response = site.get("/api/bundles", host=host)
    assert response.status_code == 421
    assert "does not answer for the host" in _problem(response)["what"]


@pytest.mark.parametrize("host", ["http://localhost:8420", "http://127.0.0.1", "http://[::1]:8420"])
def test_loopback_names_are_answered(site: Site, host: str) -> None:
    """All names of this machine work, with any port (SSH tunnels change it)."""
    assert site.get("/api/bundles", host=host).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999"])
def test_pages_of_other_origins_are_refused(site: Site, origin: str) -> None:
    """A page open in the same browser must not read what this server has."""
    assert _problem(site.get("/api/bundles", headers={"Origin": origin}))["status"] == 403
    assert site.get("/api/bundles", headers={"Origin": HOST}).status_code == 200


def test_a_token_is_asked_for_and_taken_in_three_ways(store: Store, static: Path) -> None:
    """Scripts send a header; people open an address, and the token leaves it for a cookie."""
    site = Site(list_bundles(store), static, token="correct horse", hosts=["*"])
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "interp_token=wrong"}, {"Cookie": 'a="b;;,'}):
        response = site.get("/api/bundles", headers=headers)
        assert response.status_code == 401
        assert "token" in _problem(response)["what"]
    assert site.get("/", host="http://example.org").status_code == 401
    assert site.get("/api/bundles", headers={"Authorization": "Bearer correct horse"}).status_code == 200
    opened = site.get("/?a=1&token=correct+horse")
    assert (opened.status_code, opened.headers["location"]) == (303, "/?a=1")
    cookie = opened.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert site.get("/api/bundles", headers={"Cookie": cookie.split(";")[0]}).status_code == 200


@pytest.mark.parametrize("others", ["a[b]=1; ", 'json={"a": "b"}; ', "plain=1; x; =; ", "\u00e9=\u00e9; ", 'quoted="; '])
def test_cookies_of_other_applications_hide_ours_from_nobody(store: Store, static: Path, others: str) -> None:
    """Cookies know no ports: those of whatever else runs on this machine come along, and some are none by the book."""
    site = Site(list_bundles(store), static, token="secret")
    ours = site.get("/?token=secret").headers["set-cookie"].split(";")[0]
    for cookie in (others + ours, f"{ours}; {others}", ours):
        assert site.get("/api/bundles", headers={"Cookie": cookie.encode("latin-1")}).status_code == 200
    assert site.get("/api/bundles", headers={"Cookie": others.encode("latin-1")}).status_code == 401


def test_two_servers_of_one_machine_keep_their_cookies_apart(store: Store, static: Path) -> None:
    """The second one would log the first one out."""
    cookies = [Site([], static, token=token).get(f"/?token={token}").headers["set-cookie"] for token in ("one", "two")]
    assert len({cookie.partition("=")[0] for cookie in cookies}) == 2
    assert all(token not in cookie.partition("=")[2] for cookie in cookies for token in ("one", "two"))


def test_hints_speak_of_what_there_is(site: Site, store: Store, static: Path) -> None:
    """An option that does not exist, an address that was not printed: a person is stuck with those."""
    assert "--" not in _problem(site.get("/api/bundles", host="http://evil.example"))["do"]
    asked = _problem(Site(list_bundles(store), static, token="secret").get("/api/bundles"))
    assert "?token=THE_TOKEN" in asked["do"]
    assert "printed" not in asked["do"]


def test_the_redirect_after_a_token_stays_on_this_server(store: Store, static: Path) -> None:
    """`//evil.example/` as a path would otherwise become another host."""
    site = Site(list_bundles(store), static, token="secret")
    assert site.get(f"{HOST}//evil.example/?token=secret").headers["location"] == "/evil.example/"


def test_other_machines_need_a_token() -> None:
    """The default is the own machine; opening it further is a decision."""
    for host in ("127.0.0.1", "localhost", "::1"):
        check_bind(host, None)
    check_bind("0.0.0.0", "secret")
    with pytest.raises(ConfigError, match=r"Serving on 0\.0\.0\.0 would answer every machine.*--token-file"):
        check_bind("0.0.0.0", None)


# What leaves the server


@pytest.mark.parametrize("path", ["/", "/api/bundles", "/api/bundles/none", "/bundles/none/none", "/nothing"])
def test_every_answer_carries_the_security_headers(site: Site, path: str) -> None:
    """No inline script, no foreign file, no framing: errors included."""
    headers = site.get(path).headers
    for name, value in SECURITY_HEADERS:
        assert headers[name.decode()] == value.decode()
    assert headers["content-security-policy"].startswith("default-src 'self';")
    assert "unsafe" not in headers["content-security-policy"]


@pytest.mark.parametrize(
    "file",
    [
        "../../../secret.txt",
        "..%2f..%2f..%2fsecret.txt",
        "%2e%2e/%2e%2e/%2e%2e/secret.txt",
        "..%5c..%5csecret.txt",
        "records/../../../../secret.txt",
        "%00",
        "/etc/passwd",
        "manifest.json",
        "records",
        "records/00000.bin%00.json",
    ],
)
def test_only_files_of_the_manifest_are_sent(site: Site, file: str) -> None:
    """A path is looked up among the manifest's names, never joined to a folder."""
    for prefix in (f"/bundles/{site.name}/", "/"):
        if prefix == "/" and file in ("manifest.json", "records"):
            continue
        status, body = site.raw(f"{prefix}{file}".encode())
        assert status == 404
        assert b"secret" not in body.replace(b"secret.txt", b"")


def test_an_oversized_query_is_refused_before_it_is_read(site: Site) -> None:
    """4 KiB hold every list that a person can make."""
    response = site.get("/api/bundles", params={"q": "x" * MAX_QUERY_BYTES})
    assert _problem(response)["status"] == 414
    assert _problem(site.get(f"/api/bundles/{site.name}/features", params={"q": "x" * 300}))["status"] == 400


def test_hostile_tokens_leave_only_as_data(site: Site) -> None:
    """Strings that look like markup travel as JSON, with a type that no browser renders."""
    response = site.get(f"/bundles/{site.name}/vocabulary.json")
    assert "<script>alert(1)</script>" in response.json()["tokens"]
    assert response.headers["content-type"].startswith("application/json")
    assert response.headers["x-content-type-options"] == "nosniff"
    missing = site.get("/api/bundles/<script>alert(1)<%2Fscript>")
    assert missing.headers["content-type"] == "application/json"


# Lists


def test_a_list_is_sorted_filtered_searched_and_cut(site: Site) -> None:
    """The query of the address reaches the table."""
    query = {"sort": "max", "descending": "true", "life": "live", "filter": ["count>=5", "max<100"], "q": "def", "offset": 1, "limit": 3}
    page = site.get(f"/api/bundles/{site.name}/features", params=query).json()
    assert (page["n_features"], page["offset"], len(page["rows"])) == (40, 1, 3)
    values = [row["max"] for row in page["rows"]]
    assert values == sorted(values, reverse=True)
    latent = page["rows"][0]["latent"]
    place = site.get(f"/api/bundles/{site.name}/place", params={**query, "latent": latent}).json()
    assert place["position"] == 1
    assert place["next"] == page["rows"][1]["latent"]
    rows = site.get(f"/api/bundles/{site.name}/rows", params={"latent": [3, 1]}).json()["rows"]
    assert [row["latent"] for row in rows] == [3, 1]


def test_a_description_tells_the_columns_and_distributions(site: Site) -> None:
    """The page makes its filters from them."""
    description = site.get(f"/api/bundles/{site.name}").json()
    assert "frequency" in description["columns"]["numeric"]
    assert set(description["distributions"]) == {"frequency", "max", "mean"}


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/api/bundles/none", 404, "No bundle is called 'none'"),
        ("/bundles/{name}/none.bin", 404, "has no file 'none.bin'"),
        ("/api/bundles/{name}/features?sort=weight", 400, "Cannot sort by 'weight'"),
        ("/api/bundles/{name}/features?limit=100000", 400, "limit: "),
        ("/api/bundles/{name}/features?offset=-1", 400, "offset: "),
        ("/api/bundles/{name}/rows?latent=99", 400, "there are 40"),
        ("/api/bundles/{name}/place?latent=x", 400, "latent: "),
        ("/api/none", 404, "Not Found"),
    ],
)
def test_wrong_addresses_are_explained_in_json(site: Site, path: str, status: int, text: str) -> None:
    """What is wrong, and what to do: the page shows both."""
    response = site.get(path.format(name=site.name))
    assert response.status_code == status
    assert text in _problem(response)["what"]


# Damage


@pytest.fixture
def damage(memory_store: Store) -> Callable[[str, Callable[[bytes], bytes | None]], BundlePlace]:
    """Return a function that changes one file of a fresh bundle."""
    build_synthetic_bundle(memory_store, n_features=5, n_documents=4)

    def change(name: str, edit: Callable[[bytes], bytes | None]) -> BundlePlace:
        place = list_bundles(memory_store)[0]
        path = f"{place.path}/{name}"
        data = edit(memory_store.get(path))
        if data is None:
            memory_store.delete([path])
        else:
            memory_store.put(path, data)
        return place

    return change


def test_a_flipped_byte_is_never_served(damage, static: Path) -> None:
    """Ranges are verified: a damaged record is an error that names the block, not a wrong feature."""
    place = damage("records/00000.bin", lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:])
    response = Site([place], static).get(f"/bundles/{place.name}/records/00000.bin", headers={"Range": "bytes=10-20"})
    assert response.status_code == 502
    assert "is damaged in block 0" in _problem(response)["what"]


@pytest.mark.parametrize(
    ("edit", "text"), [(lambda data: data[:-50], "ends early|damaged|Could not read"), (lambda data: None, "is gone, though its manifest lists it")]
)
def test_a_truncated_or_missing_record_file_is_named(damage, static: Path, edit, text: str) -> None:
    """The message names the file and the next step."""
    import re

    place = damage("records/00000.bin", edit)
    size = next(entry.n_bytes for entry in _manifest(place).files if entry.name == "records/00000.bin")
    response = Site([place], static).get(f"/bundles/{place.name}/records/00000.bin", headers={"Range": f"bytes={size - 20}-{size - 1}"})
    assert response.status_code == 502
    assert re.search(text, _problem(response)["what"])
    assert "records/00000.bin" in _problem(response)["what"]


def test_a_bundle_of_a_newer_version_is_listed_with_the_reason(static: Path, memory_store: Store) -> None:
    """A missing entry explains nothing."""
    ref = make_ref("feature_bundle", "6-web", identity={}, inputs={}, label="newer")
    with create_artifact(memory_store, ref) as art:
        art.put("bundle.json", json.dumps({"format": "interp-assets/feature-bundle", "version": 99}).encode())
    site = Site(list_bundles(memory_store), static)
    listed = site.get("/api/bundles").json()["bundles"][0]
    assert "version 99; this release reads version 3. Upgrade" in listed["error"]["what"]
    assert "version 99" in _problem(site.get(f"/api/bundles/{site.name}"))["what"]


def test_a_bundle_of_an_older_version_says_how_to_renew_it(static: Path, memory_store: Store) -> None:
    """Upgrading would not help there."""
    with create_artifact(memory_store, make_ref("feature_bundle", "6-web", identity={}, inputs={}, label="older")) as art:
        art.put("bundle.json", json.dumps({"format": "interp-assets/feature-bundle", "version": 1}).encode())
    listed = Site(list_bundles(memory_store), static).get("/api/bundles").json()["bundles"][0]
    assert "Materialize `feature_browser` again" in listed["error"]["what"]


def test_an_artifact_of_another_kind_is_listed_with_the_reason(static: Path, memory_store: Store) -> None:
    """Somebody points the server at the wrong folder."""
    ref = make_ref("sae", "6-web", identity={}, inputs={}, label="sae")
    with create_artifact(memory_store, ref):
        pass
    assert "holds a sae, not a feature_bundle" in Site(list_bundles(memory_store), static).get("/api/bundles").json()["bundles"][0]["error"]["what"]


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_damaged_search_index_is_explained(static: Path, memory_store: Store, local_store: Store, kind: str) -> None:
    """The list works without it; a search says what is wrong."""
    store = memory_store if kind == "memory" else local_store
    build_synthetic_bundle(store, n_features=5, n_documents=4)
    place = list_bundles(store)[0]
    store.put(f"{place.path}/search/postings.bin", b"no index" * 4000)
    site = Site([place], static)
    response = site.get(f"/api/bundles/{place.name}/features?q=def")
    assert response.status_code == 502
    assert "search/postings.bin" in _problem(response)["what"]


def test_the_allocator_takes_the_limit_where_it_can() -> None:
    """Without it, a server's memory grows with the number of threads that ever held a column."""
    assert return_large_memory() == (platform.libc_ver()[0] == "glibc")


def test_without_built_pages_the_server_says_how_to_build_them(store: Store, tmp_path: Path) -> None:
    """A checkout that was never built must not be a blank page."""
    response = Site(list_bundles(store), tmp_path).get("/")
    assert response.status_code == 503
    assert "python frontend/build.py" in response.text


def test_a_bundle_in_memory_is_served_like_one_in_a_folder(static: Path, memory_store: Store) -> None:
    """Everything is read by range from wherever it is."""
    build_synthetic_bundle(memory_store, n_features=5, n_documents=4)
    site = Site(list_bundles(memory_store), static)
    assert site.get(f"/api/bundles/{site.name}/features?q=def").json()["n_matches"] >= 1


def _manifest(place: BundlePlace):
    from interp_assets.storage.manifest import read_manifest

    return read_manifest(place.store, place.path)
