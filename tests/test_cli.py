"""The `pando` command as a whole: quick to answer, clean when something is wrong, right exit codes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import pando
from pando import launch_server
from pando.cli import main
from tests.cli import fake_api

ROOT = Path(__file__).resolve().parent.parent


def pando_command(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pando", *words], cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=120
    )


def test_help_is_quick() -> None:
    """The best of five, because the machine that runs the tests does other things, too."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = pando_command("--help")
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and "serve a model" in done.stdout
    assert min(times) < 0.3


def test_parsing_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from pando.cli.parser import parse\n"
        "parse(['serve', '--port', '1'])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'uvicorn', 'starlette', 'rich', 'msgspec', 'asyncio'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"parsing imports {done.stderr}"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"pando {pando.__version__}\n"


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["serve", "--pot", "1"], "pando serve: unknown flag --pot; did you mean --port?"),
        (["serve", "--page-size", "0"], "pando: page_size is 0"),
        (["plan", "/nowhere/at/all"], "pando: '/nowhere/at/all' is no local folder"),
        (["generate", "--url", "http://127.0.0.1:9", "hi"], "pando: no answer from http://127.0.0.1:9"),
        (["generate", "a", "b", "c"], "put the prompt in quotes"),
    ],
)
def test_mistakes_give_one_line_and_exit_code_two(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error


def test_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("pando.cli.system.run_version", interrupted)
    assert main(["version"]) == 130
    assert capsys.readouterr().err.endswith("stopped\n")


def test_launch_server_is_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("pando.cli.serve.run", lambda args: seen.append(args) or 0)
    assert launch_server.main(["--model-path", "M", "--port", "30001"]) == 0
    assert (seen[0].model_path, seen[0].port) == ("M", 30001)


def test_generate_from_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_api.running() as api:
        assert main(["generate", "--url", api.url, "two words", "--stats", "--temperature", "0"]) == 0
        shown = capsys.readouterr()
        assert shown.out == "echo: two words\n"
        assert "10 prompt tokens (4 cached), 3 new, stop" in shown.err
        assert api.requests[0][1]["temperature"] == 0.0
        assert main(["generate", "--url", api.url, "--raw", "plain"]) == 0
        assert api.requests[1][0] == "/v1/completions"


def test_generate_reads_standard_input() -> None:
    with fake_api.running() as api:
        done = pando_command("generate", "--url", api.url, stdin="from a pipe")
        assert (done.returncode, done.stdout) == (0, "echo: from a pipe\n")


def test_chat_with_a_server() -> None:
    with fake_api.running() as api:
        done = pando_command("chat", "--url", api.url, "--system", "s", stdin="hello\n/stats\n/quit\n")
        assert done.returncode == 0, done.stderr
        assert "echo: hello" in done.stdout and "1 turns" in done.stdout
        assert api.requests[0][1]["messages"][0] == {"role": "system", "content": "s"}


def test_url_and_model_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "some-model", "--url", "http://127.0.0.1:9"]) == 2
    assert "not both" in capsys.readouterr().err
