"""Environment variables Pando reads: all of them, in one table. Standard library only.

Options belong in `Config` and on the command line. A variable is right only for what should not show in a process list
(a key) or what holds for a user rather than a run (the default server, colours).
"""

from __future__ import annotations

import os

VARIABLES: dict[str, str] = {
    "PANDO_API_KEY": "API key: required by a server started with it, sent by `pando chat|generate|bench` to a --url.",
    "PANDO_URL": "Base URL that `pando chat` and `pando generate` talk to when neither a model nor --url is given.",
    "PANDO_ISA": "Highest instruction set of the CPU kernels: portable, avx2, avx512 or avx512_bf16; for comparison.",
    "PANDO_SHARED_PREFIX": "0: decoding reads a prefix that requests share once per request, not once; for comparison.",
    "NO_COLOR": "Any value: no colours in the terminal.",
}
"""Name -> what it does."""


def read(name: str) -> str | None:
    """Value of a variable in VARIABLES, or None if it is unset or empty."""
    assert name in VARIABLES, f"{name} is not in pando.env.VARIABLES"
    return os.environ.get(name) or None
