"""What a person collects while looking at features, named lists and notes, becomes one small JSON file for each bundle.

    <folder>/<bundle>.json    {"format": "interp-assets/notes", "version": 1, "bundle": ..., "lists": {name: [latents]}, "notes": {latent: text}}

The file is for people: it can be put under version control, mailed and edited. It is written whole, by rename, so a reader never meets half of
it, and the file before it stays as `<bundle>.json.previous`. Two pages that change it at once both keep their change, because every change is
one latent's, and servers take turns by a lock (`<bundle>.lock`). Notes never touch the bundle, which is immutable.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from interp_assets.errors import ArtifactCorruptError, InputError
from interp_assets.storage.direct import flush
from interp_assets.storage.foreign import mend_text, parse_json
from interp_assets.storage.locks import locked

FORMAT: Final = "interp-assets/notes"
VERSION: Final = 1
MAX_NOTE: Final = 10_000
MAX_NAME: Final = 60
MAX_LISTS: Final = 100
MAX_LATENTS: Final = 100_000
"""Latents of one list."""


class Notebook:
    """Lists and notes about the features of one bundle."""

    def __init__(self, folder: Path, bundle: str) -> None:
        """Use `<folder>/<bundle>.json`; it is made by the first change."""
        self._path, self._bundle = folder / f"{bundle}.json", bundle
        self._previous = folder / f"{bundle}.json.previous"

    def read(self) -> dict[str, Any]:
        """Return lists and notes. Raises `ArtifactCorruptError` for a file that is none of ours."""
        try:
            content = parse_json(self._path.read_text(encoding="utf-8"))
            found = (content["format"], content["version"])
            lists = {str(name): [int(latent) for latent in latents] for name, latents in content["lists"].items()}
            notes = {str(int(latent)): str(text) for latent, text in content["notes"].items()}
        except FileNotFoundError:
            return {"file": str(self._path), "lists": {}, "notes": {}}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            kept = f" The last good copy is {self._previous}." if self._previous.exists() else ""
            raise ArtifactCorruptError(f"The notes {self._path} cannot be read ({error}). Mend the file, or move it away.{kept}") from error
        if found != (FORMAT, VERSION):
            raise ArtifactCorruptError(f"The notes {self._path} are {found[0]!r} version {found[1]}; this release reads version {VERSION}.")
        return {"file": str(self._path), "lists": lists, "notes": notes}

    def change(self, latent: int, note: str, lists: list[str]) -> dict[str, Any]:
        """Set the note of one latent and the lists that it stands in; return all. Raises `InputError` for what is too long or too many."""
        note, names = mend_text(note), list(dict.fromkeys(mend_text(name).strip() for name in lists))
        if len(note) > MAX_NOTE:
            raise InputError(f"The note has {len(note):,} characters, at most {MAX_NOTE:,} are kept.")
        if any(not 0 < len(name) <= MAX_NAME for name in names):
            raise InputError(f"The name of a list has 1 to {MAX_NAME} characters.")
        with locked(self._path.with_suffix(".lock")):
            content = self.read()
            kept = {name: [other for other in members if other != latent or name in names] for name, members in content["lists"].items()}
            for name in names:
                members = kept.setdefault(name, [])
                if latent not in members:
                    members.append(latent)
            kept = {name: members for name, members in kept.items() if members}
            if len(kept) > MAX_LISTS or any(len(members) > MAX_LATENTS for members in kept.values()):
                raise InputError(f"At most {MAX_LISTS} lists of {MAX_LATENTS:,} features are kept.")
            notes = {**content["notes"], str(latent): note.strip()}
            notes = {key: notes[key] for key in sorted(notes, key=int) if notes[key]}
            self._write({"format": FORMAT, "version": VERSION, "bundle": self._bundle, "lists": dict(sorted(kept.items())), "notes": notes})
            return {"file": str(self._path), "lists": dict(sorted(kept.items())), "notes": notes}

    def _write(self, content: dict[str, Any]) -> None:
        """Put the new file in the place of the last one, which is kept beside it."""
        with self._replacing(self._path) as temporary, temporary.open("x", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.write("\n")
            if self._path.exists():
                with self._replacing(self._previous) as copy:
                    shutil.copyfile(self._path, copy)

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        """Give a name that no other writer has, and let what was written under it take the place of `path`, once it is on the disk."""
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            yield temporary
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
