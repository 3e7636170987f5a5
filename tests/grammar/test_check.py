"""`pando grammar check`: lines in, lines and a summary out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from pando.cli import main
from pando.core.sampling import GrammarOptions
from pando.grammar.check import Checker, spread
from tests import tiny_tokenizers
from tests.grammar.vocabularies import backend

LINES: list[dict[str, Any]] = [
    {
        "id": "plain",
        "schema": {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}, "required": ["b"]},
        "valid": [{"a": 1, "b": 2}, {"b": 3, "c": "ü\u2028"}],
        "invalid": [{"a": 1}, {"b": "x"}],
    },
    {"id": "unique", "schema": {"type": "array", "uniqueItems": True}, "valid": [[1, 2]], "invalid": [[1, 1]]},
    {"id": 7, "schema": {"type": "what"}, "valid": [1], "invalid": [2]},
]


def write(folder: Path) -> str:
    file = folder / "schemas.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in LINES) + "\n\n", encoding="utf-8")
    return str(file)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_tokenizers.write_folder(tmp_path / "model")
    assert main(["grammar", "check", write(tmp_path), "--tokenizer", str(folder)]) == 0
    shown = capsys.readouterr()
    plain, unique, broken = (json.loads(line) for line in shown.out.split("\n")[:3])
    assert list(plain) == (
        "id compiled error flagged compile_ms valid_accepted invalid_accepted tokens forced_tokens mask_us".split()
    )
    assert plain["valid_accepted"] == [True, True] and plain["invalid_accepted"] == [False, False]
    assert plain["compiled"] and plain["error"] is None and not plain["flagged"] and plain["compile_ms"] > 0
    assert plain["tokens"] > plain["forced_tokens"] > 0
    assert set(plain["mask_us"]) == {"avg", "p50", "p99", "max"} and plain["mask_us"]["max"] >= plain["mask_us"]["p50"]
    assert unique["flagged"] and unique["valid_accepted"] == [True] and unique["invalid_accepted"] == [False]
    assert broken["id"] == 7 and not broken["compiled"] and "#/type" in broken["error"]
    assert broken["valid_accepted"] == [False] and broken["invalid_accepted"] == [False]
    assert "schemas 3: 2 compiled, 1 flagged, 2 fully right (66.7 %)" in shown.err
    assert "valid accepted 3/4, invalid accepted 0/4" in shown.err


def test_strict_and_the_built_in_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(Path(write(tmp_path)).read_text(encoding="utf-8")))
    assert main(["grammar", "check", "-", "--strict"]) == 0
    shown = capsys.readouterr()
    assert [json.loads(line)["compiled"] for line in shown.out.strip().split("\n")] == [True, False, False]
    assert "0 flagged" in shown.err


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "line 1 is not JSON"), ('\n{"id": 1}', "line 2: give an object"), (None, "can not be read")],
)
def test_faults_of_the_file(text: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.jsonl"
    if text is not None:
        file.write_text(text)
    assert main(["grammar", "check", str(file)]) == 2
    assert says in capsys.readouterr().err


def test_times_and_counts_add_up() -> None:
    checker = Checker(backend(), GrammarOptions())
    results = [checker.check_line(line) for line in LINES]
    assert checker.summary.tally.tokens == sum(result["tokens"] for result in results)
    assert len(checker.summary.compile_ms) == 2 and (checker.summary.right, checker.summary.schemas) == (2, 3)
    assert len(checker.summary.tally.mask_us) >= checker.summary.tally.tokens


def test_spread() -> None:
    assert spread([]) == {"avg": 0.0, "p50": 0.0, "p99": 0.0, "max": 0.0}
    assert spread(list(range(101))) == {"avg": 50.0, "p50": 50, "p99": 99, "max": 100}
