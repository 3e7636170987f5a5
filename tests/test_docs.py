"""Code in the README and the documentation runs; links lead somewhere; the commands shown can be parsed.

Python blocks of a page are executed in order and share their names. A page that talks to 127.0.0.1:30000 gets the
address of a server that runs for the test.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from pando.cli.parser import parse
from pando.env import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(?P<lang>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
ADDRESS = "http://127.0.0.1:30000"


def blocks(name: str, lang: str) -> list[str]:
    """A page's blocks in one language."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [found["code"] for found in FENCE.finditer(text) if found["lang"] == lang]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Base URL of a server with the built-in model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pando", "serve", "--port", str(port), "--num-threads", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not _answers(port):
            assert process.poll() is None, f"the server ended: {process.communicate()[0]}"
            assert time.monotonic() < deadline, "the server did not become ready"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _answers(port: int) -> bool:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    broken = []
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")) and not (page.parent / target).exists():
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("name", NAMES)
def test_files_it_names_exist(name: str) -> None:
    """Paths in backquotes that look like files of this repository."""
    text = (ROOT / name).read_text(encoding="utf-8")
    roots = ("pando", "tests", "benchmarks", "docs", "examples", "csrc", "training")
    named = set(re.findall(rf"`((?:{'|'.join(roots)})/[\w./-]+)`", text))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    inner = set(
        re.findall(r"`((?:core|server|scheduler|cache|runtime|models|layers|attention|tokenizer)/\w+\.py)`", text)
    )
    assert [path for path in sorted(inner) if not (ROOT / "pando" / path).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_commands_can_be_parsed(name: str) -> None:
    for code in blocks(name, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            command = line.split("|")[-1].split("#")[0].strip().removesuffix("&").strip()
            if command.startswith("pando "):
                assert hasattr(parse(shlex.split(command)[1:]), "run"), command


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "python")])
def test_python_runs(name: str, request: pytest.FixtureRequest) -> None:
    """Executed in one namespace per page; whatever a block prints is only checked to be there."""
    codes = blocks(name, "python")
    url = request.getfixturevalue("server") if any(ADDRESS in code for code in codes) else ADDRESS
    names: dict[str, object] = {"__name__": "documentation"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for code in codes:
            exec(compile(code.replace(ADDRESS, url), f"{name}: {code.splitlines()[0]}", "exec"), names)
    assert bool(printed.getvalue().strip()) == any("print(" in code for code in codes)
    names.clear()
    with warnings.catch_warnings():  # samples do not close their clients; the next test must not pay for it
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_curl_of_the_readme_answers(server: str) -> None:
    """The request that the command makes; curl itself may be missing."""
    (command,) = [code for code in blocks("README.md", "bash") if code.startswith("curl")]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[1].startswith(ADDRESS)
    body = words[words.index("-d") + 1]
    headers = dict([words[words.index("-H") + 1].split(": ")])
    request = urllib.request.Request(words[1].replace(ADDRESS, server), body.encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        assert json.load(response)["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_examples_run(example: str, request: pytest.FixtureRequest) -> None:
    path = ROOT / "examples" / example
    needs_server = ADDRESS in path.read_text(encoding="utf-8")
    arguments = [request.getfixturevalue("server")] if needs_server else []
    done = subprocess.run(
        [sys.executable, str(path), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_environment_variables_are_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [name for name in VARIABLES if f"`{name}`" not in page] == []


def test_sampling_page_lists_every_parameter() -> None:
    from pando.core.sampling import SamplingParams

    page = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert sorted(listed) == sorted(set(SamplingParams.__struct_fields__) - {"grammar"})


def test_every_page_is_reachable_from_the_readme() -> None:
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in re.findall(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            todo.append((page.parent / target).resolve())
    assert [str(page) for page in PAGES if page not in seen] == []
