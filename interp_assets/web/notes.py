"""What a person collects while looking at features, named lists and notes, becomes one small JSON file for each bundle.

    <folder>/<bundle>.json    {"format": "interp-assets/notes", "version": 1, "bundle": ..., "lists": {name: [latents]}, "notes": {latent: text}}

The file is for people: it can be put under version control, mailed and edited. It is written whole, by rename, so a reader never meets half of
it; two pages that change it at once both keep their change, because every change is one latent's. Notes never touch the bundle, which is immutable.
"""

import json
import os
from pathlib import Path
from threading import Lock
from typing import Any, Final

from interp_assets.errors import ArtifactCorruptError, InputError
from interp_assets.storage.foreign import mend_text, parse_json

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
        self._lock = Lock()

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
            raise ArtifactCorruptError(f"The notes {self._path} cannot be read ({error}). Mend the file, or move it away.") from error
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
        with self._lock:
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
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
