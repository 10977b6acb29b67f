"""What of a configuration probes SAEs: which labels of rows are to be read off few latents, and how few."""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field

from interp_assets.errors import ConfigError
from interp_assets.planning.identity import Section

PYTHON: Final = "python"
PLANTED: Final = "planted"
BUILT_IN: Final = (PYTHON, PLANTED)
_SUFFIX: Final = ".parquet"


def _check_labels(labels: str) -> str:
    if labels not in BUILT_IN and not labels.endswith(_SUFFIX):
        message = f"{labels!r} is neither {PYTHON!r} nor {PLANTED!r} nor a {_SUFFIX} file with the column row_id"
        raise ValueError(message)
    return labels


class ProbesConfig(Section):
    """What is read off few latents of every SAE; nothing is probed without this section. Identity, but for where a file of labels lies."""

    labels: Annotated[str, AfterValidator(_check_labels)] = PYTHON
    """`python`: what tokenize and ast say of each token; `planted`: which features fire; or a `.parquet` file: `row_id`, and columns of labels."""
    k: Annotated[tuple[Annotated[int, Field(ge=1, le=32)], ...], Field(min_length=1, max_length=8)] = (1, 5)
    """Latents that a probe may read: those whose means differ most."""
    seeds: Annotated[int, Field(ge=1, le=32)] = 5
    """Times that documents are divided into halves, to fit on and to test on."""
    rows: Annotated[int, Field(ge=100)] = 16_384
    """Held-out rows, the first ones."""
    labels_digest: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """SHA-256 of a file of labels, which is filled in when the configuration is read. Stating it pins the bytes."""

    @property
    def is_file(self) -> bool:
        """Tell whether labels come from a file."""
        return self.labels not in BUILT_IN

    def identity(self) -> dict[str, Any]:
        """Return what decides the numbers."""
        name = Path(self.labels).name if self.is_file else self.labels
        return {"labels": name, "sha256": self.labels_digest, "k": list(self.k), "seeds": self.seeds, "rows": self.rows}

    def check_source(self, source: Literal["stdlib", "files", "huggingface", "planted"]) -> None:
        """Raise `ValueError` where the corpus has no such labels."""
        if not self.is_file and (self.labels == PLANTED) != (source == PLANTED):
            has = "the features that fire: probes.labels planted" if source == PLANTED else "text: probes.labels python, or a file"
            message = f"probes.labels is {self.labels!r}, and corpus.source {source!r} has {has}"
            raise ValueError(message)


def find_labels(probes: ProbesConfig, folder: Path) -> ProbesConfig:
    """Fill in which bytes a file of labels has; a relative path lies in `folder`. Raises `ConfigError` where it cannot be read."""
    if not probes.is_file or probes.labels_digest:
        return probes
    place = folder / Path(probes.labels).expanduser()
    try:
        digest = hash_labels(place)
    except OSError as error:
        raise ConfigError(f"probes.labels names {place}, which cannot be read ({error.strerror}). Its path is relative to {folder}.") from error
    return probes.model_copy(update={"labels": str(place), "labels_digest": digest})


def hash_labels(path: Path) -> str:
    """Return the SHA-256 of a file, piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
