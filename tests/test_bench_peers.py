"""The parts of `benchmarks.peers` that need no peer: workload, times, statistics, bounds, reports, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.peers import plot, process, report, summary
from benchmarks.peers.environments import BuildFailed, Installer, variables
from benchmarks.peers.limits import Limits, best, bound
from benchmarks.peers.machine import busy_seconds, tree, tree_peak_rss, tree_rss, tree_seconds
from benchmarks.peers.prepare import install
from benchmarks.peers.registry import ENGINES, ENVIRONMENTS, Environment
from benchmarks.peers.runner import MEMORY, START, Results, Row, value_of
from benchmarks.peers.session import Arrival, measure, tokens_at
from benchmarks.peers.workload import SCENARIOS, SHAPES, job, quick

MACHINE = Limits(read=78e9, bf16=980e9, int8=1980e9)


def row(engine: str, value: float, foreign: float = 0.0, scenario: str = "i", first: tuple[int, ...] = ()) -> Row:
    return Row(engine, "0.6b", scenario, 0, value, foreign, MACHINE, first)


# Workload


def test_the_large_shape_is_that_of_qwen3() -> None:
    shape = SHAPES["0.6b"]
    norms = shape.layers * (2 * shape.hidden + 2 * shape.head_dim) + shape.hidden
    assert shape.layer_weights + shape.head_weights + norms == 596_049_920
    assert 29e6 < SHAPES["30m"].layer_weights + SHAPES["30m"].head_weights < 31e6


@pytest.mark.parametrize("name", SCENARIOS)
def test_jobs_have_the_shape_of_their_scenario(name: str) -> None:
    scenario = SCENARIOS[name]
    made = job(scenario, 0)
    samples, primers = made["samples"], made["primers"]
    assert isinstance(samples, list) and isinstance(primers, list) and len(samples) == scenario.samples
    for prompts, primer in zip(samples, primers, strict=True):
        assert [len(prompt) for prompt in prompts] == [scenario.prefix + scenario.prompt] * scenario.requests
        assert len({tuple(prompt[: scenario.prefix]) for prompt in [*prompts, *primer]}) == 1
        assert len({tuple(prompt) for prompt in [*prompts, *primer]}) == scenario.requests + len(primer)
        assert len(primer) == scenario.primed
        assert all(300 <= token < SHAPES[scenario.model].vocab for prompt in prompts for token in prompt)


def test_ids_are_alike_for_all_engines_and_new_in_every_round_and_sample() -> None:
    scenario = SCENARIOS["i"]
    assert job(scenario, 1) == job(scenario, 1)
    samples = [prompts for index in range(2) for prompts in job(scenario, index)["samples"]]  # type: ignore[attr-defined]
    assert len({tuple(prompts[0]) for prompts in samples}) == 2 * scenario.samples


def test_quick_scenarios_are_small() -> None:
    assert all(quick(scenario).requests * quick(scenario).length < 500 for scenario in SCENARIOS.values())


# Times


def test_decode_rate_of_sequences_in_step() -> None:
    """Tokens of a step arrive one after the other; the rate must be that of the steps nevertheless."""
    arrivals = [Arrival(1.0 + 0.1 * step + 0.01 * index, index, 1) for step in range(11) for index in range(4)]
    figures = measure(arrivals, 3.0)
    assert figures["decode_tokens"] / figures["decode_seconds"] == pytest.approx(40.0)
    assert (figures["output_tokens"], figures["seconds"]) == (44, 3.0)
    assert figures["first_seconds"] == pytest.approx(1.03)


def test_decode_is_measured_while_all_sequences_run() -> None:
    """A sequence that began early and one that ended late count with their tokens in between only."""
    early = [Arrival(0.1 * step, 0, 1) for step in range(1, 31)]
    late = [Arrival(2.0 + 0.1 * step, 1, 1) for step in range(1, 31)]
    figures = measure(sorted([*early, *late], key=lambda arrival: arrival.seconds), 5.0)
    assert figures["decode_seconds"] == pytest.approx(0.9)
    assert figures["decode_tokens"] == pytest.approx(18)


def test_a_single_token_is_no_decode() -> None:
    figures = measure([Arrival(0.5, 0, 1)], 0.5)
    assert (figures["decode_tokens"], figures["decode_seconds"], figures["first_seconds"]) == (0, 0, 0.5)


def test_tokens_between_arrivals_of_several() -> None:
    curve = [(1.0, 1.0), (2.0, 5.0)]
    assert [tokens_at(curve, seconds) for seconds in (1.0, 1.25, 2.0, 3.0)] == [1.0, 2.0, 5.0, 5.0]


def test_figures_become_the_measure_of_the_scenario() -> None:
    figures = {"seconds": 8.0, "output_tokens": 2048, "first_seconds": 2.0, "decode_tokens": 90, "decode_seconds": 3.0}
    assert value_of(SCENARIOS["i"], figures) == 30
    assert value_of(SCENARIOS["ii"], figures) == 512
    assert value_of(SCENARIOS["iii"], figures) == 256


# Bounds


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    [
        ("i", 16, 64),
        ("i", 8, 126),
        ("ii", 16, 982),
        ("iii", 16, 203),
        ("ii", 8, 1771),
        ("iv", 8, 450),
        ("v-one", 16, 1280),
    ],
)
def test_bounds_of_a_machine(name: str, bits: int, expected: float) -> None:
    """Against figures worked out by hand for two cores with 78 GB/s and 980 Gop/s."""
    assert bound(SCENARIOS[name], bits, MACHINE) == pytest.approx(expected, rel=0.05)


def test_no_bound_without_the_instruction_and_a_cold_prefix_costs() -> None:
    assert bound(SCENARIOS["i"], 16, Limits(read=1e10)) is None
    cold, primed = (bound(SCENARIOS[name], 16, MACHINE) for name in ("iv-cold", "iv"))
    assert cold is not None and primed is not None and cold < primed
    assert best(Limits(1.0, 5.0), Limits(2.0, 3.0, 4.0)) == Limits(2.0, 5.0, 4.0)


# Statistics


def test_noisy_samples_are_left_out_if_there_are_quiet_ones() -> None:
    rows = [row("pando bf16", 60.0), row("pando bf16", 64.0), row("pando bf16", 20.0, foreign=0.9)]
    cell = summary.cell(rows, SCENARIOS["i"], 16)
    assert (cell.median, cell.low, cell.high, cell.count, cell.noisy) == (62.0, 60.0, 64.0, 2, False)
    assert cell.spread == pytest.approx(2 / 62)
    assert cell.of_bound == pytest.approx(62 / 64, rel=0.02)


def test_only_noisy_samples_are_marked() -> None:
    cell = summary.cell([row("pando bf16", 20.0, foreign=0.9)], None, 16)
    assert (cell.median, cell.noisy, cell.of_bound) == (20.0, True, None)


def test_the_best_peer_is_chosen_by_width_and_direction() -> None:
    rows = [
        row("pando bf16", 60.0),
        row("vllm bf16", 28.0),
        row("llama-bench bf16", 42.0),
        row("pando w8a8", 90.0),
        row("pando int8", 100.0),
        row("llama.cpp q8_0", 50.0),
        row("llama.cpp q4_0", 80.0),
        row("pando bf16", 2.0, scenario=START),
        row("vllm bf16", 90.0, scenario=START),
        row("openvino bf16", 3.0, scenario=START),
    ]
    found = summary.compare(summary.cells(rows, SCENARIOS.values()), ["i", START])
    assert [(each.scenario, each.engine, each.peers, each.peer, round(each.ratio, 3)) for each in found] == [
        ("i", "pando bf16", "16 bits", "llama-bench bf16", 1.429),
        ("i", "pando int8", "8 bits", "llama.cpp q8_0", 2.0),
        ("i", "pando int8", "8 bits or fewer", "llama.cpp q4_0", 1.25),
        (START, "pando bf16", "16 bits", "openvino bf16", 1.5),
    ]


def test_agreement_is_with_the_majority_of_16_bit_engines() -> None:
    first = {"pando bf16": (5, 6), "vllm bf16": (5, 6), "openvino bf16": (5, 7), "llama.cpp q4_0": (9, 6)}
    shares = summary.agreement([row(engine, 1.0, first=tokens) for engine, tokens in first.items()])
    assert shares == {"pando bf16": 1.0, "vllm bf16": 1.0, "openvino bf16": 0.5, "llama.cpp q4_0": 0.5}


# Reports


@pytest.fixture
def made() -> report.Report:
    rows = [row("pando bf16", 60.0), row("vllm bf16", 28.0, foreign=1.0), row("pando bf16", 3e9, scenario=MEMORY)]
    failures = {("llama.cpp q8_0", ""): "no compiler", ("vllm bf16", "ii"): "RuntimeError: full"}
    rows.append(row("pando bf16", 700.0, scenario="ii"))
    return report.Report(Results(rows, failures), list(SCENARIOS.values()), "a machine", "abc", "a command")


def test_the_page_shows_figures_noise_and_failures(made: report.Report) -> None:
    page = made.markdown()
    assert "| engine | i | ii | memory |" in page
    assert "| pando bf16 | 60.0 ±0% (1) | 700 ±0% (1) | 3.00 ±0% (1) |" in page
    assert "| vllm bf16 | 28.0* ±0% (1) | failed |  |" in page
    assert "| llama.cpp q8_0 | failed | failed | failed |" in page
    assert "- llama.cpp q8_0 : no compiler" in page
    assert "| i | pando bf16 | 60.0 | 16 bits | vllm bf16 | 28.0 | 2.14 |" in page
    assert "read 78 GB/s" in page


def test_the_page_is_put_between_its_markers(made: report.Report, tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.insert(document, "new")
    assert document.read_text() == f"before\n{report.BEGIN}\n\nnew\n{report.END}\nafter\n"
    document.write_text("no markers")
    with pytest.raises(ValueError, match="peers:begin"):
        report.insert(document, "new")


def test_the_plot_has_a_bar_for_every_cell(made: report.Report) -> None:
    titles = {name: "less < more" for name in made.names()}
    tree = ElementTree.fromstring(plot.svg(made.cells(), made.names(), titles))
    bars = [each for each in tree.iter("{http://www.w3.org/2000/svg}rect") if each.get("fill") in (plot.OWN, plot.PEER)]
    assert len(bars) == len(made.cells()) == 4


def test_the_repository_has_the_page_with_markers() -> None:
    page = (process.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page.index(report.BEGIN) < page.index(report.END)


# The machine and processes


def test_busy_seconds_leave_idle_and_waiting_out() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    text = f"cpu  {ticks} {ticks} {ticks} 9999 9999 {ticks} {ticks} {ticks} 5 5\ncpu0 1 1 1 1"
    assert busy_seconds(text) == 6.0


def test_a_process_tree_is_found_and_its_time_and_memory_counted() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in tree(os.getpid()) and os.getpid() not in tree(child.pid)
        assert tree_rss(os.getpid()) > tree_rss(child.pid)
        now = tree_rss(child.pid)
        assert tree_peak_rss(child.pid) >= now > 1 << 20
        child.kill()
    before, end = tree_seconds(os.getpid()), time.process_time() + 0.2
    while time.process_time() < end:
        pass
    assert tree_seconds(os.getpid()) >= before + 0.1


FAKE = textwrap.dedent(
    """
    from benchmarks.peers.session import Timed, serve

    class Fake:
        version = "1.2"

        def generate(self, work, arrived):
            print("noise on stdout")
            if work.num_tokens == 7:
                raise OSError("no room")
            for step in range(work.num_tokens):
                for index in range(len(work.prompts)):
                    arrived(index, [step + work.prefix])

    serve(lambda settings: Timed(Fake()))
    """
)


def order(*jobs: dict[str, object]) -> dict[str, object]:
    settings = {"model": "m", "variant": "v", "context": 64, "pool_tokens": 64, "requests": 2, "threads": 1}
    return {"settings": settings, "jobs": list(jobs)}


def fake_job(name: str, num_tokens: int) -> dict[str, object]:
    return {"scenario": name, "num_tokens": num_tokens, "prefix": 1, "samples": [[[1, 2], [1, 3]]], "primers": [[[1]]]}


def test_an_engine_process_reports_samples_and_failures(tmp_path: Path) -> None:
    """The job after the failing one is run too; what the engine prints goes to the log."""
    jobs = order(fake_job("i", 3), fake_job("ii", 7), fake_job("iii", 4))
    outcome = process.run([sys.executable, "-c", FAKE], {}, jobs, tmp_path / "log")
    assert (outcome.version, outcome.failures) == ("1.2", {"ii": "OSError: no room"})
    assert outcome.ready_seconds is not None and outcome.ready_seconds > 0 and outcome.ready_bytes > 1 << 20
    assert [(each["scenario"], each["output_tokens"]) for each in outcome.samples] == [("i", 6), ("iii", 8)]
    assert outcome.samples[0]["first_tokens"] == [1, 1]
    assert "noise on stdout" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("code", ["raise SystemExit('no such library')", "import os; os.close(0); os._exit(3)"])
def test_an_engine_that_does_not_start_is_a_failure(code: str, tmp_path: Path) -> None:
    outcome = process.run([sys.executable, "-c", code], {}, order(fake_job("i", 3)), tmp_path / "log")
    assert outcome.ready_seconds is None and outcome.samples == []
    assert outcome.failures[""].startswith("ended with status ")


def test_an_environment_that_can_not_be_made_says_why(tmp_path: Path) -> None:
    installer = Installer(tmp_path)
    with pytest.raises(BuildFailed, match="broken: it said this"):
        installer.run(Environment("broken", (), "nothing"), [sys.executable, "-c", "raise SystemExit('it said this')"])


def test_engines_without_an_environment_are_failures_of_the_run(tmp_path: Path) -> None:
    results = Results()
    engines = [ENGINES["pando bf16"], ENGINES["vllm bf16"]]
    assert install(Installer(tmp_path), engines, results, allowed=False) == engines[:1]
    assert results.failures == {("vllm bf16", ""): "not installed"}


def test_an_installed_environment_is_left_alone(tmp_path: Path) -> None:
    environment = ENVIRONMENTS["transformers"]
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "installed.json").write_text(json.dumps(environment.packages))
    Installer(tmp_path).install(environment)
    assert [path.name for path in tmp_path.iterdir()] == ["transformers"]


def test_peers_get_all_cores(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    settings = variables(tmp_path / "vllm")
    assert settings["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, cpus))
    assert settings["OMP_NUM_THREADS"] == str(len(cpus))
    assert variables(tmp_path / "llama.cpp")["LLAMA_BENCH"].startswith(str(tmp_path))


def test_registry_is_consistent() -> None:
    adapters = {path.stem for path in (process.ROOT / "benchmarks" / "peers" / "engines").glob("*.py")}
    for engine in ENGINES.values():
        assert engine.adapter in adapters
        assert not engine.is_peer or engine.environment in ENVIRONMENTS
        assert all(name in SCENARIOS for name in (*engine.only, *engine.skip))
