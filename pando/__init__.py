"""Pando: serve large language models; requests that share a prefix share its computation."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pando.api import Engine

# torch's OpenMP threads spin for milliseconds after each matrix product and keep the cores from the kernels that
# follow; a short spin is long enough for the next product. Read once, when torch is first imported.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> object:
    """Load `Engine` on first use: `import pando` alone stays free of torch."""
    if name == "Engine":
        from pando.imports import uncollected

        with uncollected():
            from pando.api import Engine
        return Engine
    raise AttributeError(f"module 'pando' has no attribute {name!r}")
