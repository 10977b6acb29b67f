"""The Makefile's installation speaks in a terminal and is silent in a file."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None or not hasattr(os, "openpty"), reason="this system has no make or no terminals")


def test_a_check_asks_no_registry() -> None:
    """It runs at every commit; one request a package and run is what registries lock people out for."""
    shown = subprocess.run(["make", "-n", "-C", str(ROOT), "check"], capture_output=True, text=True, check=True).stdout
    assert "pip-audit" not in shown
    assert "ruff" in shown
    workflows = [path.read_text(encoding="utf-8") for path in (ROOT / ".github").rglob("*.y*ml")]
    assert not any("audit" in text for text in workflows)
    assert "pip-audit" in subprocess.run(["make", "-n", "-C", str(ROOT), "audit"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("is_terminal", [True, False])
def test_pip_shows_its_bars_in_a_terminal_only(tmp_path: Path, *, is_terminal: bool) -> None:
    """The first installation downloads for minutes: a person wants to see that, a log does not."""
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("python", "interp"):
        (tools / name).write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/{name}.log"\n')
        (tools / name).chmod(0o755)
    leader, follower = os.openpty()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    try:
        output = follower if is_terminal else subprocess.PIPE
        command = ["make", "-C", str(ROOT), "env", f"VENV={tmp_path}/venv"]
        subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=True)
    finally:
        os.close(follower)
        os.close(leader)
    installs = [line.split() for line in (tmp_path / "python.log").read_text().splitlines()]
    assert len(installs) == 2
    assert all(("-q" in words) is not is_terminal for words in installs)
