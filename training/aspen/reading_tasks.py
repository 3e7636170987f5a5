"""Questions about a short text, and work on words and lists."""

from collections.abc import Callable
from dataclasses import dataclass

from training.aspen import banks
from training.aspen.exercise import Check, Draw, Exercise, Message, assistant, mentions, says, user

NOT_SAID = "The text does not say."


@dataclass(frozen=True, slots=True)
class Fact:
    """A value the text states: the sentence, questions for it, and how to answer in a sentence."""

    sentence: str
    questions: tuple[str, ...]
    answer: str
    value: str


def job_fact(draw: Draw, who: str) -> Fact:
    """What someone works as."""
    job = draw.of(banks.JOBS)
    article = "an" if job[0] in "aeiou" else "a"
    return Fact(
        draw.one(f"{who} is {article} {job}.", f"{who} works as {article} {job}."),
        (
            f"What is the job of {who}?",
            f"What does {who} do for a living?",
            f"What does {who} work as?",
            f"What is {who}'s job?",
        ),
        f"{who} is {article} {job}.",
        job,
    )


def home_fact(draw: Draw, who: str) -> Fact:
    """Where someone lives."""
    city = draw.of(banks.CITIES)
    return Fact(
        draw.one(f"{who} lives in {city}.", f"{who} has a house in {city}.", f"{who} moved to {city} last year."),
        (f"Where does {who} live?", f"In which city does {who} live?", f"Which city does {who} live in?"),
        f"{who} lives in {city}.",
        city,
    )


def age_fact(draw: Draw, who: str) -> Fact:
    """How old someone is."""
    age = str(draw.number(5, 95))
    return Fact(
        draw.one(f"{who} is {age} years old.", f"{who} turned {age} this year.", f"{who} is {age}."),
        (f"How old is {who}?", f"What is the age of {who}?", f"What is {who}'s age?"),
        f"{who} is {age} years old.",
        age,
    )


def pet_fact(draw: Draw, who: str) -> Fact:
    """Which animal someone has, and its name."""
    animal = draw.of(banks.ANIMALS)
    pet = draw.of(banks.PLAIN_WORDS).capitalize()
    if draw.chance(0.5):
        return Fact(
            draw.one(f"{who} has a {animal} called {pet}.", f"The {animal} of {who} is called {pet}."),
            (f"What is the name of {who}'s {animal}?", f"What is the {animal} of {who} called?"),
            f"The {animal} of {who} is called {pet}.",
            pet,
        )
    return Fact(
        f"{who} has a {animal}.",
        (f"Which animal does {who} have?", f"What pet does {who} have?"),
        f"{who} has a {animal}.",
        animal,
    )


def hobby_fact(draw: Draw, who: str) -> Fact:
    """What someone likes to do."""
    hobby = draw.of(banks.HOBBIES)
    return Fact(
        draw.one(f"{who} likes {hobby}.", f"{who}'s hobby is {hobby}.", f"In the evening {who} enjoys {hobby}."),
        (f"What does {who} like?", f"What is the hobby of {who}?", f"What is {who}'s hobby?"),
        f"{who} likes {hobby}.",
        hobby,
    )


def company_fact(draw: Draw, who: str) -> Fact:
    """Where someone works."""
    company = draw.of(banks.COMPANIES)
    return Fact(
        draw.one(
            f"{who} works for {company}.",
            f"{who} has a job at {company}.",
            f"{who} joined {company} in {draw.number(1990, 2024)}.",
        ),
        (f"Where does {who} work?", f"Which company does {who} work for?", f"Who is the employer of {who}?"),
        f"{who} works for {company}.",
        company,
    )


def born_fact(draw: Draw, who: str) -> Fact:
    """When someone was born."""
    year = str(draw.number(1920, 2015))
    return Fact(
        draw.one(f"{who} was born in {year}.", f"{who} was born in the year {year}."),
        (f"When was {who} born?", f"In which year was {who} born?"),
        f"{who} was born in {year}.",
        year,
    )


def colour_fact(draw: Draw, who: str) -> Fact:
    """The colour of something someone owns."""
    colour, thing = draw.of(banks.COLOURS), draw.of(banks.OBJECTS)
    return Fact(
        draw.one(
            f"{who} bought a {colour} {thing}.", f"{who} owns a {colour} {thing}.", f"The {thing} of {who} is {colour}."
        ),
        (f"What colour is the {thing} of {who}?", f"What colour is {who}'s {thing}?"),
        f"The {thing} of {who} is {colour}.",
        colour,
    )


def price_fact(draw: Draw) -> Fact:
    """What something costs."""
    thing, price = draw.of(banks.OBJECTS), str(draw.number(2, 999))
    return Fact(
        draw.one(
            f"The {thing} costs {price} euros.",
            f"The price of the {thing} is {price} euros.",
            f"The {thing} was sold for {price} euros.",
        ),
        (f"How much does the {thing} cost?", f"What is the price of the {thing}?"),
        f"The {thing} costs {price} euros.",
        price,
    )


def place_fact(draw: Draw) -> Fact:
    """Where a thing is."""
    thing = draw.of(banks.OBJECTS)
    place = draw.one(
        "kitchen", "garage", "garden", "attic", "office", "bedroom", "cellar", "hall", "library", "workshop"
    )
    return Fact(
        draw.one(
            f"The {thing} is in the {place}.",
            f"You can find the {thing} in the {place}.",
            f"Someone put the {thing} in the {place}.",
        ),
        (f"Where is the {thing}?", f"Where can I find the {thing}?", f"In which room is the {thing}?"),
        f"The {thing} is in the {place}.",
        place,
    )


def event_fact(draw: Draw) -> Fact:
    """When something takes place."""
    event = draw.one(
        "concert", "meeting", "party", "exam", "match", "wedding", "lecture", "workshop", "market", "festival"
    )
    day, month, number = draw.of(banks.DAYS), draw.of(banks.MONTHS), draw.number(1, 28)
    kind = draw.number(0, 2)
    if kind == 0:
        return Fact(
            draw.one(f"The {event} is on {day}.", f"The {event} takes place on {day}."),
            (f"When is the {event}?", f"On which day is the {event}?"),
            f"The {event} is on {day}.",
            day,
        )
    if kind == 1:
        return Fact(
            draw.one(f"The {event} is on {number} {month}.", f"The date of the {event} is {number} {month}."),
            (f"When is the {event}?", f"What is the date of the {event}?"),
            f"The {event} is on {number} {month}.",
            f"{number} {month}",
        )
    time = f"{draw.number(8, 22)}:{draw.one('00', '15', '30', '45')}"
    return Fact(
        draw.one(f"The {event} starts at {time}.", f"The {event} begins at {time}."),
        (f"When does the {event} start?", f"At what time does the {event} begin?"),
        f"The {event} starts at {time}.",
        time,
    )


PERSON_FACTS = (job_fact, home_fact, age_fact, pet_fact, hobby_fact, company_fact, born_fact, colour_fact)
THING_FACTS: tuple[Callable[[Draw], Fact], ...] = (price_fact, place_fact, event_fact)


def story_facts(draw: Draw) -> list[Fact]:
    """The facts of one text, at most one for any question."""
    facts: list[Fact] = []
    for _ in range(draw.number(1, 3)):
        who = draw.person()
        facts += [fact(draw, who) for fact in draw.rng.sample(PERSON_FACTS, draw.number(1, 3))]
    facts += [draw.rng.choice(THING_FACTS)(draw) for _ in range(draw.number(0, 3))]
    unique: dict[str, Fact] = {}
    for fact in facts:
        unique.setdefault(fact.questions[0], fact)
    facts = list(unique.values())
    if draw.chance(0.5):
        draw.rng.shuffle(facts)
    return facts


def reading(draw: Draw) -> Exercise:
    """One to four questions about a text in the system prompt or in the first message."""
    facts = story_facts(draw)
    text = " ".join(fact.sentence for fact in facts)
    short = draw.chance(0.2)
    asked = [
        draw.rng.choice(facts)
        for _ in range(1 if draw.heldout else draw.rng.choices((1, 2, 3, 4, 5), (2, 3, 3, 2, 2))[0])
    ]
    messages: list[Message] = []
    check = mentions("")
    rule = draw.one("Answer in one word.", "Answer with the value only.", "Give only the answer.") if short else ""
    if draw.chance(0.35):
        intro = draw.one(
            "Answer questions about this text:", "You know the following:", "Use this text to answer:", "Context:"
        )
        messages.append({"role": "system", "content": f"{intro}\n{text}" + (f"\n{rule}" if rule else "")})
        prefix = ""
    else:
        intro = draw.one("", "", "Text: ", "Read this: ", "Here is a text: ")
        prefix = f"{intro}{text}{draw.one(' ', chr(10), chr(10) * 2)}" + (f"{rule} " if rule else "")
    for index, fact in enumerate(asked):
        if not draw.heldout and draw.chance(0.06):
            stranger = draw.of(banks.FIRST_NAMES)
            question, answer = (
                draw.one(f"Where does {stranger} live?", f"How old is {stranger}?", f"What is the job of {stranger}?"),
                NOT_SAID,
            )
            if stranger in text:
                question, answer = draw.rng.choice(fact.questions), fact.value if short else fact.answer
        else:
            question, answer = draw.rng.choice(fact.questions), fact.value if short else fact.answer
        messages += [user((prefix if index == 0 else "") + question), assistant(answer)]
        others = [other.value for other in facts if other.value != fact.value]
        check = says(NOT_SAID) if answer == NOT_SAID else mentions(fact.value, others)
    return Exercise("reading", messages, check)


def item_list(draw: Draw, low: int, high: int) -> list[str]:
    """Different words of one kind."""
    bank = draw.rng.choice(
        (banks.PLAIN_WORDS, banks.FRUITS, banks.ANIMALS, banks.COLOURS, banks.OBJECTS, banks.CITIES, banks.FIRST_NAMES)
    )
    return draw.distinct(bank, draw.number(low, high))


def list_work(draw: Draw) -> tuple[str, str]:
    """An instruction on a list of words, and its answer."""
    items = item_list(draw, 3, 6)
    shown = ", ".join(items)
    kind = draw.number(0, 7)
    if kind == 0:
        return draw.one(
            f"Reverse this list: {shown}",
            f"Write this list backwards: {shown}",
            f"Put these words in reverse order: {shown}",
        ), ", ".join(reversed(items))
    if kind == 1:
        return draw.one(
            f"Sort these words alphabetically: {shown}",
            f"Sort this list from A to Z: {shown}",
            f"Put these words in alphabetical order: {shown}",
        ), ", ".join(sorted(items, key=str.casefold))
    if kind == 2:
        return draw.one(
            f"How many items are in this list: {shown}?",
            f"Count the words: {shown}",
            f"How many words are there? {shown}",
        ), f"{len(items)}"
    if kind == 3:
        which = draw.number(0, len(items) - 1)
        word = ("first", "second", "third", "fourth", "fifth", "sixth")[which] if which < len(items) - 1 else "last"
        return draw.one(
            f"What is the {word} item of this list: {shown}?",
            f"Give me the {word} word: {shown}",
            f"Which word is the {word}? {shown}",
        ), items[which]
    if kind == 4:
        gone = draw.rng.choice(items)
        return draw.one(
            f"Remove {gone} from this list: {shown}", f"Write this list without {gone}: {shown}"
        ), ", ".join(item for item in items if item != gone)
    if kind == 5:
        extra = draw.of(banks.PLAIN_WORDS)
        return draw.one(
            f"Add {extra} to the end of this list: {shown}", f"Append {extra} to this list: {shown}"
        ), f"{shown}, {extra}"
    if kind == 6:
        return draw.one(
            f"Write this list with one item per line: {shown}", f"Put each item on its own line: {shown}"
        ), "\n".join(items)
    return draw.one(f"Make a bullet list: {shown}", f"Write these items as a list with dashes: {shown}"), "\n".join(
        f"- {item}" for item in items
    )


def sentence(draw: Draw) -> str:
    """A short sentence."""
    name, other = draw.distinct(banks.FIRST_NAMES, 2)
    return draw.one(
        f"{name} has a {draw.of(banks.COLOURS)} {draw.of(banks.OBJECTS)}.",
        f"The {draw.of(banks.ADJECTIVES)} {draw.of(banks.ANIMALS)} sleeps.",
        f"{name} and {other} live in {draw.of(banks.CITIES)}.",
        f"On {draw.of(banks.DAYS)} {name} buys {draw.of(banks.FOODS)}.",
        f"{name} likes {draw.of(banks.HOBBIES)}.",
        f"The {draw.of(banks.OBJECTS)} is in {draw.of(banks.CITIES)}.",
    )


def word_work(draw: Draw) -> tuple[str, str]:
    """An instruction on words, numbers or a sentence, and its answer."""
    kind = draw.number(0, 6)
    if kind == 0:
        text = draw.one(sentence(draw), " ".join(draw.distinct(banks.PLAIN_WORDS, draw.number(1, 5))))
        return draw.one(
            f"Repeat: {text}",
            f"Repeat after me: {text}",
            f"Copy this: {text}",
            f'Say "{text}"',
            f"Write exactly this: {text}",
        ), text
    if kind == 1:
        text, count = draw.of(banks.PLAIN_WORDS), draw.number(2, 5)
        return draw.one(
            f"Repeat the word {text} {count} times.", f'Write "{text}" {count} times.', f"Say {text} {count} times."
        ), " ".join([text] * count)
    if kind == 2:
        text = " ".join(draw.listed(banks.PLAIN_WORDS) for _ in range(draw.number(1, 3)))
        return draw.one(
            f"Write in upper case: {text}", f"Convert to uppercase: {text}", f"Write this in capital letters: {text}"
        ), text.upper()
    if kind == 3:
        text = " ".join(draw.listed(banks.PLAIN_WORDS) for _ in range(draw.number(1, 3)))
        return draw.one(f"Write in lower case: {text.upper()}", f"Convert to lowercase: {text.upper()}"), text
    if kind == 4:
        text = sentence(draw)
        names = [word for word in text.rstrip(".").split() if word in banks.FIRST_NAMES]
        if not names:
            return f"Copy this: {text}", text
        new = draw.of(banks.FIRST_NAMES)
        return draw.one(
            f"Replace {names[0]} with {new}: {text}", f"Rename {names[0]} to {new} in this sentence: {text}"
        ), text.replace(names[0], new)
    values = draw.rng.sample(range(100), draw.number(3, 6))
    shown = ", ".join(map(str, values))
    down = draw.chance(0.3)
    order = "from largest to smallest" if down else "from smallest to largest"
    return draw.one(
        f"Sort these numbers {order}: {shown}",
        f"Put these numbers in order {order}: {shown}",
        *(() if down else (f"Sort: {shown}", f"Sort these numbers: {shown}")),
    ), ", ".join(map(str, sorted(values, reverse=down)))


def exact(answer: str) -> Check:
    """Accept exactly this answer."""
    return lambda text: text.strip() == answer


def words(draw: Draw) -> Exercise:
    """One to three instructions on words and lists."""
    messages: list[Message] = []
    answer = ""
    for _ in range(1 if draw.heldout else draw.rng.choices((1, 2, 3), (5, 2, 1))[0]):
        question, answer = list_work(draw) if draw.chance(0.5) else word_work(draw)
        messages += [user(question), assistant(answer)]
    return Exercise("words", messages, exact(answer))


def not_said(draw: Draw) -> Exercise:
    """A question the text does not answer."""
    facts = story_facts(draw)
    text = " ".join(fact.sentence for fact in facts)
    stranger = next(name for name in iter(lambda: draw.of(banks.FIRST_NAMES), "") if name not in text)
    question = draw.one(f"Where does {stranger} live?", f"How old is {stranger}?", f"What is the job of {stranger}?")
    return Exercise("reading", [user(f"{text}\n{question}"), assistant(NOT_SAID)], says(NOT_SAID))
