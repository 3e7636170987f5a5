"""What `import pando` does to the process: a short OpenMP spin, unless the user chose one, and no torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = "import os, sys, pando; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
)
def test_openmp_spins_shortly_unless_the_user_chose(chosen: dict[str, str], expected: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**kept, **chosen}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [expected, "False"], done.stderr
