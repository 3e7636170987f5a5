"""Many questions about one text, in one process: the text is computed once.

python examples/shared_prefix.py [MODEL]
"""

from __future__ import annotations

import sys

import pando

TEXT = (
    "Anna lives in Bremen and is a baker. Ben lives in Oslo and is a pilot. Clara lives in Porto and is a nurse. "
    "David lives in Vienna and is a teacher. Emma lives in Turin and is a gardener. "
)
NAMES = ("Anna", "Ben", "Clara", "David", "Emma")


def main(model: str) -> None:
    """Ask where each person lives, all at once."""
    with pando.Engine(model) as engine:
        template = engine.tokenizer.chat_template
        questions = [f"{TEXT}\n\nWhere does {name} live?" for name in NAMES]
        prompts = [template.render([{"role": "user", "content": q}]) if template else q for q in questions]
        replies = engine.generate(prompts, {"max_new_tokens": 24, "temperature": 0})
        assert isinstance(replies, list)
        for name, reply in zip(NAMES, replies, strict=True):
            print(f"{name}: {reply['text'].strip()!r}")
        total = sum(reply["meta_info"]["prompt_tokens"] for reply in replies)
        cached = sum(reply["meta_info"]["cached_tokens"] for reply in replies)
        print(f"{cached} of {total} prompt tokens were shared")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "aspen")
