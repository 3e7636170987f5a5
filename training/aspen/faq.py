"""What aspen says about itself, about Pando and about everyday things, read from `faq.txt`."""

from pathlib import Path

Entry = tuple[tuple[str, ...], tuple[str, ...]]
"""Phrasings of a question and their answers. The last phrasing is never trained on: it is the held-out check."""


def parse(text: str) -> dict[str, tuple[Entry, ...]]:
    """Entries per section. An entry is a run of `? ` lines followed by `! ` lines; `\\n` stands for a new line."""
    sections: dict[str, list[tuple[list[str], list[str]]]] = {}
    current: list[tuple[list[str], list[str]]] = []
    for line in text.splitlines():
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), [])
        elif line.startswith("? "):
            if not current or current[-1][1]:
                current.append(([], []))
            current[-1][0].append(line[2:])
        elif line.startswith("! "):
            current[-1][1].append(line[2:].replace("\\n", "\n"))
    return {
        name: tuple((tuple(questions), tuple(answers)) for questions, answers in entries)
        for name, entries in sections.items()
    }


_SECTIONS = parse(Path(__file__).with_name("faq.txt").read_text("utf-8"))
GREETINGS = _SECTIONS["greetings"]
PERSONA = _SECTIONS["persona"]
PANDO = _SECTIONS["pando"]
CREATIVE = _SECTIONS["creative"]
DEFINITIONS: dict[str, str] = {word: answer for (word,), (answer,) in _SECTIONS["definitions"]}
