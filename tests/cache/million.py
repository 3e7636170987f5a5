"""Random operations without end: `python -m tests.cache.million [--operations N] [--first-seed S]`.

Each seed is a configuration of its own with 2,000 operations; a failing one is named, to be run again alone.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.cache.random_engine import Traffic, setup_of

ROUND = 2_000


def main() -> int:
    """Run seeds until the operations are done; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    done, seed, start = 0, options.first_seed, time.monotonic()
    hits = denied = branches = evicted = 0
    while done < options.operations:
        traffic = Traffic(seed, setup_of(seed))
        try:
            traffic.run(ROUND)
            traffic.drain()
        except AssertionError:
            print(f"seed {seed} failed: {setup_of(seed)}", flush=True)
            raise
        done, seed = done + ROUND, seed + 1
        hits, denied, branches = hits + traffic.num_hits, denied + traffic.num_denied, branches + traffic.num_branches
        evicted += sum(traffic.cache.eviction.evicted)
        seconds = time.monotonic() - start
        if seed % 20 == 0 or done >= options.operations:
            counts = f"{hits:,} hits, {branches:,} branches, {denied:,} denials, {evicted:,} evicted"
            print(f"{done:,} operations, next seed {seed}, {seconds:.0f} s; {counts}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
