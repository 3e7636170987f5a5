"""Looking values up in contexts of a few hundred to a few thousand tokens."""

from collections.abc import Callable

from training.aspen import banks
from training.aspen.exercise import Draw, Exercise, Message, assistant, mentions, user

FILLER = (
    "The {a} stands near the {b}.",
    "A {a} was left in the {c} {b}.",
    "Nobody in {city} had seen the {a} before.",
    "In the {b} there is a {c} {a}.",
    "On {day} the {a} was moved to the {b}.",
    "{name} likes the {c} {a}.",
    "The {c} {a} belongs to {name}.",
    "Every {day} the {b} is open until late.",
    "It was a {c} day in {city}.",
    "{name} walked along the {b} and thought about a {a}.",
    "The road to {city} passes the {b}.",
    "There was nothing in the {a} but a {c} {b}.",
    "The {a} is {c}, and the {b} is not.",
    "Most people in {city} own a {a}.",
)


def filler(draw: Draw) -> str:
    """A sentence that says nothing of interest."""
    return draw.rng.choice(FILLER).format(
        a=draw.of(banks.OBJECTS),
        b=draw.of(banks.PLAIN_WORDS),
        c=draw.of(banks.ADJECTIVES),
        city=draw.of(banks.CITIES),
        day=draw.of(banks.DAYS),
        name=draw.of(banks.FIRST_NAMES),
    )


def code(draw: Draw) -> str:
    """A value that cannot be guessed: digits, or words, or a mixture."""
    kind = draw.number(0, 3)
    if kind < 2:
        return str(draw.number(10 ** draw.number(1, 4), 99999))
    if kind == 2:
        return draw.of(banks.PLAIN_WORDS)
    return f"{draw.of(banks.PLAIN_WORDS)}-{draw.number(10, 99)}"


def keys(draw: Draw, count: int) -> list[str]:
    """Different keys of one style."""
    style = draw.number(0, 3)
    found: dict[str, None] = {}
    while len(found) < count:
        word = draw.of(banks.PLAIN_WORDS)
        if style == 0 and count <= 70:
            key = word
        elif style == 1 and count <= 70:
            key = draw.of(banks.FIRST_NAMES)
        elif style == 2:
            key = f"{word}_{draw.of(banks.OBJECTS)}"
        else:
            key = f"{word}-{draw.number(10, 99)}"
        found[key] = None
    return list(found)


def listed(draw: Draw, count: int) -> tuple[str, list[tuple[str, str]]]:
    """A `key: value` list."""
    names = keys(draw, count)
    pairs = [(name, code(draw)) for name in names]
    form = draw.one("{}: {}", "{} = {}", "- {}: {}", "{} -> {}")
    return "\n".join(form.format(name, value) for name, value in pairs), pairs


def told(draw: Draw, count: int) -> tuple[str, list[tuple[str, str]]]:
    """Pass codes in prose, between sentences that do not matter."""
    pairs = [(name, code(draw)) for name in draw.distinct(banks.FIRST_NAMES, min(count, 60))]
    sentences = []
    for name, value in pairs:
        sentences += [filler(draw) for _ in range(draw.number(0, 3))]
        sentences.append(
            draw.one(
                f"The pass code of {name} is {value}.",
                f"The secret of {name} is {value}.",
                f"The value of {name} is {value}.",
                f"{name} chose the pass code {value}.",
            )
        )
    return " ".join(sentences), pairs


def needle(draw: Draw, num_sentences: int) -> tuple[str, list[tuple[str, str]]]:
    """One to three facts in a long text."""
    pairs = [(name, code(draw)) for name in draw.distinct(banks.FIRST_NAMES, draw.number(1, 3))]
    sentences = [filler(draw) for _ in range(num_sentences)]
    for name, value in pairs:
        sentences.insert(draw.number(0, len(sentences)), f"The pass code of {name} is {value}.")
    text = " ".join(sentences)
    return text if draw.chance(0.6) else text.replace(". ", ".\n"), pairs


def question(draw: Draw, key: str, *, prose: bool) -> str:
    """Ask for the value of a key."""
    if prose:
        return draw.one(
            f"What is the pass code of {key}?",
            f"What is the value of {key}?",
            f"Which pass code does {key} have?",
            f"Tell me the pass code of {key}.",
            f"pass code of {key}?",
            f"What is the secret of {key}?",
        )
    return draw.one(
        f"What is the value of {key}?",
        f"What is {key}?",
        f"Look up {key}.",
        f"Give me the value of {key}.",
        f"{key}?",
        f"Which value does {key} have?",
        f"value of {key}",
    )


def lookup(
    draw: Draw, build: Callable[[], tuple[str, list[tuple[str, str]]]], *, prose: bool, num_questions: int
) -> Exercise:
    """Questions about one context, the context in the system prompt or in the first message."""
    context, pairs = build()
    asked = [draw.rng.choice(pairs) for _ in range(num_questions)]
    intro = draw.one(
        "Here is a list:",
        "Remember this:",
        "Read this:",
        "Data:",
        "Use this information to answer.",
        "These are the values:",
    )
    messages: list[Message] = []
    first = question(draw, asked[0][0], prose=prose)
    if draw.chance(0.4):
        messages.append({"role": "system", "content": f"{intro}\n{context}"})
    else:
        first = f"{intro}\n{context}\n\n{first}" if draw.chance(0.8) else f"{first}\n{context}"
    for index, (key, value) in enumerate(asked):
        messages += [user(first if index == 0 else question(draw, key, prose=prose)), assistant(value)]
    return Exercise("recall", messages, mentions(asked[-1][1]))


def recall_of(draw: Draw, size: int, num_questions: int = 1) -> Exercise:
    """A lookup in a context of roughly `size` tokens."""
    kind = draw.number(0, 4)
    if kind < 3:
        return lookup(draw, lambda: listed(draw, max(3, size // 12)), prose=False, num_questions=num_questions)
    if kind == 3 and size < 1500:
        return lookup(draw, lambda: told(draw, max(2, size // 36)), prose=True, num_questions=num_questions)
    return lookup(draw, lambda: needle(draw, max(2, size // 12)), prose=True, num_questions=num_questions)


def short_recall(draw: Draw) -> Exercise:
    """A context of at most about 400 tokens."""
    return recall_of(draw, draw.rng.choice((40, 80, 120, 200, 300, 380)), 1 if draw.heldout else draw.number(3, 8))


def long_recall(draw: Draw) -> Exercise:
    """A context of 500 to 3,300 tokens, many questions so that the long context is worth its computation."""
    return recall_of(draw, int(500 * 6.4 ** draw.rng.random()), 1 if draw.heldout else draw.number(12, 30))


def passage(draw: Draw) -> Exercise:
    """Repeat a passage of the context: the whole of it, or the sentence that mentions a word."""
    sentences = list(dict.fromkeys(filler(draw) for _ in range(draw.number(2, 7))))
    text = " ".join(sentences)
    if draw.chance(0.5):
        ask = draw.one("Repeat this text exactly:", "Copy this text:", "Write this text again:", "Repeat after me:")
        return Exercise("copy", [user(f"{ask}\n{text}"), assistant(text)], lambda answer: answer.strip() == text)
    index = draw.number(0, len(sentences) - 1)
    which = (
        draw.one("first", "last")
        if draw.chance(0.5)
        else ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")[index]
    )
    wanted = sentences[0] if which == "first" else sentences[-1] if which == "last" else sentences[index]
    ask = draw.one(
        f"What is the {which} sentence of this text?",
        f"Copy the {which} sentence:",
        f"Repeat only the {which} sentence of the text.",
    )
    return Exercise("copy", [user(f"{ask}\n{text}"), assistant(wanted)], lambda answer: answer.strip() == wanted)
