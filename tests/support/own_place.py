"""Where tests run: in an empty folder, with an empty home and none of the user's settings, which the programs they start inherit.

Imported before anything else, because some libraries read the environment once, when they are imported. What tools compile or measure once
a machine, and would do anew under each home, lies in pytest's own cache; Numba's compiled loops lie beside their sources, whatever the home.
"""

import os
import signal
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FORGOTTEN = ("INTERP_", "DAGSTER_", "RAY_", "AWS_", "HF_", "XDG_")
_KEPT = ("INTERP_PEERS_PYTHON", "INTERP_SKIP_FRONTEND")
_TOOLS = {"MPLCONFIGDIR": "matplotlib", "TRITON_CACHE_DIR": "triton", "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis"}
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; what tests start would be deaf to it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
_handlers = {number: signal.getsignal(number) for number in _SIGNALS}
_folder = tempfile.TemporaryDirectory(prefix="interp-tests-")


def make_place(name: str) -> Path:
    """Make a new place: an empty working directory and an empty home."""
    place = Path(_folder.name) / name
    for folder in ("home", "work"):
        (place / folder).mkdir(parents=True)
    return place


def enter(place: Path) -> None:
    """Work there, as a user who has set nothing, with the signals of a program that a terminal has started."""
    os.chdir(place / "work")
    for name in [name for name in os.environ if name.startswith(_FORGOTTEN) and name not in _KEPT]:
        del os.environ[name]
    os.environ["HOME"] = str(place / "home")
    for kind in ("CACHE", "CONFIG", "DATA", "STATE"):
        os.environ[f"XDG_{kind}_HOME"] = str(place / "home" / kind.lower())
    for number, handler in _handlers.items():  # Dagster leaves SIGTERM with what SIGINT has, and children inherit what is ignored
        signal.signal(number, handler)


def remove_places() -> None:
    """Remove all places."""
    os.chdir(ROOT)
    _folder.cleanup()


def list_checkout() -> set[str]:
    """List what lies at the root of the checkout, where a test in the wrong folder would leave its data."""
    return {path.name for path in ROOT.iterdir() if path.name != ".pytest_cache"}


for _variable, _name in _TOOLS.items():
    os.environ.setdefault(_variable, str(ROOT / ".pytest_cache" / "tools" / _name))
SESSION = make_place("session")
"""What is shared by several tests is made here."""
enter(SESSION)
os.chdir(ROOT)  # from where pytest finds the tests
