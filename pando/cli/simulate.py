"""`pando simulate`: replay a trace of requests against the prefix cache, without a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pando.errors import ConfigError

if TYPE_CHECKING:
    from pando.cache.simulator.models import SimulatedModel
    from pando.cache.simulator.report import Report
    from pando.cache.simulator.traces import Trace

SUMMARY = "replay a trace against the prefix cache"
KINDS = ("lmsys", "sharegpt", "swebench")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="requests to replay")
    source.add_argument("--generate", choices=KINDS, help="replay a made-up trace shaped like this data set")
    parser.add_argument(
        "--format", choices=("tokens", "mooncake", "azure"), default="tokens", help="of the trace (default tokens)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --generate (default 0)")
    parser.add_argument("--sessions", type=int, metavar="N", help="conversations to --generate (default: by kind)")
    parser.add_argument("--max-requests", type=int, metavar="N", help="replay only the first N")
    parser.add_argument(
        "--model", default="hybrid-7b", help="preset, config.json or the folder that holds it (default hybrid-7b)"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the cache of a config.json (default bfloat16)")
    for flag, default, text in (
        ("--policy", "reuse", "what is evicted first; may be repeated"),
        ("--admission", "branch+last+room", "which recurrent states are kept; may be repeated"),
        ("--budget", "device=4e9", "bytes the cache may take, or device=inf; may be repeated"),
    ):
        parser.add_argument(flag, action="append", metavar="X", help=f"{text} (default {default})")
    parser.add_argument("--page-size", type=int, default=1, metavar="N", help="tokens per page (default 1)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="save the report as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save the hit rate over the budget as an HTML page")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=run, prog=parser.prog)


def run(args: argparse.Namespace) -> int:
    """Replay every combination of policy, admission and budget; returns the exit code."""
    from pando.bench.progress import Bar
    from pando.cache.simulator.replay import Replay, Setup, parse_budget

    if args.page_size < 1:
        raise ConfigError(f"pages of {args.page_size} tokens; they hold at least one", param="page_size")
    setups = [
        (policy, admission, parse_budget(budget))
        for policy in args.policy or ["reuse"]
        for admission in args.admission or ["branch+last+room"]
        for budget in args.budget or ["device=4e9"]
    ]
    model, trace = _model(args.model, args.dtype), _trace(args)
    reports = []
    for policy, admission, budget in setups:
        replay = Replay(Setup(model, policy, admission, budget, args.page_size), trace)
        if args.no_progress:
            reports.append(replay.run())
        else:
            with Bar(len(trace)) as progress:
                reports.append(replay.run(progress))
        print(reports[-1].as_text(), flush=True)
    if args.report is not None:
        facts = [report.as_dict() for report in reports]
        _save(args.report, json.dumps(facts[0] if len(facts) == 1 else {"runs": facts}, indent=1) + "\n")
    if args.plot is not None:
        _save(args.plot, _page(args, setups, reports))
    return 0


def _trace(args: argparse.Namespace) -> Trace:
    from pando.cache.simulator.generate import generate
    from pando.cache.simulator.traces import read_trace

    if args.generate is not None:
        return generate(args.generate, args.seed, sessions=args.sessions)[: args.max_requests]
    return read_trace(args.trace, args.format, args.page_size, args.max_requests)


def _model(name: str, dtype: str) -> SimulatedModel:
    """A preset, or what a config.json says."""
    from pando.cache.simulator.models import PRESETS, SimulatedModel, preset

    path = Path(name)
    if name in PRESETS or not path.exists():
        return preset(name)
    from pando.cache.profile import FlopProfile, LayerFlops, num_pairs
    from pando.models.cached import cache_plan
    from pando.models.hf_config import HFConfig
    from pando.models.registry import spec_of
    from pando.models.size import ModelSize

    config = HFConfig.from_file(path / "config.json" if path.is_dir() else path)
    spec = spec_of(config)
    size = ModelSize.of(spec)
    near = [
        LayerFlops(0.0, 2.0 * layer.heads * (layer.head_dim + layer.v_dim), layer.window)
        for layer in spec.layers
        if layer.window > 0
    ]
    # What is left is a per token and b per pair of tokens: two lengths give both.
    one, two = (
        size.prefill_flops(n) - 2 * size.head_parameters - sum(x.per_pair * num_pairs(n, x.window) for x in near)
        for n in (1, 2)
    )
    per_pair = two - 2 * one
    flops = FlopProfile.of([*near, LayerFlops(one - per_pair, per_pair)])
    return SimulatedModel(spec.family, cache_plan(spec, dtype), flops)


def _page(args: argparse.Namespace, setups: list[tuple[str, str, float]], reports: list[Report]) -> str:
    from pando.cache.simulator.plot import hit_rate_page

    curves: dict[str, list[tuple[float, float]]] = {}
    several = len({admission for _, admission, _ in setups}) > 1
    for (policy, admission, budget), report in zip(setups, reports, strict=True):
        name = f"{policy}, {admission}" if several else policy
        curves.setdefault(name, []).append((budget, report.token_hit_rate))
    source = args.generate if args.trace is None else args.trace.name
    return hit_rate_page(f"{reports[0].model.name} on {source}, pages of {args.page_size}", curves)


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can not write {path}: {error.strerror or error}") from error
