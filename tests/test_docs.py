"""Code in the README and the documentation runs; links lead somewhere; the commands shown can be parsed.

A Python block is executed unless the comment `<!-- not run: reason -->` stands before it. Blocks of one page share
their names, in order. A page with `<!-- needs: server -->` gets the address of a running server: 127.0.0.1:30000 in its
text is replaced.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pando.cli.parser import parse
from pando.env import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"(?P<mark><!--[^>]*-->\s*)?^```(?P<lang>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(name: str, lang: str) -> list[tuple[str, str]]:
    """(comment before the block, code) of a page's blocks in one language."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [(m["mark"] or "", m["code"]) for m in FENCE.finditer(text) if m["lang"] == lang]


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
    for _, code in blocks(name, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            command = line.split("|")[-1].split("#")[0].strip().removesuffix("&").strip()
            if command.startswith("pando "):
                assert hasattr(parse(shlex.split(command)[1:]), "run"), command


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
