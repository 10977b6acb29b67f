"""The suite is alone: what a person has made, set or cached is nothing that a test sees, nor what it starts."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import own_place
from own_place import ROOT

SAY = """
import json, os, signal, sys
named = [name for name in os.environ if name.startswith(("INTERP_", "DAGSTER_", "RAY_", "AWS_"))]
ignored = [number.name for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is signal.SIG_IGN]
print(json.dumps({"home": os.path.expanduser("~"), "work": os.getcwd(), "files": os.listdir(), "named": named, "ignored": ignored}))
"""


def test_a_test_and_what_it_starts_find_nothing_of_the_user() -> None:
    """After `make demo` there is `data/` in the checkout, and a plan in it that a test took for its own."""
    assert list(Path().iterdir()) == []
    said = json.loads(subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, check=True).stdout)
    assert said["work"] == str(Path.cwd())
    assert said["home"] == str(Path.home())
    assert not Path(said["work"]).is_relative_to(ROOT)
    assert not Path(said["home"]).is_relative_to(ROOT)
    assert said["files"] == []
    assert set(said["named"]) <= {"INTERP_PEERS_PYTHON", "INTERP_SKIP_FRONTEND"}


def test_what_a_test_leaves_behind_is_gone_in_the_next_place() -> None:
    """Variables, the working directory, and the signals that Dagster leaves ignored where it runs in a shell's background job."""
    place = own_place.make_place("again")
    Path("mine.txt").touch()
    os.environ |= {"INTERP_ROOT": "mine", "AWS_REGION": "mine", "HOME": "mine"}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    own_place.enter(place)
    assert list(Path().iterdir()) == []
    assert Path.home() == place / "home"
    said = json.loads(subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, check=True).stdout)
    assert not {"INTERP_ROOT", "AWS_REGION"} & set(said["named"])
    assert said["ignored"] == []


def test_compiled_loops_are_kept_for_all_tests() -> None:
    """They lie beside their sources: under a home of each test's own, every test would compile them again, a second each."""
    from interp_assets.visualize.kernels import _flag_rows

    kept = Path(_flag_rows._cache.cache_path)
    assert kept.is_relative_to(ROOT)
    assert not kept.is_relative_to(Path.home())
