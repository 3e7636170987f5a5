"""`python -m pando` is the `pando` command."""

from __future__ import annotations

import sys

from pando.cli import main

if __name__ == "__main__":
    sys.exit(main())
