"""What figures and reports of faults are read beside: the processor, and the paths that it takes."""

import os
import platform
import subprocess
import sys

from interp_assets.compute.coarse import fastest_kind
from interp_assets.compute.processor import explain_processor, find_paths, find_processor
from interp_assets.compute.products import find_features, use_fastest_products

ONLY_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "NUMBA_CPU_NAME": "haswell"}


def test_the_processor_is_told_by_kind_and_by_what_it_has() -> None:
    """A ratio that was measured with AVX-512 says little to somebody without."""
    kind, features = find_processor()
    assert kind.startswith(platform.machine())
    assert set(features) <= find_features()
    assert ("avx2" in features) == ("avx2" in find_features())
    line = explain_processor()
    assert kind in line
    assert all(name in line for name in features)


def test_the_paths_told_are_the_paths_taken() -> None:
    """A report that names another path than the one that failed sends whoever reads it the wrong way."""
    paths = find_paths()
    assert paths.digits == fastest_kind(512)
    assert (paths.products == "oneDNN") == use_fastest_products()


def test_libraries_that_are_held_to_avx2_still_give_an_answer() -> None:
    """Where an instruction is missing the slower path is taken and said; this stands in for such a processor, and is none."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return
    code = "from interp_assets.compute.processor import explain_processor; print(explain_processor())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **ONLY_AVX2}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch's kernels AVX2" in done.stdout
