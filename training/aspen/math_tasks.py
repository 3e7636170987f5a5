"""Arithmetic written out digit by digit, so that a tiny model can do each step."""

from training.aspen import banks
from training.aspen.exercise import Draw, Exercise, assistant, ends_with_number, is_heldout, says, user

PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands")
Worked = tuple[str, int]
"""The steps as text, and the result."""


def digits_of(number: int) -> list[int]:
    """Digits from the ones upwards."""
    return [int(digit) for digit in reversed(str(number))]


def add(a: int, b: int) -> Worked:
    """Column addition."""
    first, second = digits_of(a), digits_of(b)
    carry, lines = 0, []
    for index in range(max(len(first), len(second))):
        x = first[index] if index < len(first) else 0
        y = second[index] if index < len(second) else 0
        total = x + y + carry
        terms = f"{x} + {y}" + (f" + {carry}" if carry else "")
        carry = total // 10
        lines.append(f"{PLACES[index]}: {terms} = {total}, write {total % 10}" + (f", carry {carry}" if carry else ""))
    if carry:
        lines.append(f"{PLACES[len(lines)]}: write {carry}")
    return "\n".join(lines), a + b


def subtract(a: int, b: int) -> Worked:
    """Column subtraction with borrowing; `a` is not smaller than `b`."""
    first, second = digits_of(a), digits_of(b)
    borrow, lines = 0, []
    for index, x in enumerate(first):
        y = second[index] if index < len(second) else 0
        left = x - borrow
        taken = f" - {borrow}" if borrow else ""
        borrow = int(left < y)
        digit = left + 10 * borrow - y
        top = f"{x + 10 * borrow}"
        lines.append(
            f"{PLACES[index]}: " + ("borrow, " if borrow else "") + f"{top}{taken} - {y} = {digit}, write {digit}"
        )
    return "\n".join(lines), a - b


def multiply_digit(a: int, digit: int) -> Worked:
    """Multiply by one digit."""
    carry, lines = 0, []
    for index, x in enumerate(digits_of(a)):
        total = x * digit + carry
        terms = f"{x} * {digit}" + (f" + {carry}" if carry else "")
        carry = total // 10
        lines.append(f"{PLACES[index]}: {terms} = {total}, write {total % 10}" + (f", carry {carry}" if carry else ""))
    if carry:
        lines.append(f"{PLACES[len(lines)]}: write {carry}")
    return "\n".join(lines), a * digit


def multiply(a: int, b: int) -> Worked:
    """Multiply two numbers of at most two digits (or three times one)."""
    if b < 10:
        return multiply_digit(a, b)
    tens, ones = divmod(b, 10)
    low_steps, low = multiply_digit(a, ones)
    high_steps, high = multiply_digit(a, tens)
    sum_steps, total = add(high * 10, low)
    return (
        f"{a} * {ones}:\n{low_steps}\n= {low}\n{a} * {tens}:\n{high_steps}\n= {high}, so {a} * {tens}0 = {high * 10}\n"
        f"{high * 10} + {low}:\n{sum_steps}",
        total,
    )


def work_out(a: int, operator: str, b: int) -> Worked:
    """Steps and result of one operation; the steps of one-digit problems are empty."""
    if a < 10 and b < 10:
        return "", {"+": a + b, "-": a - b, "*": a * b}[operator]
    return {"+": add, "-": subtract, "*": multiply}[operator](a, b)


def problem(draw: Draw) -> tuple[int, str, int]:
    """Two numbers and an operator of the split: one problem in eight is held out."""
    while True:
        operator = draw.rng.choices("+-*", (4, 4, 4))[0]
        size = (
            draw.rng.choices((1, 2, 3, 4), (2, 5, 4, 1))[0]
            if operator != "*"
            else draw.rng.choices((1, 2, 3), (2, 5, 1))[0]
        )
        a = draw.number(0 if size == 1 else 10 ** (size - 1), 10**size - 1)
        if operator == "*":
            b = (
                draw.number(2, 9)
                if size == 3 or draw.chance(0.75)
                else draw.number(11, 99)
                if size == 2
                else draw.number(0, 9)
            )
        else:
            other = size if draw.chance(0.7) else draw.number(1, size)
            b = draw.number(0 if other == 1 else 10 ** (other - 1), 10**other - 1)
            if operator == "+" and draw.chance(0.3):
                a, b = b, a
            if operator == "-" and a < b:
                a, b = b, a
        if (a < 10 and b < 10) or is_heldout(f"{a}{operator}{b}") == draw.heldout:
            return a, operator, b


def asked(draw: Draw, a: int, operator: str, b: int) -> str:
    """A way to ask for the result."""
    shown = f"{a} {operator} {b}" if operator != "*" else f"{a} {draw.one('*', '*', 'x', 'times')} {b}"
    if draw.chance(0.1):
        shown = shown.replace(" ", "")
        return draw.one(shown, f"{shown}=?", f"what is {shown}?")
    words = {
        "+": (f"Add {a} and {b}.", f"What is the sum of {a} and {b}?", f"What is {a} plus {b}?"),
        "-": (f"Subtract {b} from {a}.", f"What is {a} minus {b}?", f"What is the difference between {a} and {b}?"),
        "*": (f"Multiply {a} by {b}.", f"What is the product of {a} and {b}?", f"What is {a} times {b}?"),
    }[operator]
    return draw.one(
        f"What is {shown}?",
        f"What is {shown}?",
        f"what is {shown}",
        f"Calculate {shown}.",
        f"Compute {shown}.",
        f"{shown} = ?",
        f"How much is {shown}?",
        shown,
        *words,
    )


def solved(draw: Draw, question: str, worked: Worked, equation: str, final: str) -> Exercise:
    """An exercise whose steps stand in the reasoning or in the answer."""
    steps, result = worked
    if draw.chance(0.35):
        reasoning = f"{steps}\n{equation} = {result}" if steps else f"{equation} = {result}"
        return Exercise(
            "arithmetic", [user(question), assistant(final, reasoning)], ends_with_number(result), thinking=True
        )
    content = f"{steps}\n{equation} = {result}" if steps else f"{equation} = {result}"
    if final != f"{equation} = {result}":
        content += f"\n{final}"
    return Exercise("arithmetic", [user(question), assistant(content)], ends_with_number(result))


def arithmetic(draw: Draw) -> Exercise:
    """One sum, difference or product."""
    a, operator, b = problem(draw)
    worked = work_out(a, operator, b)
    equation = f"{a} {operator} {b}"
    return solved(draw, asked(draw, a, operator, b), worked, equation, f"{equation} = {worked[1]}")


def story(draw: Draw) -> Exercise:
    """A word problem with one operation."""
    while True:
        a, operator, b = problem(draw)
        if a >= 2 and b >= 2 and a < 1000:
            break
    name, other = draw.distinct(banks.FIRST_NAMES, 2)
    things = (
        draw.of(
            tuple(word for word in banks.OBJECTS + banks.FRUITS if not word.endswith(("s", "x", "y", "h", "f", "o")))
        )
        + "s"
    )
    if operator == "+":
        question = draw.one(
            f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
            f"{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have?",
            f"There are {a} {things} in one box and {b} in another. How many {things} are there in all?",
            f"{name} has {a} {things} and {other} has {b}. How many {things} do they have together?",
        )
    elif operator == "-":
        question = draw.one(
            f"{name} has {a} {things} and gives {b} to {other}. How many {things} are left?",
            f"There are {a} {things}. {name} takes {b}. How many {things} are left?",
            f"{name} had {a} {things} and lost {b}. How many {things} does {name} have now?",
            f"A shop has {a} {things} and sells {b}. How many {things} are left?",
        )
    else:
        question = draw.one(
            f"A box holds {a} {things}. How many {things} are in {b} boxes?",
            f"One of the {things} costs {a} euros. How much do {b} of them cost?",
            f"{name} buys {b} bags with {a} {things} each. How many {things} is that?",
        )
    worked = work_out(a, operator, b)
    return solved(draw, question, worked, f"{a} {operator} {b}", f"Answer: {worked[1]}")


def comparison(draw: Draw) -> Exercise:
    """Larger, smaller, maximum, minimum, even or odd."""
    high = draw.rng.choice((9, 99, 999))
    kind = draw.number(0, 3)
    if kind == 0:
        a = draw.number(0, high)
        word = "odd" if a % 2 else "even"
        return Exercise(
            "arithmetic",
            [user(draw.one(f"Is {a} even or odd?", f"Is the number {a} odd or even?")), assistant(f"{a} is {word}.")],
            says(f"{a} is {word}."),
        )
    values = draw.rng.sample(range(high + 1), 2 if kind == 1 else draw.number(3, 5))
    larger = draw.chance(0.5)
    best = max(values) if larger else min(values)
    if kind == 1:
        word = draw.one("larger", "bigger", "greater") if larger else draw.one("smaller", "less")
        question = draw.one(
            f"Which is {word}, {values[0]} or {values[1]}?", f"Which number is {word}: {values[0]} or {values[1]}?"
        )
        answer = f"{best} is {word} than {min(values) if larger else max(values)}."
        return Exercise("arithmetic", [user(question), assistant(answer)], says(answer))
    word = "largest" if larger else "smallest"
    shown = ", ".join(map(str, values))
    answer = f"The {word} number is {best}."
    question = draw.one(
        f"What is the {word} number: {shown}?",
        f"Find the {word} number in this list: {shown}",
        f"Which of these numbers is the {word}? {shown}",
    )
    return Exercise("arithmetic", [user(question), assistant(answer)], says(answer))
