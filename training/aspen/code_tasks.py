"""Small Python functions: write them, and judge them by running them on examples."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from training.aspen.exercise import Check, Draw, Exercise, assistant, user, visible_answer


@dataclass(frozen=True, slots=True)
class Snippet:
    """A function: what it does in words, its usual names and arguments, its body, and example calls with results."""

    does: tuple[str, ...]
    names: tuple[str, ...]
    arguments: str
    body: str
    examples: tuple[tuple[tuple[object, ...], object], ...]


SNIPPETS: tuple[Snippet, ...] = (
    Snippet(
        ("adds two numbers", "returns the sum of two numbers"),
        ("add", "add_numbers", "sum_two"),
        "a, b",
        "return a + b",
        (((2, 3), 5), ((-1, 4), 3)),
    ),
    Snippet(
        ("subtracts two numbers", "returns the difference of two numbers"),
        ("subtract", "difference", "minus"),
        "a, b",
        "return a - b",
        (((5, 3), 2),),
    ),
    Snippet(
        ("multiplies two numbers", "returns the product of two numbers"),
        ("multiply", "product", "times"),
        "a, b",
        "return a * b",
        (((5, 3), 15),),
    ),
    Snippet(("divides two numbers",), ("divide", "quotient"), "a, b", "return a / b", (((6, 3), 2),)),
    Snippet(
        ("returns the larger of two numbers", "returns the maximum of two numbers"),
        ("larger", "maximum", "max_of_two"),
        "a, b",
        "return a if a > b else b",
        (((6, 3), 6), ((1, 2), 2)),
    ),
    Snippet(
        ("returns the smaller of two numbers", "returns the minimum of two numbers"),
        ("smaller", "minimum", "min_of_two"),
        "a, b",
        "return a if a < b else b",
        (((6, 3), 3),),
    ),
    Snippet(
        ("returns the largest number in a list", "returns the maximum of a list"),
        ("largest", "list_max", "find_max"),
        "values",
        "return max(values)",
        ((([1, 5, 2],), 5),),
    ),
    Snippet(
        ("returns the smallest number in a list", "returns the minimum of a list"),
        ("smallest", "list_min", "find_min"),
        "values",
        "return min(values)",
        ((([4, 1, 2],), 1),),
    ),
    Snippet(
        ("returns the sum of a list", "adds all numbers in a list"),
        ("total", "list_sum", "sum_list"),
        "values",
        "return sum(values)",
        ((([4, 1, 2],), 7),),
    ),
    Snippet(
        ("returns the average of a list", "computes the mean of a list"),
        ("average", "mean"),
        "values",
        "return sum(values) / len(values)",
        ((([4, 2],), 3),),
    ),
    Snippet(
        ("checks whether a number is even", "returns True if a number is even"),
        ("is_even", "even"),
        "n",
        "return n % 2 == 0",
        (((4,), True), ((3,), False)),
    ),
    Snippet(
        ("checks whether a number is odd", "returns True if a number is odd"),
        ("is_odd", "odd"),
        "n",
        "return n % 2 == 1",
        (((4,), False),),
    ),
    Snippet(
        ("checks whether a number is positive",), ("is_positive", "positive"), "n", "return n > 0", (((4,), True),)
    ),
    Snippet(
        ("reverses a string", "returns a string backwards"),
        ("reverse", "reverse_string", "backwards"),
        "text",
        "return text[::-1]",
        ((("abc",), "cba"),),
    ),
    Snippet(
        ("reverses a list", "returns a list backwards"),
        ("reverse_list", "reversed_list"),
        "values",
        "return values[::-1]",
        ((([1, 2],), [2, 1]),),
    ),
    Snippet(
        ("returns the length of a string", "counts the characters of a string"),
        ("length", "count_characters"),
        "text",
        "return len(text)",
        ((("abc",), 3),),
    ),
    Snippet(
        ("counts the words in a string", "returns the number of words in a text"),
        ("count_words", "word_count"),
        "text",
        "return len(text.split())",
        ((("a b c",), 3),),
    ),
    Snippet(
        ("squares a number", "returns the square of a number"),
        ("square", "squared"),
        "n",
        "return n * n",
        (((4,), 16),),
    ),
    Snippet(("doubles a number", "returns twice a number"), ("double", "twice"), "n", "return 2 * n", (((4,), 8),)),
    Snippet(
        ("returns the absolute value of a number",),
        ("absolute", "abs_value"),
        "n",
        "return n if n >= 0 else -n",
        (((-4,), 4),),
    ),
    Snippet(
        ("converts a string to upper case",), ("to_upper", "upper"), "text", "return text.upper()", ((("a",), "A"),)
    ),
    Snippet(
        ("converts a string to lower case",), ("to_lower", "lower"), "text", "return text.lower()", ((("A",), "a"),)
    ),
    Snippet(
        ("returns the first element of a list",),
        ("first", "first_element"),
        "values",
        "return values[0]",
        ((([4, 1],), 4),),
    ),
    Snippet(
        ("returns the last element of a list",),
        ("last", "last_element"),
        "values",
        "return values[-1]",
        ((([4, 1],), 1),),
    ),
    Snippet(
        ("sorts a list", "returns a sorted list"),
        ("sort_list", "sorted_list"),
        "values",
        "return sorted(values)",
        ((([4, 1],), [1, 4]),),
    ),
    Snippet(
        ("removes duplicates from a list",),
        ("unique", "remove_duplicates"),
        "values",
        "return list(dict.fromkeys(values))",
        ((([4, 1, 4],), [4, 1]),),
    ),
    Snippet(
        ("greets a person by name", "returns a greeting"),
        ("greet", "greeting"),
        "name",
        'return f"Hello, {name}!"',
        ((("Bob",), "Hello, Bob!"),),
    ),
    Snippet(
        ("checks whether a string is a palindrome",),
        ("is_palindrome", "palindrome"),
        "text",
        "return text == text[::-1]",
        ((("aba",), True), (("ab",), False)),
    ),
    Snippet(
        ("computes the factorial of a number", "returns n factorial"),
        ("factorial", "fact"),
        "n",
        "result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result",
        (((4,), 24),),
    ),
    Snippet(
        ("computes the n-th Fibonacci number", "returns the n-th Fibonacci number"),
        ("fibonacci", "fib"),
        "n",
        "a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
        (((7,), 13),),
    ),
    Snippet(
        ("checks whether a number is prime",),
        ("is_prime", "prime"),
        "n",
        "if n < 2:\n        return False\n    for i in range(2, n):\n        if n % i == 0:\n            return False"
        "\n    return True",
        (((7,), True), ((9,), False)),
    ),
    Snippet(
        ("counts the vowels in a string",),
        ("count_vowels", "vowels"),
        "text",
        'return sum(1 for letter in text.lower() if letter in "aeiou")',
        ((("Hello",), 2),),
    ),
    Snippet(
        ("returns the even numbers of a list", "keeps only the even numbers of a list"),
        ("even_numbers", "keep_even"),
        "values",
        "return [value for value in values if value % 2 == 0]",
        ((([1, 2, 4],), [2, 4]),),
    ),
    Snippet(
        ("squares every number in a list",),
        ("square_all", "squares"),
        "values",
        "return [value * value for value in values]",
        ((([1, 2],), [1, 4]),),
    ),
    Snippet(
        ("counts how often a value appears in a list",),
        ("count_value", "occurrences"),
        "values, value",
        "return values.count(value)",
        ((([1, 2, 1], 1), 2),),
    ),
    Snippet(
        ("joins a list of words with spaces",),
        ("join_words", "join"),
        "words",
        'return " ".join(words)',
        (((["a", "b"],), "a b"),),
    ),
    Snippet(
        ("converts Celsius to Fahrenheit",),
        ("to_fahrenheit", "celsius_to_fahrenheit"),
        "celsius",
        "return celsius * 9 / 5 + 32",
        (((100,), 212),),
    ),
    Snippet(
        ("returns the area of a rectangle",),
        ("area", "rectangle_area"),
        "width, height",
        "return width * height",
        (((2, 3), 6),),
    ),
)


def runs(name: str | None, examples: Sequence[tuple[tuple[object, ...], object]]) -> Check:
    """Accept code whose function `name` (None: any name) gives the right results; it sees harmless builtins only."""

    def check(text: str) -> bool:
        match = re.search(r"```(?:python)?\n(.*?)```", visible_answer(text), re.DOTALL)
        source = match.group(1) if match else visible_answer(text)
        defined = re.search(r"^def (\w+)\(", source, re.MULTILINE)
        if not defined or "import" in source or "__" in source or "while" in source:
            return False
        allowed = (abs, dict, len, list, max, min, range, reversed, set, sorted, str, sum, int, float, round)
        scope: dict[str, object] = {"__builtins__": {item.__name__: item for item in allowed}}
        try:
            exec(source, scope)  # the check of a generated function is to run it
            function = scope[name or defined.group(1)]
            return all(function(*arguments) == result for arguments, result in examples)  # type: ignore[operator]
        except Exception:  # whatever a generated function raises, it is wrong
            return False

    return check


def write_function(draw: Draw) -> Exercise:
    """Write one function, with the name given or a usual one."""
    snippet = draw.rng.choice(SNIPPETS)
    does = draw.rng.choice(snippet.does)
    named = draw.chance(0.5)
    name = draw.rng.choice(snippet.names) if named else snippet.names[0]
    called = f" called {name}" if named else ""
    question = draw.one(
        f"Write a Python function{called} that {does}.",
        f"write a function{called} that {does}",
        f"Write a function{called} in Python that {does}.",
        f"Give me a Python function{called} that {does}.",
        f"Can you write a Python function{called} that {does}?",
        f"I need a function{called} that {does}.",
        f"Please write Python code: a function{called} that {does}.",
    )
    source = f"def {name}({snippet.arguments}):\n    {snippet.body}"
    return Exercise(
        "code",
        [user(question), assistant(f"```python\n{source}\n```")],
        runs(name if named else None, snippet.examples),
    )


def complete_function(draw: Draw) -> Exercise:
    """Complete a function whose first line and docstring are given."""
    snippet = draw.rng.choice(SNIPPETS)
    name = draw.rng.choice(snippet.names)
    does = draw.rng.choice(snippet.does)
    head = f"def {name}({snippet.arguments}):"
    document = f'    """{does[0].upper()}{does[1:]}."""'
    question = (
        draw.one("Complete this function:", "Complete the code:", "Finish this Python function:")
        + f"\n```python\n{head}\n{document}\n```"
    )
    return Exercise(
        "code",
        [user(question), assistant(f"```python\n{head}\n{document}\n    {snippet.body}\n```")],
        runs(name, snippet.examples),
    )
