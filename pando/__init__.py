"""Pando: serve large language models; requests that share a prefix share its computation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pando.api import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> object:
    """Load `Engine` on first use: `import pando` alone stays free of torch."""
    if name == "Engine":
        from pando.api import Engine

        return Engine
    raise AttributeError(f"module 'pando' has no attribute {name!r}")
