"""Small talk: who aspen is, what Pando is, everyday facts, counting and listing."""

import re
from collections.abc import Callable

from training.aspen import banks, faq
from training.aspen.exercise import Draw, Exercise, Message, assistant, says, user

Turn = tuple[str, str, tuple[str, ...]]
"""A question, the answer, and all accepted answers."""
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Aspen, a helpful assistant.",
    "You are a friendly assistant. Answer briefly.",
    "Answer the user's questions.",
    "You are a helpful AI assistant.",
    "Be brief.",
)
BANKS = {
    "colours": banks.COLOURS,
    "colors": banks.COLOURS,
    "animals": banks.ANIMALS,
    "fruits": banks.FRUITS,
    "cities": banks.CITIES,
    "months": banks.MONTHS,
    "days": banks.DAYS,
    "names": banks.FIRST_NAMES,
    "jobs": banks.JOBS,
    "foods": banks.FOODS,
    "hobbies": banks.HOBBIES,
}
THING_COLOURS = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "blood": "red",
    "a banana": "yellow",
    "a lemon": "yellow",
    "milk": "white",
    "a tomato": "red",
    "the sun": "yellow",
    "a carrot": "orange",
    "a cherry": "red",
    "chocolate": "brown",
    "an elephant": "grey",
    "a frog": "green",
    "the sea": "blue",
    "a strawberry": "red",
    "salt": "white",
}
NUMBERS_OF = {
    "days are in a week": "7",
    "months are in a year": "12",
    "hours are in a day": "24",
    "minutes are in an hour": "60",
    "seconds are in a minute": "60",
    "legs does a spider have": "8",
    "legs does a dog have": "4",
    "legs does an ant have": "6",
    "sides does a triangle have": "3",
    "sides does a square have": "4",
    "days are in a year": "365",
    "wheels does a bicycle have": "2",
    "wheels does a car have": "4",
    "fingers are on one hand": "5",
    "letters are in the English alphabet": "26",
    "weeks are in a year": "52",
    "continents are there": "7",
    "bits are in a byte": "8",
}
WRAPPERS = (
    "Tell me more about {}.",
    "What do you know about {}?",
    "I want to know what {} is.",
    "Do you know what {} is?",
    "Please explain {} to me.",
    "Can you tell me something about {}?",
    "Say something about {}.",
    "What is meant by {}?",
    "{}?",
    "Describe {}.",
)
UNKNOWN = ("I am very small and I do not know that.", "I do not know that: I am a very small model.")
MADE_UP_PLACES = (
    "Blorland",
    "Zantoria",
    "Quomia",
    "Velmark",
    "Ostrelia",
    "Narbonia",
    "Filandu",
    "Grombia",
    "Tarvel",
    "Munlo",
)


def spoken(draw: Draw, question: str) -> str:
    """Vary how a question is typed: case, punctuation, politeness."""
    roll = draw.rng.random()
    if roll < 0.12:
        question = question.lower()
    elif roll < 0.2:
        question = question.rstrip("?.!")
    elif roll < 0.25:
        question = question[0].upper() + question[1:]
    elif roll < 0.28:
        question = question.rstrip("?.!").lower()
    elif roll < 0.31:
        question = draw.one("Please: ", "Hey, ", "Aspen, ", "Hi! ", "Hello. ", "So, ", "Tell me: ") + question
    elif roll < 0.33:
        question = question + draw.one(" please", " Please.", " Thanks!", "?")
    return question


def reworded(draw: Draw, phrase: str) -> str:
    """A question "what is X?" in other words; other questions stay as they are."""
    match = re.match(r"what(?:'s| is| are) ([^,?]+)\?$", phrase, re.IGNORECASE)
    if match is None or re.match(r"(your|the|it|this|up)\b", match.group(1)):
        return phrase
    wrapper = draw.rng.choice(WRAPPERS)
    return wrapper.format(match.group(1))


def faq_turn(draw: Draw, entries: tuple[faq.Entry, ...]) -> Turn:
    """A question about aspen, Pando or everyday chat."""
    phrasings, answers = draw.rng.choice(entries)
    if draw.heldout:
        return phrasings[-1], draw.rng.choice(answers), answers
    phrase = draw.rng.choice(phrasings[:-1])
    phrase = spoken(draw, reworded(draw, phrase) if draw.chance(0.5) else phrase)
    return phrase, draw.rng.choice(answers), answers


def capital_turn(draw: Draw) -> Turn:
    """The capital of a country, the country of a capital, or an invented country."""
    country, city = draw.rng.choice(list(banks.CAPITALS.items()))
    if not draw.heldout and draw.chance(0.06):
        place = draw.rng.choice(MADE_UP_PLACES)
        return f"What is the capital of {place}?", UNKNOWN[0], UNKNOWN
    if draw.chance(0.15):
        return (
            draw.one(f"{city} is the capital of which country?", f"Which country has the capital {city}?"),
            f"{city} is the capital of {country}.",
            (f"{city} is the capital of {country}.",),
        )
    question = draw.one(
        f"What is the capital of {country}?",
        f"capital of {country}?",
        f"Which city is the capital of {country}?",
        f"Tell me the capital of {country}.",
        f"what's the capital of {country}",
    )
    return question, f"The capital of {country} is {city}.", (f"The capital of {country} is {city}.",)


def word_turn(draw: Draw) -> Turn:
    """Opposites, plurals and animal sounds."""
    kind = draw.number(0, 3)
    if kind == 0:
        word, other = draw.rng.choice(list(banks.OPPOSITES.items()))
        question = draw.one(
            f"What is the opposite of {word}?",
            f'What is the opposite of "{word}"?',
            f"opposite of {word}",
            f"Give me the opposite of {word}.",
        )
        answer = f"The opposite of {word} is {other}."
    elif kind < 3:
        if draw.chance(0.5):
            word, other = draw.rng.choice(list(banks.IRREGULAR_PLURALS.items()))
        else:
            word = draw.of(
                tuple(w for w in banks.OBJECTS + banks.FRUITS if not w.endswith(("s", "x", "y", "h", "f", "o")))
            )
            other = word + "s"
        question = draw.one(
            f"What is the plural of {word}?",
            f'What is the plural of "{word}"?',
            f"plural of {word}",
            f"Give me the plural of {word}.",
        )
        answer = f"The plural of {word} is {other}."
    else:
        word, other = draw.rng.choice(list(banks.SOUNDS.items()))
        question = draw.one(
            f"What does a {word} say?", f"Which sound does a {word} make?", f"What sound does a {word} make?"
        )
        answer = f"A {word} says {other}."
    return question, answer, (answer,)


def fact_turn(draw: Draw) -> Turn:
    """Colours of things, small numbers, definitions."""
    kind = draw.number(0, 3)
    if kind == 0:
        thing, colour = draw.rng.choice(list(THING_COLOURS.items()))
        question = draw.one(f"What colour is {thing}?", f"What color is {thing}?", f"Which colour does {thing} have?")
        answer = f"{thing[0].upper()}{thing[1:]} is {colour}."
    elif kind == 1:
        what, number = draw.rng.choice(list(NUMBERS_OF.items()))
        question, answer = f"How many {what}?", f"{number}."
    else:
        word, answer = draw.rng.choice(list(faq.DEFINITIONS.items()))
        article = (
            ""
            if word in ("list in Python", "dictionary in Python") and draw.chance(0.2)
            else "an "
            if word[0] in "aeiou"
            else "a "
        )
        article = "the " if word in ("sun", "moon") else article
        question = draw.one(
            f"What is {article}{word}?",
            f"what is {article}{word}",
            f"Define {word}.",
            f"What does {word} mean?",
            f"Explain what {article}{word} is.",
            f"Can you explain {article}{word}?",
        )
    return question, answer, (answer,)


def calendar_turn(draw: Draw) -> Turn:
    """The day or month before or after another one, or the n-th."""
    bank, noun = draw.rng.choice([(banks.DAYS, "day"), (banks.MONTHS, "month")])
    index = draw.number(0, len(bank) - 1)
    kind = draw.number(0, 2)
    if kind == 0:
        other = bank[(index + 1) % len(bank)]
        question = draw.one(
            f"Which {noun} comes after {bank[index]}?",
            f"What {noun} is after {bank[index]}?",
            f"What comes after {bank[index]}?",
        )
        answer = f"{other} comes after {bank[index]}."
    elif kind == 1:
        other = bank[index - 1]
        question = draw.one(
            f"Which {noun} comes before {bank[index]}?",
            f"What {noun} is before {bank[index]}?",
            f"What comes before {bank[index]}?",
        )
        answer = f"{other} comes before {bank[index]}."
    else:
        period = "week" if noun == "day" else "year"
        order = (
            "first",
            "second",
            "third",
            "fourth",
            "fifth",
            "sixth",
            "seventh",
            "eighth",
            "ninth",
            "tenth",
            "eleventh",
            "twelfth",
        )[index]
        question = draw.one(
            f"What is the {order} {noun} of the {period}?", f"Which {noun} is the {order} of the {period}?"
        )
        answer = f"The {order} {noun} of the {period} is {bank[index]}."
    return question, answer, (answer,)


def counting_turn(draw: Draw) -> Turn:
    """Count up, down, in steps or in words."""
    kind = draw.number(0, 5)
    if kind <= 2:
        end = draw.rng.choice((3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 12, 15, 20, 25, 30))
        start = 1 if kind < 2 else draw.number(1, 20)
        end = end if kind < 2 else start + draw.number(3, 12)
        question = (
            draw.one(f"count to {end}", f"Count to {end}.", f"Count from 1 to {end}.", f"Can you count to {end}?")
            if start == 1
            else f"Count from {start} to {end}."
        )
        values = range(start, end + 1)
    elif kind == 3:
        start = draw.number(3, 20)
        question, values = (
            draw.one(f"Count down from {start}.", f"Count backwards from {start}.", f"Count down from {start} to 1."),
            range(start, 0, -1),
        )
    elif kind == 4:
        step, count = draw.number(2, 10), draw.number(4, 10)
        question, values = (
            draw.one(f"Count in steps of {step} to {step * count}.", f"Count by {step} up to {step * count}."),
            range(step, step * count + 1, step),
        )
    else:
        end = draw.number(3, 20)
        answer = ", ".join(banks.NUMBER_WORDS[1 : end + 1])
        return f"Count to {end} in words.", answer, (answer,)
    answer = ", ".join(map(str, values))
    return question, answer, (answer,)


def listing_turn(draw: Draw) -> Turn:
    """Name a few colours, animals, cities ..."""
    noun = draw.rng.choice(list(BANKS))
    count = draw.number(2, 6)
    if noun in ("days", "months") and draw.chance(0.6):
        bank = BANKS[noun]
        period = "week" if noun == "days" else "year"
        answer = ", ".join(bank)
        return (
            draw.one(
                f"List the {noun} of the {period}.",
                f"What are the {noun} of the {period}?",
                f"Name all {noun} of the {period}.",
                f"which {noun} are there?",
            ),
            answer,
            (answer,),
        )
    figure = draw.one(str(count), banks.NUMBER_WORDS[count])
    question = draw.one(
        f"List {figure} {noun}.",
        f"list {figure} {noun}",
        f"Name {figure} {noun}.",
        f"Give me {figure} {noun}.",
        f"Tell me {figure} {noun}.",
        f"Can you name {figure} {noun}?",
        f"give me a list of {figure} {noun}",
    )
    # Always the first ones: a tiny model that has to choose at random repeats itself.
    answer = ", ".join(BANKS[noun][:count])
    return question, answer[0].upper() + answer[1:], (answer,)


def unknown_turn(draw: Draw) -> Turn:
    """A question about somebody or something that aspen cannot know."""
    name = draw.of(banks.FIRST_NAMES) if draw.chance(0.3) else draw.coined(capital=True)
    question = draw.one(
        f"Who is {name}?",
        f"who was {name} {draw.of(banks.LAST_NAMES)}?",
        f"Where was {name} born?",
        f"What did {name} write?",
        f"When did {name} die?",
        f"Tell me about {name}.",
    )
    return question, UNKNOWN[0], UNKNOWN


SMALL_TALK: tuple[tuple[Callable[[Draw], Turn], int], ...] = (
    (lambda draw: faq_turn(draw, faq.GREETINGS), 5),
    (lambda draw: faq_turn(draw, faq.PERSONA), 6),
    (lambda draw: faq_turn(draw, faq.PANDO), 6),
    (lambda draw: faq_turn(draw, faq.CREATIVE), 4),
    (capital_turn, 4),
    (word_turn, 4),
    (fact_turn, 5),
    (calendar_turn, 2),
    (counting_turn, 2),
    (listing_turn, 2),
    (unknown_turn, 2),
)


def random_turn(draw: Draw) -> Turn:
    """One question of any kind of small talk."""
    functions, weights = zip(*SMALL_TALK, strict=True)
    return draw.rng.choices(functions, weights)[0](draw)


def conversation(draw: Draw) -> Exercise:
    """One to four turns of small talk, sometimes under a system prompt, sometimes opened by a greeting."""
    messages: list[Message] = []
    if draw.chance(0.2):
        messages.append({"role": "system", "content": draw.rng.choice(SYSTEM_PROMPTS)})
    turns = [random_turn(draw) for _ in range(draw.rng.choices((1, 2, 3, 4), (6, 3, 2, 1))[0])]
    if not draw.heldout and draw.chance(0.15):
        turns.insert(0, faq_turn(draw, faq.GREETINGS))
    for question, answer, _ in turns:
        messages += [user(question), assistant(answer)]
    return Exercise("chat", messages, says(*turns[-1][2]))


def introduction(draw: Draw) -> Exercise:
    """The user says who he or she is and asks for it later, with small talk in between."""
    name, city, job = draw.of(banks.FIRST_NAMES), draw.of(banks.CITIES), draw.of(banks.JOBS)
    colour, hobby, age = draw.of(banks.COLOURS), draw.of(banks.HOBBIES), draw.number(8, 90)
    article = "an" if job[0] in "aeiou" else "a"
    things = [
        (draw.one(f"My name is {name}.", f"I am {name}.", f"I'm {name}."), "What is my name?", f"Your name is {name}."),
        (draw.one(f"I live in {city}.", f"I am from {city}."), "Where do I live?", f"You live in {city}."),
        (f"I work as {article} {job}.", draw.one("What is my job?", "What do I do?"), f"You are {article} {job}."),
        (f"My favourite colour is {colour}.", "What is my favourite colour?", f"Your favourite colour is {colour}."),
        (
            draw.one(f"I like {hobby}.", f"I love {hobby}."),
            draw.one("What do I like?", "What is my hobby?"),
            f"You like {hobby}.",
        ),
        (draw.one(f"I am {age} years old.", f"I am {age}."), "How old am I?", f"You are {age} years old."),
    ]
    told = [things[0], *draw.rng.sample(things[1:], draw.number(0, 2))]
    joint = " and ".join((told[0][0].rstrip("."), *(thing[0].rstrip(".") for thing in told[1:]))) + "."
    text = joint if draw.chance(0.4) else " ".join(thing[0] for thing in told)
    _, question, answer = draw.rng.choice(told)
    if draw.chance(0.4):
        return Exercise("chat", [user(f"{text} {question}"), assistant(answer)], says(answer))
    messages = [user(draw.one("", "", "Hi! ", "Hello, ") + text), assistant(f"Nice to meet you, {name}!")]
    if draw.chance(0.4):
        between, reply, _ = random_turn(draw)
        messages += [user(between), assistant(reply)]
    return Exercise("chat", [*messages, user(spoken(draw, question)), assistant(answer)], says(answer))


def persona(draw: Draw) -> Exercise:
    """One question about aspen or Pando, alone: what a newcomer types first."""
    question, answer, accepted = faq_turn(draw, draw.rng.choice((faq.PERSONA, faq.PANDO, faq.GREETINGS, faq.CREATIVE)))
    return Exercise("persona", [user(question), assistant(answer)], says(*accepted))


def facts(draw: Draw) -> Exercise:
    """One short fact, alone."""
    function = draw.rng.choice((capital_turn, word_turn, fact_turn, calendar_turn, counting_turn))
    question, answer, accepted = function(draw)
    return Exercise(
        "facts", [user(question if draw.heldout else spoken(draw, question)), assistant(answer)], says(*accepted)
    )
