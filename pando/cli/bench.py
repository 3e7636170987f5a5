"""`pando bench serving|offline|sweep`: measure a server or the engine."""

from __future__ import annotations

import argparse

from pando.cli.flags import SERVER_FIELDS, add_config_flags, config_from

SUMMARY = "measure a server (serving, sweep) or the engine (offline)"


def add_workload_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that describe the requests to send."""
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--dataset",
        choices=("random", "shared-prefix", "multi-turn"),
        default="random",
        help="random token ids; groups of prompts with a common prefix; conversations (default random)",
    )
    for flag, default, text in (
        ("--num-prompts", 64, "requests (multi-turn: conversations)"),
        ("--input-len", 256, "tokens of a prompt, its shared part not counted (multi-turn: of a user turn)"),
        ("--output-len", 64, "tokens to generate per request"),
        ("--prefix-len", 512, "shared-prefix: tokens of each shared prefix; multi-turn: of the first system prompt"),
        ("--num-groups", 4, "shared-prefix: number of different prefixes"),
        ("--num-turns", 4, "multi-turn: turns of a conversation"),
        ("--workload-seed", 0, "seed of lengths, groups and arrival times"),
    ):
        group.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} (default {default})")
    group.add_argument(
        "--content-seed", type=int, metavar="N", help="seed of the token ids (default: new ones in every run)"
    )
    group.add_argument(
        "--length-spread",
        type=float,
        default=0.0,
        metavar="X",
        help="0: all prompts and outputs have the given length; 1: uniform between 1 and twice it (default 0)",
    )


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which server to measure and where to save the result."""
    parser.add_argument("--url", "--base-url", default="http://127.0.0.1:30000", help="server to measure")
    parser.add_argument("--api-key", dest="key", metavar="KEY", help="key (default: $PANDO_API_KEY)")
    parser.add_argument(
        "--api", choices=("native", "completions"), default="native", help="route to call (default native: /generate)"
    )
    parser.add_argument("--output-file", metavar="FILE", help="save the result as JSON")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the three commands below `bench`."""
    commands = parser.add_subparsers(metavar="WHAT", dest="what", required=True)
    serving = commands.add_parser("serving", help="load on a running server", allow_abbrev=False)
    add_server_flags(serving)
    load = serving.add_mutually_exclusive_group()
    load.add_argument("--request-rate", type=float, metavar="X", help="requests per second, Poisson arrivals")
    load.add_argument("--max-concurrency", type=int, metavar="N", help="requests in flight (default 16)")
    add_workload_flags(serving)
    serving.set_defaults(run=run_serving, prog=serving.prog)

    sweep = commands.add_parser("sweep", help="serving at several concurrencies", allow_abbrev=False)
    add_server_flags(sweep)
    sweep.add_argument(
        "--concurrencies", default="1,2,4,8,16,32", metavar="LIST", help="comma separated (default 1,2,4,8,16,32)"
    )
    add_workload_flags(sweep)
    sweep.set_defaults(run=run_sweep, prog=sweep.prog)

    offline = commands.add_parser("offline", help="the engine alone, in this process", allow_abbrev=False)
    offline.add_argument("model", nargs="?", metavar="MODEL", help="built-in name, folder or hub id (default aspen)")
    offline.add_argument("--output-file", metavar="FILE", help="save the result as JSON")
    offline.add_argument("--no-progress", action="store_true", help="no progress bar")
    add_workload_flags(offline)
    add_config_flags(offline, skip=SERVER_FIELDS)
    offline.set_defaults(run=run_offline, prog=offline.prog)


def run_serving(args: argparse.Namespace) -> int:
    """Measure once; 1 if a request failed."""
    from pando.bench import report, serving, workload

    result = serving.measure(
        serving.Target.of(args.url, args.key, args.api),
        workload.Workload.from_args(vars(args)),
        request_rate=args.request_rate,
        max_concurrency=args.max_concurrency or (None if args.request_rate else 16),
        progress=not args.no_progress,
    )
    print(report.table(result))
    report.save([result], args.output_file)
    return 1 if result.errors else 0


def run_sweep(args: argparse.Namespace) -> int:
    """Measure at each concurrency; 1 if a request failed."""
    from pando.bench import report, serving, workload

    results = []
    for concurrency in [int(text) for text in args.concurrencies.split(",")]:
        results.append(
            serving.measure(
                serving.Target.of(args.url, args.key, args.api),
                workload.Workload.from_args(vars(args)),
                request_rate=None,
                max_concurrency=concurrency,
                progress=not args.no_progress,
            )
        )
        print(report.row(results[-1], header=len(results) == 1))
    report.save(results, args.output_file)
    return 1 if any(result.errors for result in results) else 0


def run_offline(args: argparse.Namespace) -> int:
    """Measure the engine."""
    from pando.bench import offline, report, workload

    work = workload.Workload.from_args(vars(args))
    result = offline.measure(config_from(args, args.model), work, progress=not args.no_progress)
    print(report.table(result))
    report.save([result], args.output_file)
    return 0
