"""The mixture of synthetic exercises: endless, seeded, and split into training and held-out content.

python -m training.aspen.synthetic --count 20          # print examples
"""

import argparse
from collections.abc import Callable, Iterator

from training.aspen import chat_tasks, code_tasks, json_tasks, math_tasks, reading_tasks, recall_tasks, tool_tasks
from training.aspen.exercise import Draw, Exercise

Maker = Callable[[Draw], Exercise]
SHORT: dict[str, tuple[Maker, float]] = {
    "conversation": (chat_tasks.conversation, 20),
    "introduction": (chat_tasks.introduction, 8),
    "persona": (chat_tasks.persona, 34),
    "facts": (chat_tasks.facts, 18),
    "reading": (reading_tasks.reading, 14),
    "not_said": (reading_tasks.not_said, 1.5),
    "words": (reading_tasks.words, 22),
    "extraction": (json_tasks.extraction, 12),
    "conversion": (json_tasks.conversion, 8),
    "single_call": (tool_tasks.single_call, 3),
    "parallel_calls": (tool_tasks.parallel_calls, 1.5),
    "tool_dialogue": (tool_tasks.dialogue, 7),
    "no_call": (tool_tasks.no_call, 2),
    "arithmetic": (math_tasks.arithmetic, 22),
    "story": (math_tasks.story, 8),
    "comparison": (math_tasks.comparison, 4),
    "recall": (recall_tasks.short_recall, 8),
    "passage": (recall_tasks.passage, 7),
    "write_function": (code_tasks.write_function, 5),
    "complete_function": (code_tasks.complete_function, 2),
}
"""Exercises of at most about 500 tokens, and how many of each in a mixture."""
LONG: dict[str, tuple[Maker, float]] = {"long_recall": (recall_tasks.long_recall, 1)}
"""Exercises that need longer rows."""


def exercises(seed: int, split: str, size: str = "short") -> Iterator[Exercise]:
    """Endless exercises of a split (`train`, `heldout`) and size (`short`, `long`); a seed fixes them."""
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}: use 'train' or 'heldout'")
    makers = LONG if size == "long" else SHORT
    draw = Draw(seed, split)
    functions, weights = [maker for maker, _ in makers.values()], [weight for _, weight in makers.values()]
    while True:
        yield draw.rng.choices(functions, weights)[0](draw)


def of_kind(maker: Maker, seed: int, split: str) -> Iterator[Exercise]:
    """Endless exercises of one kind."""
    draw = Draw(seed, split)
    while True:
        yield maker(draw)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="train")
    parser.add_argument("--size", default="short")
    args = parser.parse_args()
    for _, exercise in zip(range(args.count), exercises(args.seed, args.split, args.size), strict=False):
        print(
            f"--- {exercise.task}: reference {'accepted' if exercise.check(exercise.reference()) else 'REJECTED'}\n"
            f"{exercise.text()}"
        )


if __name__ == "__main__":
    main()
