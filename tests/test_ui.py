"""The first page's files: small, self-contained, and without ways for model text to become markup."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

UI = Path(__file__).resolve().parent.parent / "pando" / "server" / "ui"
FILES = sorted(path.name for path in UI.iterdir())


def text(name: str) -> str:
    return (UI / name).read_text(encoding="utf-8")


def test_is_small() -> None:
    assert {"index.html", "style.css", "app.js", "icon.svg"} <= set(FILES)
    assert sum((UI / name).stat().st_size for name in FILES) < 60_000


@pytest.mark.parametrize("name", FILES)
def test_asks_nobody_else(name: str) -> None:
    """No address of another host, apart from the name of the SVG dialect."""
    hosts = set(re.findall(r"https?://[\w.-]+", text(name))) - {"http://www.w3.org"}
    assert not hosts
    assert not re.search(r"\burl\(|@import|\bimport\(", text(name))


@pytest.mark.parametrize("name", FILES)
def test_model_text_never_becomes_markup(name: str) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|DOMParser"
    assert not re.search(forbidden, text(name))


def test_obeys_its_content_policy() -> None:
    """`default-src 'self'` forbids inline scripts, styles and handlers."""
    page = text("index.html")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page)


@pytest.mark.parametrize("name", FILES)
def test_files_it_names_exist(name: str) -> None:
    named = set(re.findall(r"""["']/ui/([\w.]+)["']""", text(name)))
    assert named <= set(FILES)


def test_elements_it_asks_for_exist() -> None:
    asked = set(re.findall(r"\$\('([\w-]+)'\)", text("app.js")))
    there = set(re.findall(r'\bid="([\w-]+)"', text("index.html")))
    assert asked <= there and len(asked) > 15


def test_buttons_without_words_have_names() -> None:
    for button in re.findall(r"<button([^>]*)>\s*<svg", text("index.html")):
        assert "aria-label=" in button
