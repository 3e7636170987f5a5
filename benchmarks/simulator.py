"""Hit rates of the eviction policies on generated traces, as a table: parity points and other seeds.

    python benchmarks/simulator.py [--policies lru,reuse] [--seeds 11,12,13] [--parity | --split]

Hybrid 7B model, pages of one token, admission branch+last. Without --seeds each kind uses its reference seed.
"""

from __future__ import annotations

import argparse
import math

from pando.cache.manager import DEFAULT_POLICY, CacheManager
from pando.cache.simulator.generate import generate
from pando.cache.simulator.models import preset
from pando.cache.simulator.replay import Replay, Setup, layout_of
from pando.cache.simulator.traces import Trace

POINTS = {"swebench": (3, 6, 12), "sharegpt": (2, 3, 5), "lmsys": (1, 2, 3, 5)}
SEEDS = {"lmsys": 11, "sharegpt": 12, "swebench": 13}
PARITY = {
    ("lru_leaf", "lmsys"): {1: 0.1103, 2: 0.3338, 3: 0.4772, 5: 0.6853},
    ("lru_leaf", "sharegpt"): {2: 0.3531, 3: 0.5150, 5: 0.7571},
    ("lru", "lmsys"): {1: 0.1107, 2: 0.3388, 3: 0.4905, 5: 0.7072, math.inf: 0.979626},
    ("lru", "sharegpt"): {2: 0.3563, 3: 0.5160, 5: 0.7799, math.inf: 0.977254},
    ("lru", "swebench"): {math.inf: 0.440384},
}
"""Token hit rates that an independent simulator found, by budget in GB."""


def rate(trace: Trace, policy: str, gigabytes: float) -> float:
    """Token hit rate of one replay."""
    return Replay(Setup(preset("hybrid-7b"), policy, "branch+last", gigabytes * 1e9, 1), trace).run().token_hit_rate


def parity() -> int:
    """Print each point beside its reference; returns the number that is off by more than 0.0005."""
    traces = {kind: generate(kind, seed) for kind, seed in SEEDS.items()}
    bad = 0
    for (policy, kind), points in PARITY.items():
        for gigabytes, expected in points.items():
            found = rate(traces[kind], policy, gigabytes)
            good = abs(found - expected) <= 0.0005
            bad += not good
            print(f"{policy:9} {kind:9} {gigabytes:4} GB  {found:.6f}  {expected:.6f}  {'equal' if good else 'OFF'}")
    return bad


def table(policies: list[str], seeds: list[int] | None) -> None:
    """A row per kind, seed and budget; a column per policy."""
    print("| trace | GB | " + " | ".join(policies) + " |\n|---|---|" + "---|" * len(policies))
    for kind, budgets in POINTS.items():
        for seed in seeds or [SEEDS[kind]]:
            trace = generate(kind, seed)
            for gigabytes in budgets:
                rates = [f"{rate(trace, policy, gigabytes):.4f}" for policy in policies]
                print(f"| {kind} {seed} | {gigabytes} | " + " | ".join(rates) + " |", flush=True)


def split(ratio: float = 0.9) -> None:
    """One budget for KV and states together against two fixed ones, states : KV = ratio, default policy."""
    print("| trace | GB | one budget | states : KV = 0.9 : 1 | better by |\n|---|---|---|---|---|")
    for kind, budgets in POINTS.items():
        trace = generate(kind, SEEDS[kind])
        for gigabytes in budgets:
            setup = Setup(preset("hybrid-7b"), DEFAULT_POLICY, "branch+last", gigabytes * 1e9, 1)
            fixed = Replay(setup, trace)
            layout = layout_of(setup.model.plan, 1)
            slots = [
                int(gigabytes * 1e9 * share / size)
                for share, size in zip((1 / (1 + ratio), ratio / (1 + ratio)), layout.slot_bytes, strict=True)
            ]
            fixed.cache = CacheManager(
                layout, int(gigabytes * 1e9), num_slots=slots, policy=DEFAULT_POLICY, profile=setup.model.flops
            )
            joint, parts = Replay(setup, trace).run().token_hit_rate, fixed.run().token_hit_rate
            print(f"| {kind} | {gigabytes} | {joint:.4f} | {parts:.4f} | {joint / max(parts, 1e-9):.2f} |", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="lru,gdsf:0.25,reuse")
    parser.add_argument("--seeds", help="comma separated; default: the reference seed of each kind")
    parser.add_argument("--parity", action="store_true", help="compare with the reference figures instead")
    parser.add_argument("--split", action="store_true", help="compare one budget with two fixed ones instead")
    args = parser.parse_args()
    if args.split:
        split()
        return
    if args.parity:
        raise SystemExit(1 if parity() else 0)
    table(args.policies.split(","), [int(seed) for seed in args.seeds.split(",")] if args.seeds else None)


if __name__ == "__main__":
    main()
