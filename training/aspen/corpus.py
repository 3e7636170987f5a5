"""Collect the text part of the training data: permissively licensed documentation and sources on this machine.

    python -m training.aspen.corpus --work DIR [--python-doc HTML_FOLDER]

Writes `DIR/text/<source>.jsonl`, one `{"path", "text", "heldout"}` a line. About one document in a
hundred is held out, by its path.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import sysconfig
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from training.aspen.paths import default_work

MAX_FILE_BYTES = 200_000
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_pyrepl",
    "lib2to3",
    "testing",
    "_vendor",
}
BLOCK_TAGS = {"p", "li", "dt", "dd", "h1", "h2", "h3", "h4", "tr", "pre", "div", "blockquote"}
VOID_TAGS = {"br", "img", "hr", "meta", "link", "input", "col", "wbr", "source"}
SKIPPED_TAGS = {"script", "style", "nav", "head", "form", "footer"}


class PageText(HTMLParser):
    """Plain text of the main part (`role="main"`) of a documentation page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.depth = 0
        self.main_depth: int | None = None
        self.skip_depth: int | None = None
        self.in_pre = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Track nesting, and break lines before block elements."""
        if tag in VOID_TAGS:
            return
        self.depth += 1
        values = dict(attrs)
        if values.get("role") == "main" and self.main_depth is None:
            self.main_depth = self.depth
        hidden = tag in SKIPPED_TAGS or "headerlink" in (values.get("class") or "")
        if hidden and self.skip_depth is None:
            self.skip_depth = self.depth
        inside = self.main_depth is not None and self.main_depth >= 0 and self.skip_depth is None
        if inside and tag in BLOCK_TAGS:
            self.parts.append("\n\n" if tag in {"p", "pre", "h1", "h2", "h3", "dt"} else "\n")
        if inside and tag in {"h1", "h2", "h3"}:
            self.parts.append("#" * int(tag[1]) + " ")
        if inside and tag == "li":
            self.parts.append("- ")
        self.in_pre = self.in_pre or tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        """Undo what the matching start tag opened."""
        if tag in VOID_TAGS:
            return
        if self.skip_depth == self.depth:
            self.skip_depth = None
        if self.main_depth == self.depth:
            self.main_depth = -1
        if tag == "pre":
            self.in_pre = False
        self.depth -= 1

    def handle_data(self, data: str) -> None:
        """Keep visible text of the main part."""
        if self.main_depth is None or self.main_depth < 0 or self.skip_depth is not None:
            return
        self.parts.append(data if self.in_pre else re.sub(r"\s+", " ", data))


def page_text(html: str) -> str:
    """Plain text of one documentation page, paragraphs separated by an empty line."""
    parser = PageText()
    parser.feed(html)
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts).replace("\u00b6", ""))
    text = re.sub(r"\n +(?=\S)", lambda match: match.group() if "  " in match.group() else "\n", text)
    text = re.sub(r"(?m)^- \n+", "- ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def docstrings(source: str) -> str:
    """Every docstring of a module, each after the signature it documents."""
    pieces: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            continue
        text = ast.get_docstring(node)
        if not text or len(text) < 40:
            continue
        if isinstance(node, ast.FunctionDef):
            pieces.append(f"def {node.name}({', '.join(a.arg for a in node.args.args)}):")
        elif isinstance(node, ast.ClassDef):
            pieces.append(f"class {node.name}:")
        pieces.append(text + "\n")
    return "\n".join(pieces)


def python_files(root: Path) -> Iterator[Path]:
    """Python sources below `root`, in a stable order, without tests."""
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]) and path.stat().st_size <= MAX_FILE_BYTES:
            yield path


def package_root(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"package {name!r} is not installed; install it to rebuild the corpus")
    return Path(spec.origin).parent


def documents(python_doc: Path | None) -> Iterator[tuple[str, str, str]]:
    """Yield (source, path, text) of everything in the corpus."""
    if python_doc is not None:
        for path in sorted(python_doc.rglob("*.html")):
            if path.name not in {"genindex-all.html", "search.html", "changelog.html"} and "genindex" not in path.name:
                yield "python-doc", str(path.relative_to(python_doc)), page_text(path.read_text("utf-8", "replace"))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in python_files(stdlib):
        yield "stdlib", str(path.relative_to(stdlib)), path.read_text("utf-8", "replace")
    for name in ("numpy", "torch", "transformers"):
        root = package_root(name)
        for path in python_files(root):
            source = path.read_text("utf-8", "replace")
            try:
                yield f"{name}-docstrings", str(path.relative_to(root)), docstrings(source)
            except SyntaxError:
                continue
            if len(source) < 30_000 and name != "transformers":
                yield f"{name}-sources", str(path.relative_to(root)), source


def is_heldout(path: str) -> bool:
    """Whether the document at `path` belongs to the validation split."""
    return hashlib.sha256(path.encode()).digest()[0] < 3


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--python-doc", type=Path, default=Path("/usr/share/doc/python3.11/html"))
    args = parser.parse_args()
    folder = args.work / "text"
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, list[str]] = {}
    seen: set[str] = set()
    for source, path, text in documents(args.python_doc if args.python_doc.is_dir() else None):
        digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
        if len(text) < 200 or digest in seen:
            continue
        seen.add(digest)
        line = json.dumps({"path": path, "text": text, "heldout": is_heldout(path)})
        written.setdefault(source, []).append(line)
    for source, lines in written.items():
        (folder / f"{source}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        print(f"{source}: {len(lines)} documents, {sum(map(len, lines)) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
