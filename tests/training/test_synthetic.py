"""The exercise generator, its checks, the chat template and the shipped tokenizer."""

import ast
import json
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
tokenizers = pytest.importorskip("tokenizers")

from training.aspen import json_tasks, math_tasks, reading_tasks, recall_tasks, tool_tasks  # noqa: E402
from training.aspen.exercise import (  # noqa: E402
    Draw,
    Exercise,
    assistant,
    calls_tools,
    ends_with_number,
    is_json,
    mentions,
    says,
    user,
)
from training.aspen.pack import chat_document, fill_rows, text_rows  # noqa: E402
from training.aspen.paths import MODEL_FOLDER  # noqa: E402
from training.aspen.shape import SHAPES  # noqa: E402
from training.aspen.synthetic import LONG, SHORT, exercises, of_kind  # noqa: E402
from training.aspen.template import TEMPLATE_PATH, render  # noqa: E402
from training.aspen.tokenizer import SPECIAL_TOKENS, VISIBLE_TOKENS  # noqa: E402

WEATHER_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def tokenizer() -> "tokenizers.Tokenizer":
    """The shipped tokenizer."""
    return tokenizers.Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))


def texts(seed: int, split: str, count: int) -> list[str]:
    """The first exercises of a split, rendered."""
    return [exercise.text() for exercise in islice(exercises(seed, split), count)]


def test_equal_seeds_give_equal_exercises() -> None:
    assert texts(5, "train", 60) == texts(5, "train", 60)
    assert texts(5, "train", 60) != texts(6, "train", 60)
    assert not set(texts(5, "train", 60)) & set(texts(5, "heldout", 60))


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'"):
        next(exercises(0, "test"))


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("kind", [*SHORT, *LONG])
def test_checks_accept_the_reference_and_reject_a_wrong_answer(kind: str, split: str) -> None:
    maker, _ = (SHORT | LONG)[kind]
    for exercise in islice(of_kind(maker, 11, split), 12):
        assert exercise.check(exercise.reference()), exercise.text()
        assert not exercise.check("I would rather talk about submarines 123456789."), exercise.text()
        assert not exercise.check(""), exercise.text()


@pytest.mark.parametrize(
    ("a", "operator", "b", "result"),
    [
        (47, "+", 38, 85),
        (999, "+", 1, 1000),
        (52, "-", 38, 14),
        (1000, "-", 1, 999),
        (47, "*", 38, 1786),
        (305, "*", 9, 2745),
    ],
)
def test_worked_arithmetic_is_right(a: int, operator: str, b: int, result: int) -> None:
    steps, found = math_tasks.work_out(a, operator, b)
    assert found == result
    for line in steps.splitlines():
        if ": " in line and " = " in line:
            left, right = line.split(": ", 1)[1].removeprefix("borrow, ").split(" = ")
            assert eval_sum(left) == int(right.split(",")[0]), line


def eval_sum(expression: str) -> int:
    """Value of an expression of integers."""
    value = eval(compile(ast.parse(expression, mode="eval"), "steps", "eval"), {"__builtins__": {}})
    assert isinstance(value, int)
    return value


def test_heldout_problems_are_not_trained_on() -> None:
    def problems(split: str) -> set[tuple[int, str, int]]:
        draw = Draw(1, split)
        return {
            problem for problem in (math_tasks.problem(draw) for _ in range(2000)) if max(problem[0], problem[2]) > 9
        }

    assert not problems("train") & problems("heldout")


def test_checks() -> None:
    assert says("Paris.")(" paris") and not says("Paris.")("Paris, I think")
    assert (
        mentions("Rome")("Anna lives in Rome.")
        and not mentions("Rome", ["Oslo"])("Rome or Oslo")
        and not mentions("12")("It costs 123 euros.")
    )
    assert ends_with_number(85)("ones: 7 + 8 = 15\n47 + 38 = 85") and not ends_with_number(85)("85 is 84")
    assert (
        is_json({"a": 1})('{"a": 1}')
        and not is_json({"a": 1})('{"a": true}')
        and not is_json({"a": 1})('Here: {"a": 1}')
    )
    check = calls_tools([("f", {"x": 1})])
    assert check('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>')
    assert (
        not check('<tool_call>\n{"name": "f", "arguments": {"x": 2}}\n</tool_call>')
        and not check('{"name": "f"}')
        and not check("<tool_call>\n{\n</tool_call>")
    )


def test_template_renders_a_plain_chat() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user("hi"),
        assistant("Hello!"),
        user([{"type": "text", "text": "bye"}]),
    ]  # type: ignore[arg-type]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n"
    )
    assert render(messages) == expected
    assert render(messages, add_generation_prompt=True) == expected + "<|im_start|>assistant\n"
    assert (
        render(messages, add_generation_prompt=True, enable_thinking=True)
        == expected + "<|im_start|>assistant\n<think>\n"
    )
    assert render([user("1+1"), assistant("2", "1 + 1 = 2")]).endswith(
        "<|im_start|>assistant\n<think>\n1 + 1 = 2\n</think>\n\n2<|im_end|>\n"
    )


def test_template_renders_tools() -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
        ],
    }
    text = render(
        [user("weather?"), call, {"role": "tool", "content": "sunny"}, {"role": "tool", "content": "warm"}],
        [WEATHER_TOOL],
    )
    assert json.dumps(WEATHER_TOOL) in text
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n'
        "</tool_call><|im_end|>\n" in text
    )
    assert (
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwarm\n</tool_response><|im_end|>\n"
        in text
    )
    as_text = {**call, "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}]}
    assert render([user("weather?"), as_text], [WEATHER_TOOL]) in text


def test_transformers_renders_the_same(tokenizer: "tokenizers.Tokenizer") -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(MODEL_FOLDER)
    for exercise in islice(exercises(3, "train"), 40):
        tools = list(exercise.tools) or None
        arguments = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": exercise.thinking}
        assert theirs.apply_chat_template(exercise.question(), tools=tools, **arguments) == exercise.prompt()
    assert theirs(exercise.text()).input_ids == tokenizer.encode(exercise.text()).ids


def test_tokenizer_round_trip(tokenizer: "tokenizers.Tokenizer") -> None:
    for text in (*texts(1, "train", 40), "äöü 漢字 🙂\n\t  tabs", "a  b   c", "12345 67"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]


def test_special_tokens(tokenizer: "tokenizers.Tokenizer") -> None:
    assert tokenizer.get_vocab_size() == 8192
    for token in (*SPECIAL_TOKENS, *VISIBLE_TOKENS):
        assert tokenizer.encode(token).tokens == [token]
    assert tokenizer.decode(tokenizer.encode("<tool_call>x</tool_call><|im_end|>").ids) == "<tool_call>x</tool_call>"
    generation = json.loads((MODEL_FOLDER / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]


def test_shipped_folder_is_consistent() -> None:
    config = json.loads((MODEL_FOLDER / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["vocab_size"] == 8192 and config["tie_word_embeddings"]
    assert (MODEL_FOLDER / "chat_template.jinja").read_text("utf-8") == TEMPLATE_PATH.read_text("utf-8")
    shapes = [
        shape
        for shape in SHAPES.values()
        if (shape.hidden, shape.layers) == (config["hidden_size"], config["num_hidden_layers"])
    ]
    assert len(shapes) == 1
    weights = MODEL_FOLDER / "model.safetensors"
    assert abs(weights.stat().st_size - 2 * shapes[0].num_parameters()) < 20_000


def test_only_answers_are_supervised(tokenizer: "tokenizers.Tokenizer") -> None:
    exercise = Exercise("t", [user("hi"), assistant("Hello!"), user("1+1"), assistant("2", "1 + 1 = 2")], says("2"))
    tokens, weights = chat_document(tokenizer, exercise.text())
    supervised = tokenizer.decode(
        [token for token, weight in zip(tokens, weights, strict=True) if weight], skip_special_tokens=False
    )
    assert supervised == "Hello!<|im_end|>1 + 1 = 2\n</think>\n\n2<|im_end|>"


def test_rows_hold_whole_documents() -> None:
    documents = [([length] * length, [100] * length) for length in (5, 3, 7, 2, 8, 9, 4, 1)]
    rows = list(fill_rows(documents, 8, pad=0))
    assert all(len(tokens) == len(weights) == 8 for tokens, weights in rows)
    counts = {length: sum(int((tokens == length).sum()) for tokens, _ in rows) for length in range(1, 10)}
    assert counts == {**{length: length for length in (5, 3, 7, 2, 8, 4, 1)}, 6: 0, 9: 0}
    assert [row.tolist() for row, _ in text_rows([[1, 2, 3], [4, 5]], 3, end=9)] == [[1, 2, 3], [9, 4, 5]]


def test_recall_contexts_have_the_asked_size(tokenizer: "tokenizers.Tokenizer") -> None:
    draw = Draw(2, "heldout")
    for size in (300, 1500, 3000):
        lengths = [len(tokenizer.encode(recall_tasks.recall_of(draw, size).prompt()).ids) for _ in range(12)]
        assert 0.5 * size < sum(lengths) / len(lengths) < 1.4 * size, (size, lengths)


def test_public_generators_cover_their_task_names() -> None:
    draw = Draw(0, "train")
    assert reading_tasks.reading(draw).task == "reading"
    assert json_tasks.extraction(draw).task == "json"
    assert tool_tasks.no_call(draw).tools


def test_no_machine_paths_in_the_package() -> None:
    folder = Path(render.__code__.co_filename).parent
    for path in folder.glob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 600, path
