"""Measures Pando and its peers on this machine: `python -m benchmarks.peers`.

The first run makes a virtual environment per peer and the test models below --work (about 12 GB and half an hour on two
cores). Then engines run one at a time, round by round; figures, table and plot are written to WORK/results after every
engine. Nothing else should run meanwhile. --publish puts the results into the repository.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.peers import limits, plot
from benchmarks.peers.environments import Installer
from benchmarks.peers.machine import cores
from benchmarks.peers.prepare import convert, install
from benchmarks.peers.process import ROOT
from benchmarks.peers.registry import ENGINES
from benchmarks.peers.report import TITLES, Report, insert
from benchmarks.peers.runner import START, Results, Runner
from benchmarks.peers.workload import SCENARIOS, quick


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    words.add_argument("--work", type=Path, default=Path("~/.cache/pando-bench"), help="environments, models, results")
    words.add_argument("--engine", action="append", default=[], help="name, or its first words; may be repeated")
    words.add_argument("--scenario", action="append", default=[], choices=[*SCENARIOS, START], help="may be repeated")
    words.add_argument("--repeat", type=int, default=3, help="rounds")
    words.add_argument("--quick", action="store_true", help="one round of tiny scenarios, to see that everything works")
    words.add_argument("--pip-args", default="", help="options for every pip install and download, in one string")
    words.add_argument("--no-install", action="store_true", help="leave out peers whose environment is not there")
    words.add_argument("--publish", action="store_true", help="write docs/performance.md and benchmarks/results/")
    return words


def main(arguments: Sequence[str]) -> int:
    """Install, make models, measure, report; 1 if nothing could be measured."""
    options = parser().parse_args(arguments)
    work = options.work.expanduser().resolve()
    scenarios = [SCENARIOS[name] for name in SCENARIOS if not options.scenario or name in options.scenario]
    scenarios = [quick(scenario) for scenario in scenarios] if options.quick else scenarios
    chosen = [
        e
        for e in ENGINES.values()
        if not options.engine or any(f"{e.name} ".startswith(f"{n} ") for n in options.engine)
    ]
    if not chosen:
        raise SystemExit(f"no engine is called {options.engine}; there are: {', '.join(ENGINES)}")
    installer = Installer(work / "environments", options.pip_args)
    results = Results()
    ready = install(installer, chosen, results, allowed=not options.no_install)
    ready = convert(installer, ready, work / "models", results)
    (work / "results" / "logs").mkdir(parents=True, exist_ok=True)
    program = limits.build(work)
    with_start = not options.scenario or START in options.scenario
    runner = Runner(
        installer, work / "models", work / "results" / "logs", scenarios, lambda: limits.measure(program), with_start
    )
    command = shlex.join(["python", "-m", "benchmarks.peers", *arguments])
    report = Report(results, scenarios, _machine(), _commit(), command)
    for _ in runner.run(ready, 1 if options.quick else options.repeat, results):
        write(report, work / "results")
    print(report.markdown())
    if options.publish:
        publish(report)
    return 0 if results.rows else 1


def write(report: Report, folder: Path) -> None:
    """peers.json, peers.md and peers.svg in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    results = report.results
    raw = {
        "machine": report.machine,
        "commit": report.commit,
        "command": report.command,
        "versions": results.versions,
        "failures": [[*key, message] for key, message in results.failures.items()],
        "rows": [asdict(row) for row in results.rows],
    }
    (folder / "peers.json").write_text(json.dumps(raw, indent=1) + "\n")
    (folder / "peers.md").write_text(report.markdown())
    titles = {each.name: each.title for each in report.scenarios} | TITLES
    (folder / "peers.svg").write_text(plot.svg(report.cells(), report.names(), titles))


def publish(report: Report) -> None:
    """The results into the repository: the table into the page, the raw rows and the plot beside."""
    write(report, ROOT / "benchmarks" / "results")
    (ROOT / "benchmarks" / "results" / "peers.svg").replace(ROOT / "docs" / "images" / "peers.svg")
    insert(ROOT / "docs" / "performance.md", report.markdown() + "\n![Medians by scenario](images/peers.svg)\n")


def _machine() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {cores()} cores, {platform.system()}"


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    # An engine is a session of its own; ending in order is what takes it along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
