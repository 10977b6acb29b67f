"""The exceptions that users may meet, one family under `InterpError`.

    InterpError
    ├── ConfigError              the pipeline's configuration is wrong
    ├── InputError               what the user pointed at is wrong: text, model, tokenizer, hook point
    │   ├── NonFiniteError       a NaN or infinity where numbers must be finite
    │   ├── OwnCodeError         a file of one's own that the configuration names fails
    │   ├── NotFoundError        the address names nothing that is served
    │   └── TooLargeError        more is asked for at once than is answered
    ├── ServiceError             a server cannot do now what it was asked; the request may be right
    │   ├── BusyError            too many wait already
    │   ├── OverdueError         it took longer than is allowed
    │   ├── CancelledError       somebody took the request back
    │   └── NoRoomError          it does not fit the memory
    ├── StoreError               a disk or bucket refused: permission, network, no space
    │   └── StoreMissingError    the object is not there
    ├── ArtifactError            an artifact is not what it must be
    │   ├── ArtifactMissingError no manifest, so no artifact
    │   ├── ArtifactCorruptError bytes differ from the manifest's checksums
    │   ├── ArtifactForeignError another pipeline's, another kind's or a newer version's artifact
    │   └── ArtifactRaceError    somebody else published other bytes for the same artifact
    ├── PlanError                the requested work cannot fit its bounds
    ├── StoppedError             a training was given up because others do better: nothing is wrong
    └── CertificateError         a shuffle lost, doubled or failed to mix rows

A message says what, where, what was expected and found, and the next step.
"""

import errno
import re
from typing import Final

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What an operating system says of a full disk, a used up quota, a file that may not grow."""


class InterpError(Exception):
    """Base class of every error this package raises on purpose."""

    op = ""
    """Of a plan's error: the kind of operation that it is about, where that is known."""
    point = ""
    """Likewise: the hook point."""


class StoppedError(InterpError):
    """A training ended early because another one is sparser and more exact, as the configuration asked for."""


class ConfigError(InterpError):
    """The pipeline's configuration is wrong."""


class InputError(InterpError):
    """What the user pointed at cannot be used: text, model, tokenizer or hook point."""


class NonFiniteError(InputError):
    """A NaN or an infinity stands where numbers must be finite."""


class OwnCodeError(InputError):
    """A file of one's own, which the configuration names and training executes, cannot be used: the message has its line."""


class NotFoundError(InputError):
    """The address names nothing that is served."""


class TooLargeError(InputError):
    """More is asked for at once than is answered."""


class ServiceError(InterpError):
    """A server cannot do now what it was asked."""


class BusyError(ServiceError):
    """Too many wait already."""


class OverdueError(ServiceError):
    """It took longer than is allowed."""


class CancelledError(ServiceError):
    """Somebody took the request back."""


class NoRoomError(ServiceError):
    """It does not fit the memory."""


class StoreError(InterpError):
    """A disk or bucket refused a read or a write."""


class StoreMissingError(StoreError):
    """The object is not in the store."""


class ArtifactError(InterpError):
    """An artifact is not what it must be."""


class ArtifactMissingError(ArtifactError):
    """There is no manifest, so there is no artifact."""


class ArtifactCorruptError(ArtifactError):
    """Bytes in the store differ from the manifest's checksums."""


class ArtifactForeignError(ArtifactError):
    """The artifact belongs to another pipeline, kind or format version."""


class ArtifactRaceError(ArtifactError):
    """Another writer published different bytes for the same artifact."""


class PlanError(InterpError):
    """The requested work cannot fit its bounds."""


class CertificateError(InterpError):
    """A shuffle lost, doubled or failed to mix rows."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without the full stop; its class where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def find_no_room(error: BaseException | None) -> BaseException | None:
    """Return the full disk behind an error: an `OSError`, or SQLite's own words for one, anywhere in the chain of its causes. None without.

    SQLite says "disk I/O error" when it finds no room for its log, and when the disk fails.
    """
    while error is not None:
        if getattr(error, "errno", None) in NO_ROOM or any(words in str(error) for words in ("database or disk is full", "disk I/O error")):
            return error
        error = error.__cause__ or error.__context__
    return None


_EXTRAS: Final = {"dagster_k8s": "kubernetes", "dagster_postgres": "production", "psycopg2": "production", "dagster_ray": "ray", "ray": "ray"}


def explain_missing(error: BaseException) -> str | None:
    """Say which optional package an error misses and how it is installed; None for any other error. Dagster hides some of them in a sentence."""
    found: BaseException | None = error
    while found is not None:
        hidden = re.search(r"Couldn't import module (\w+)", str(found))
        name = found.name if isinstance(found, ImportError) and found.name else hidden[1] if hidden else ""
        if extra := _EXTRAS.get(name.partition(".")[0]):
            install = f"pip install -c constraints.txt -e '.[{extra}]'"
            return f"This needs the package {name}, which is not installed. In the checkout, with its environment active: {install}"
        found = found.__cause__ or found.__context__
    return None
