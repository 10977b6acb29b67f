"""What a command did to a pipeline becomes one file of its folder, and all of them a table: what was run on which code, and what came of it.

    .history/<time>-<4 digits>.json    one command: written when it begins, replaced when it ends, each time as a whole
    .history/plans/<hash>.json         the plan that commands worked by, once each: with the configuration all artifact ids follow from it

A command that was killed stays `running`. Nothing here is an artifact, and nothing is made of it: ids, `interp verify` and `interp gc` do not
know this folder. Secrets have no place in it: environments are not kept, and names and keys before a host are taken out of addresses.
Format: `docs/formats/history.md`.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from interp_assets.errors import ArtifactCorruptError, InputError, StoreMissingError
from interp_assets.storage.foreign import parse_json
from interp_assets.storage.store import CREDENTIALS, Store

if TYPE_CHECKING:
    import polars as pl

FOLDER: Final = ".history"
FORMAT: Final = "interp-assets/history"
VERSION: Final = 1
RUNNING: Final = "running"
_SIGNED: Final = re.compile(r"([?&](?:X-Amz-[A-Za-z-]+|AWSAccessKeyId|signature|sig|token|key|password)=)[^&\s\"]+", re.IGNORECASE)
"""What the query of an address may hold that opens it."""
_ID: Final = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{4}")


def begin_entry(command: list[str], note: str = "", now: datetime | None = None) -> dict[str, Any]:
    """Make the entry of a command that begins."""
    now = now or datetime.now(UTC)
    return {
        "id": f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}",
        "time": now.isoformat(timespec="seconds"),
        "command": command,
        "note": note,
        "status": RUNNING,
    }


def save_entry(store: Store, entry: Mapping[str, Any]) -> None:
    """Write an entry, or replace what was written of it before."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **entry}, indent=1, ensure_ascii=False)
    text = _SIGNED.sub(r"\1...", CREDENTIALS.sub(r"\1...@", text))
    store.put(f"{FOLDER}/{entry['id']}.json", (text + "\n").encode())


def save_plan_aside(store: Store, plan: str) -> str:
    """Keep the plan as it is now, unless an equal one is kept; return its hash, empty where there is no plan."""
    with suppress(StoreMissingError):
        data = store.get(plan)
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        store.put(_plan_path(digest), data, create=True)
        return digest
    return ""


def read_plan_aside(store: Store, digest: str) -> dict[str, Any]:
    """Read a plan that was kept; empty where it was not."""
    with suppress(StoreMissingError):
        return parse_json(store.get(_plan_path(digest)))
    return {}


def list_entries(store: Store) -> list[str]:
    """List the ids of all entries, the oldest first."""
    names = (item.path.rpartition("/")[2].removesuffix(".json") for item in store.list(FOLDER))
    return sorted(name for name in names if _ID.fullmatch(name))


def read_entry(store: Store, entry_id: str) -> dict[str, Any]:
    """Read one entry by its id, or by the beginning of it. Raises `InputError` with those there are, `ArtifactCorruptError` for a damaged one."""
    known = list_entries(store)
    found = [name for name in known if name == entry_id] or [name for name in known if entry_id and name.startswith(entry_id)]
    if len(found) != 1:
        what = "is the beginning of several runs" if found else "is no run"
        raise InputError(f"{entry_id!r} {what} of {store.url}; the last of {len(known):,} are {', '.join(known[-4:]) or 'none'}.")
    return _read(store, found[0])


def read_history(store: Store) -> "pl.DataFrame":
    """Return a row for each command, the oldest first. Damaged entries are left out."""
    import polars as pl  # noqa: PLC0415 - takes a second, and writing does without

    rows = []
    for entry_id in list_entries(store):
        with suppress(ArtifactCorruptError):
            rows.append(_summarize(_read(store, entry_id)))
    text, number = pl.String(), pl.Float64()
    schema = {"id": text, "time": text, "command": text, "status": text, "seconds": number, "forecast_s": number, "n_made": pl.Int64()}
    schema |= {"n_reused": pl.Int64(), "n_failed": pl.Int64(), "note": text, "error": text, "commit": text, "dirty": text, "version": text}
    return pl.DataFrame(rows, schema={**schema, "machine": text, "plan": text}, orient="row")


def _read(store: Store, entry_id: str) -> dict[str, Any]:
    where = f"{FOLDER}/{entry_id}.json"
    try:
        content = parse_json(store.get(where))
        is_known = (content["format"], content["version"]) == (FORMAT, VERSION)
    except (ValueError, TypeError, LookupError) as error:
        raise ArtifactCorruptError(f"{store.url}/{where} is no entry of a history ({error}). Delete it: nothing is made of it.") from error
    if not is_known:
        raise ArtifactCorruptError(f"{store.url}/{where} is {content['format']!r} version {content['version']}; this release reads {VERSION}.")
    return content


def _summarize(entry: Mapping[str, Any]) -> dict[str, Any]:
    assets, code = entry.get("assets", []), entry.get("code", {})
    repository = code.get("folder") or code.get("package") or {}
    return {
        **{name: entry.get(name) for name in ("id", "time", "status", "note")},
        "command": " ".join(entry.get("command", [])),
        "seconds": entry.get("seconds"),
        "forecast_s": sum(float(asset["forecast_s"]) for asset in assets) if assets else None,
        **{f"n_{word}": sum(int(asset[f"n_{word}"]) for asset in assets) for word in ("made", "reused")},
        "n_failed": sum(len(asset["failed"]) for asset in assets),
        "error": entry.get("error") or None,
        "commit": repository.get("commit"),
        "dirty": repository.get("dirty"),
        "version": code.get("version"),
        "machine": (entry.get("machine") or {}).get("name"),
        "plan": entry.get("plan") or None,
    }


def _plan_path(digest: str) -> str:
    return f"{FOLDER}/plans/{digest}.json"
