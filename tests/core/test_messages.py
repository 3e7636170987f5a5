"""Every message survives the wire, alone and inside of what carries it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pando.core.batch import Batch, NewSlot, StepResult
from pando.core.info import EngineInfo
from pando.core.messages import (
    Abort,
    Command,
    Control,
    ControlReply,
    Failure,
    Finish,
    Frame,
    Generate,
    Load,
    Output,
    Reply,
    TokenLogprobs,
)
from pando.core.sampling import GrammarSpec, LogprobSpec, SamplingParams

FULL = SamplingParams(
    max_new_tokens=7,
    temperature=0.25,
    top_p=0.5,
    top_k=3,
    min_p=0.125,
    frequency_penalty=1.5,
    presence_penalty=-1.5,
    repetition_penalty=1.25,
    min_new_tokens=2,
    n=4,
    stop=["ä", "\n"],
    stop_token_ids=[2, 1],
    stop_regex=["a+"],
    ignore_eos=True,
    skip_special_tokens=False,
    spaces_between_special_tokens=False,
    no_stop_trim=True,
    logit_bias={5: -100.0, 70000: 1.5},
    sampling_seed=2**63 - 1,
    grammar=GrammarSpec("regex", "[a-z]+"),
)
SPEC = LogprobSpec(start=3, top=2, token_ids=[9])
LOGPROBS = [TokenLogprobs(4, None), TokenLogprobs(5, -0.5, [(-0.5, 5), (-1.25, 6)], [(-3.0, 9)])]

COMMANDS: list[Command] = [
    Generate(rid="r", input_ids=[0, 1, 2**31 - 1], sampling=SamplingParams()),
    Generate(
        rid="ü" * 50,
        input_ids=list(range(500)),
        sampling=FULL,
        seed=2**63 - 1,
        stream=True,
        logprobs=SPEC,
        namespace="tenant",
        priority=-3,
        timeout=1.5,
    ),
    Abort("r1"),
    Abort(None),
    Control(2**40, "flush_cache"),
    Control(1, "x", {"a": [1, None, {"b": 2.5}]}),
]
REPLIES: list[Reply] = [
    Output(rid="r", token_ids=[], prompt_tokens=3, cached_tokens=2, completion_tokens=0),
    Output(
        rid="r",
        token_ids=[4, 5],
        prompt_tokens=3,
        cached_tokens=2,
        completion_tokens=2,
        logprobs=LOGPROBS,
        prompt_logprobs=LOGPROBS[:1],
        finish=Finish("stop", "END"),
    ),
    *(
        Output(rid="r", token_ids=[1], prompt_tokens=1, cached_tokens=0, completion_tokens=1, finish=finish)
        for finish in (Finish("stop", 2), Finish("length"), Finish("abort", None, "gone", "request_aborted"))
    ),
    Failure(rid="r", code="step_failed", message="it failed"),
    Failure(rid="", code="config_error", message="m", param="page_size"),
    ControlReply(3, {"a": 1, "nested": {"b": [True]}}),
    ControlReply(4, error_code="invalid_value", message="no"),
    Load("weights", 0.25, "12 of 40"),
    Load("alive"),
]


@pytest.mark.parametrize("message", COMMANDS, ids=lambda m: type(m).__name__)
def test_commands_round_trip_by_their_tag(message: Command) -> None:
    data = msgspec.msgpack.encode(message)
    found = msgspec.msgpack.Decoder(Command).decode(data)
    assert found == message and type(found) is type(message)


@pytest.mark.parametrize("message", REPLIES, ids=lambda m: type(m).__name__)
def test_replies_round_trip_by_their_tag(message: Reply) -> None:
    found = msgspec.msgpack.Decoder(Reply).decode(msgspec.msgpack.encode(message))
    assert found == message and type(found) is type(message)


@pytest.mark.parametrize("replies", [[], REPLIES, REPLIES * 30], ids=["none", "each", "many"])
def test_a_frame_keeps_order_and_kinds(replies: list[Reply]) -> None:
    found = msgspec.msgpack.Decoder(Frame).decode(msgspec.msgpack.encode(Frame(replies)))
    assert found.replies == replies
    assert [type(reply) for reply in found.replies] == [type(reply) for reply in replies]


def test_a_batch_and_its_result_round_trip() -> None:
    new = NewSlot(3, [1, 2, 3], 2, FULL, 2**63 - 1, SPEC, [2, 7])
    batch = Batch(9, [3, 1], [0, 40], [3, 1], [1, 0], [0, 0], [new], [5], [3, 3], [0, 1], [17, 4])
    assert (batch.num_rows, batch.total_tokens) == (2, 4)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=Batch) == batch
    result = StepResult(9, [[4], [5, 6]], {0: LOGPROBS}, {1: LOGPROBS}, {1: "not finite"}, 0.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=StepResult) == result


def test_engine_info_crosses_as_a_control_result() -> None:
    info = EngineInfo(
        model_path="a/b",
        served_model_names=["b", "c"],
        context_length=10,
        vocab_size=20,
        max_total_num_tokens=30,
        eos_token_ids=[2],
        generation_defaults={"temperature": 0.5, "top_k": 20},
    )
    reply = ControlReply(0, msgspec.to_builtins(info))
    found = msgspec.msgpack.Decoder(Reply).decode(msgspec.msgpack.encode(reply))
    assert isinstance(found, ControlReply) and msgspec.convert(found.result, EngineInfo) == info
    assert info.model_name == "b"
    assert msgspec.structs.replace(info, served_model_names=[]).model_name == "a/b"


def test_a_value_out_of_range_is_refused_by_the_decoder_too() -> None:
    good: dict[str, Any] = msgspec.to_builtins(COMMANDS[0])
    good["sampling"]["temperature"] = -1.0
    with pytest.raises(ValueError, match="temperature is -1.0"):
        msgspec.msgpack.Decoder(Command).decode(msgspec.msgpack.encode(good))


def test_messages_are_frozen_and_defaults_are_not_shared() -> None:
    for message in [*COMMANDS, *REPLIES]:
        with pytest.raises(AttributeError):
            setattr(message, message.__struct_fields__[0], None)
    first, second = SamplingParams(), SamplingParams()
    first.stop.append("x")
    assert second.stop == []
