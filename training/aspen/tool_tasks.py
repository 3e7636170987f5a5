"""Tool calls in the OpenAI function format: choose a function, fill in its arguments, and answer from its result."""

import json
from collections.abc import Sequence

from training.aspen import chat_tasks, faq
from training.aspen.exercise import Check, Draw, Exercise, Message, assistant, calls_tools, mentions, says, user
from training.aspen.tool_bank import TOOLS, Arguments, Request, Tool, weather


def definition(draw: Draw, tool: Tool, name: str) -> Message:
    """The OpenAI form of a tool, with or without descriptions of its parameters."""
    described = draw.chance(0.6)
    properties = {
        key: {**schema, "description": text} if described else dict(schema)
        for key, (schema, text) in tool.parameters.items()
    }
    parameters = {"type": "object", "properties": properties, "required": list(tool.parameters)}
    return {
        "type": "function",
        "function": {"name": name, "description": draw.rng.choice(tool.descriptions), "parameters": parameters},
    }


def offered(draw: Draw, needed: Sequence[Tool]) -> tuple[list[Message], dict[Tool, str]]:
    """Definitions of the needed tools among others, and the name each tool goes by."""
    others = [tool for tool in TOOLS if tool not in needed]
    tools = [*needed, *draw.rng.sample(others, draw.rng.choices((0, 1, 2, 3), (3, 4, 3, 2))[0])]
    draw.rng.shuffle(tools)
    taken: dict[Tool, str] = {}
    for tool in tools:
        taken[tool] = draw.rng.choice([name for name in tool.names if name not in taken.values()])
    return [definition(draw, tool, taken[tool]) for tool in tools], taken


def call_message(calls: Sequence[tuple[str, Arguments]], first_id: int = 0) -> Message:
    """An assistant message with tool calls."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"call_{first_id + index}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for index, (name, arguments) in enumerate(calls)
        ],
    }


def result_message(result: object) -> Message:
    """A tool's reply."""
    return {"role": "tool", "content": json.dumps(result)}


def opening(draw: Draw) -> list[Message]:
    """Sometimes a system prompt."""
    return [{"role": "system", "content": draw.rng.choice(chat_tasks.SYSTEM_PROMPTS)}] if draw.chance(0.25) else []


def single_call(draw: Draw) -> Exercise:
    """One call."""
    tool = draw.rng.choice(TOOLS)
    tools, taken = offered(draw, [tool])
    request = tool.use(draw)
    calls = [(taken[tool], request.arguments)]
    return Exercise("tool call", [*opening(draw), user(request.ask), call_message(calls)], calls_tools(calls), tools)


def double_request(draw: Draw, first: Tool, second: Tool) -> tuple[str, list[Request]]:
    """Two requests in one message."""
    requests = [first.use(draw), second.use(draw)]
    if first.use is weather and first is second:
        cities = [str(request.arguments["city"]) for request in requests]
        ask = draw.one(
            f"What is the weather in {cities[0]} and {cities[1]}?",
            f"Compare the weather in {cities[0]} and in {cities[1]}.",
        )
        return ask, requests
    joint = draw.one(" ", " And: ", "\n")
    return f"{requests[0].ask}{joint}{requests[1].ask}", requests


def parallel_calls(draw: Draw) -> Exercise:
    """Two calls at once: the same tool twice, or two tools."""
    first = draw.rng.choice(TOOLS)
    second = first if draw.chance(0.6) else draw.rng.choice([tool for tool in TOOLS if tool is not first])
    tools, taken = offered(draw, [first] if first is second else [first, second])
    ask, requests = double_request(draw, first, second)
    calls = [(taken[tool], request.arguments) for tool, request in zip((first, second), requests, strict=True)]
    return Exercise("tool call", [*opening(draw), user(ask), call_message(calls)], calls_tools(calls), tools)


def dialogue(draw: Draw) -> Exercise:
    """One to three requests over the same tools, with results and answers, and sometimes chat in between.

    The definitions are the longest part of a tool exercise, so most of the training happens in such dialogues.
    """
    tools, taken = offered(draw, [draw.rng.choice(TOOLS)])
    messages = opening(draw)
    check: Check = says("")
    for round_index in range(draw.number(1, 3)):
        kind = draw.rng.random()
        if kind < 0.15:
            question, answer, accepted = small_talk(draw)
            messages += [user(question), assistant(answer)]
            check = says(*accepted)
            continue
        chosen = [draw.rng.choice(list(taken)) for _ in range(2 if kind < 0.35 else 1)]
        ask, requests = double_request(draw, *chosen) if len(chosen) == 2 else single_request(draw, chosen[0])
        calls = [(taken[tool], request.arguments) for tool, request in zip(chosen, requests, strict=True)]
        messages += [user(ask), call_message(calls, 2 * round_index)]
        messages += [result_message(request.result[0]) for request in requests]
        messages.append(assistant(" ".join(request.result[1] for request in requests)))
        check = mentions(requests[-1].result[2])
    return Exercise("tool dialogue", messages, check, tools)


def single_request(draw: Draw, tool: Tool) -> tuple[str, list[Request]]:
    """One request."""
    request = tool.use(draw)
    return request.ask, [request]


def tool_answer(draw: Draw) -> Exercise:
    """Answer from a tool's result."""
    tool = draw.rng.choice(TOOLS)
    tools, taken = offered(draw, [tool])
    request = tool.use(draw)
    messages = [
        *opening(draw),
        user(request.ask),
        call_message([(taken[tool], request.arguments)]),
        result_message(request.result[0]),
        assistant(request.result[1]),
    ]
    return Exercise("tool answer", messages, mentions(request.result[2]), tools)


def small_talk(draw: Draw) -> chat_tasks.Turn:
    """A question that no tool answers."""
    if draw.chance(0.5):
        return chat_tasks.faq_turn(draw, draw.rng.choice((faq.GREETINGS, faq.PERSONA, faq.PANDO, faq.CREATIVE)))
    return draw.rng.choice((chat_tasks.capital_turn, chat_tasks.word_turn, chat_tasks.calendar_turn))(draw)


def no_call(draw: Draw) -> Exercise:
    """A question that needs none of the tools at hand."""
    tools, _ = offered(draw, [draw.rng.choice(TOOLS)])
    question, answer, accepted = small_talk(draw)
    return Exercise("no tool", [*opening(draw), user(question), assistant(answer)], says(*accepted), tools)
