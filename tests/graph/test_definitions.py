"""What loading the definitions does to a process, before anything runs in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU's OpenMP")
@pytest.mark.parametrize(("chosen", "spins"), [(None, "'0'"), ("ACTIVE", "'30000000000'")])
def test_idle_threads_sleep_in_whatever_process_loads_the_definitions(chosen: str | None, spins: str, tmp_path: Path) -> None:
    """Plain `dagster dev`, its run processes and containers too, not our command line alone; who sets the variable is obeyed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "INTERP_ROOT": str(tmp_path), **({"OMP_WAIT_POLICY": chosen} if chosen else {})}
    command = [sys.executable, "-c", "import interp_assets.graph.definitions, torch"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = {spins}" in done.stderr
