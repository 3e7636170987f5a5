"""One synthetic exercise: a chat that ends with the reference answer, and the check that judges any other."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from training.aspen import banks
from training.aspen.template import render

Check = Callable[[str], bool]
Message = dict[str, object]
COINABLE = (banks.FIRST_NAMES, banks.LAST_NAMES, banks.CITIES, banks.COMPANIES, banks.PLAIN_WORDS)
ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "z",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "io")
CODAS = ("", "", "n", "r", "s", "l", "k", "m", "nd", "t")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def user(content: str) -> Message:
    """A user message."""
    return {"role": "user", "content": content}


def assistant(content: str, reasoning: str = "") -> Message:
    """An assistant message, with reasoning if given."""
    return {"role": "assistant", "content": content, **({"reasoning_content": reasoning} if reasoning else {})}


@dataclass(frozen=True, slots=True)
class Exercise:
    """A chat to learn from, or, without its last message, a question to be judged by `check`."""

    task: str
    messages: Sequence[Message]
    check: Check
    tools: Sequence[Message] = field(default_factory=tuple)
    thinking: bool = False

    def text(self) -> str:
        """The whole rendered chat."""
        return render(self.messages, self.tools)

    def question(self) -> list[Message]:
        """The messages an assistant has to answer."""
        return list(self.messages[:-1])

    def prompt(self) -> str:
        """The rendered question, up to where the answer begins."""
        return render(self.question(), self.tools, add_generation_prompt=True, enable_thinking=self.thinking)

    def reference(self) -> str:
        """The reference answer as a model would write it, tool calls included, reasoning left out."""
        whole = render([user(""), self.messages[-1]])
        answer = whole.split("<|im_start|>assistant\n", 1)[1].removesuffix("<|im_end|>\n")
        return answer.split("</think>\n\n", 1)[-1]


def visible_answer(text: str) -> str:
    """An answer without its thinking part and surrounding space."""
    return text.rsplit("</think>", 1)[-1].strip()


def says(*accepted: str) -> Check:
    """Accept exactly one of the given answers, whatever the case and final stop."""
    wanted = {answer.strip().rstrip(".").casefold() for answer in accepted}
    return lambda text: visible_answer(text).rstrip(".").casefold() in wanted


def mentions(value: str, others: Sequence[str] = ()) -> Check:
    """Accept an answer of one line that contains `value` as a whole word and none of `others`."""

    def contains(text: str, part: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None

    def check(text: str) -> bool:
        answer = visible_answer(text)
        return (
            contains(answer, value)
            and not any(contains(answer, other) for other in others if other not in value)
            and "\n" not in answer
        )

    return check


def ends_with_number(value: int) -> Check:
    """Accept an answer whose last number is `value`."""

    def check(text: str) -> bool:
        numbers = NUMBER.findall(visible_answer(text))
        return bool(numbers) and float(numbers[-1]) == value

    return check


def is_json(value: object) -> Check:
    """Accept JSON equal to `value`, and nothing around it."""

    def check(text: str) -> bool:
        try:
            parsed = json.loads(visible_answer(text))
        except json.JSONDecodeError:
            return False
        return json.dumps(parsed, sort_keys=True) == json.dumps(value, sort_keys=True)

    return check


def parse_tool_calls(text: str) -> list[object]:
    """The tool calls of an answer; a call that is not JSON appears as None."""
    calls: list[object] = []
    for body in TOOL_CALL.findall(text):
        try:
            calls.append(json.loads(body))
        except json.JSONDecodeError:
            calls.append(None)
    return calls


def calls_tools(calls: Sequence[tuple[str, dict[str, object]]]) -> Check:
    """Accept exactly these calls in this order."""
    wanted = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return lambda text: parse_tool_calls(text) == wanted


class Draw:
    """Random values of one split: one word in 24 is held out and never appears in training exercises.

    Some names and words are coined from syllables, so that copying does not end at the word lists.
    """

    def __init__(self, seed: int, split: str) -> None:
        self.rng = random.Random(f"{split}-{seed}")
        self.heldout = split == "heldout"
        self.words: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}

    def of(self, bank: tuple[str, ...]) -> str:
        """A word of a bank, or a coined one if the bank holds names or plain words."""
        if bank in COINABLE and self.rng.random() < 0.08:
            return self.coined(capital=bank[0][0].isupper())
        return self.listed(bank)

    def listed(self, bank: tuple[str, ...]) -> str:
        """A word of a bank."""
        if bank not in self.words:
            kept = [word for word in bank if not is_heldout(word, 24)]
            self.words[bank] = (kept, [word for word in bank if is_heldout(word, 24)] or kept)
        common, rare = self.words[bank]
        return self.rng.choice(rare if self.heldout and self.rng.random() < 0.15 else common)

    def coined(self, *, capital: bool) -> str:
        """A word that does not exist."""
        word = "".join(self.rng.choice(ONSETS) + self.rng.choice(VOWELS) for _ in range(self.rng.randint(2, 3)))
        word += self.rng.choice(CODAS)
        return word.capitalize() if capital else word

    def distinct(self, bank: tuple[str, ...], count: int) -> list[str]:
        """`count` different words of a bank."""
        found: list[str] = []
        while len(found) < count:
            word = self.of(bank)
            if word not in found:
                found.append(word)
        return found

    def one(self, *options: str) -> str:
        """One of the phrasings given."""
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def number(self, low: int, high: int) -> int:
        """An integer between `low` and `high`, both included."""
        return self.rng.randint(low, high)

    def person(self) -> str:
        """A first name, sometimes with a last name."""
        name = self.of(banks.FIRST_NAMES)
        return f"{name} {self.of(banks.LAST_NAMES)}" if self.chance(0.25) else name


def is_heldout(content: str, one_in: int = 8) -> bool:
    """Whether a word or a problem belongs to the held-out split; a larger `one_in` selects fewer of the same."""
    return hashlib.sha256(content.encode()).digest()[0] % one_in == 0
