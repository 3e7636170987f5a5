"""Both carriers of the protocol: framing, order, back-pressure, and an end that is told once."""

from __future__ import annotations

import asyncio
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from pando.core.messages import Abort, Command, Control, Frame, Generate, Load, Output, Reply
from pando.core.sampling import SamplingParams
from pando.errors import EngineUnavailable
from pando.transport import FrameReader, LocalTransport, SocketInbox, SocketTransport, frame


def generate(number: int, num_tokens: int = 3) -> Generate:
    return Generate(rid=f"r{number}", input_ids=[number] * num_tokens, sampling=SamplingParams())


def output(number: int, num_tokens: int = 3) -> Output:
    tokens = [number] * num_tokens
    return Output(rid=f"r{number}", token_ids=tokens, prompt_tokens=1, cached_tokens=0, completion_tokens=num_tokens)


class Ear:
    """What the API side hears."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.frames = 0
        self.closed: list[str] = []
        self.threads: set[int] = set()

    def on_replies(self, replies: list[Reply]) -> None:
        self.replies.extend(replies)
        self.frames += 1
        self.threads.add(threading.get_ident())

    def on_close(self, reason: str) -> None:
        self.closed.append(reason)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until the condition holds; fails after ten seconds."""
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, (len(self.replies), self.closed)
            await asyncio.sleep(0.001)


Pair = tuple[SocketTransport, SocketInbox]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    transport, inbox = SocketTransport(ours), SocketInbox(theirs)
    yield transport, inbox
    transport.close()
    theirs.close()


# -- frames


def test_frames_may_be_split_at_any_byte() -> None:
    bodies = [b"", b"a", b"bc" * 3, bytes(range(256)), b""]
    stream = b"".join(map(frame, bodies))
    for cut in range(len(stream) + 1):
        reader = FrameReader()
        assert reader.feed(stream[:cut]) + reader.feed(stream[cut:]) == bodies
    reader = FrameReader()
    assert [body for byte in stream for body in reader.feed(bytes([byte]))] == bodies
    assert reader.feed(b"") == []


def test_random_pieces_of_a_long_stream() -> None:
    rng = random.Random(0)
    bodies = [rng.randbytes(rng.choice([0, 1, 5, 300, 70_000])) for _ in range(200)]
    stream, reader, found, at = b"".join(map(frame, bodies)), FrameReader(), [], 0
    while at < len(stream):
        size = rng.choice([1, 3, 4, 5, 1000, 100_000])
        found += reader.feed(stream[at : at + size])
        at += size
    assert found == bodies


# -- inside one process


def test_local_commands_arrive_in_order_from_many_threads() -> None:
    transport = LocalTransport()
    threads = [
        threading.Thread(target=lambda t=t: [transport.send(generate(t * 1000 + i)) for i in range(200)])  # type: ignore[misc]
        for t in range(4)
    ]
    for thread in threads:
        thread.start()
    found: list[Command] = []
    while len(found) < 800:
        news = transport.inbox.drain(5.0)
        assert news, "nothing arrived for five seconds"
        found += news
    numbers = [command.input_ids[0] for command in found if isinstance(command, Generate)]
    assert len(numbers) == 800
    for t in range(4):
        assert [n for n in numbers if n // 1000 == t] == [t * 1000 + i for i in range(200)]
    assert transport.inbox.drain(0) == []


def test_local_drain_waits_no_longer_than_asked() -> None:
    inbox = LocalTransport().inbox
    started = time.monotonic()
    assert inbox.drain(0) == [] and time.monotonic() - started < 0.5
    assert inbox.drain(0.05) == [] and time.monotonic() - started >= 0.05


def test_local_close_wakes_a_drain_that_waits_for_ever() -> None:
    transport = LocalTransport()
    found: list[list[Command]] = []
    thread = threading.Thread(target=lambda: found.append(transport.inbox.drain(None)), daemon=True)
    thread.start()
    time.sleep(0.02)
    assert not transport.inbox.closed
    transport.close()
    thread.join(5)
    assert found == [[]] and transport.inbox.closed


def test_local_replies_before_start_are_kept_and_come_first() -> None:
    async def main() -> None:
        transport, ear = LocalTransport(), Ear()
        transport.inbox.send([output(0)])
        transport.inbox.send([output(1), output(2)])
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        assert ear.replies == [], "nothing is delivered before the caller has returned to its loop"
        sender = threading.Thread(target=lambda: [transport.inbox.send([output(n)]) for n in range(3, 50)])
        sender.start()
        await ear.until(lambda: len(ear.replies) == 50)
        sender.join()
        assert [reply.rid for reply in ear.replies if isinstance(reply, Output)] == [f"r{n}" for n in range(50)]
        assert ear.threads == {threading.get_ident()}

    asyncio.run(main())


@pytest.mark.parametrize("side", ["engine", "client"])
def test_local_end_is_told_once(side: str) -> None:
    async def main() -> None:
        transport, ear = LocalTransport(), Ear()
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        for reason in ("first", "second"):
            if side == "engine":
                transport.inbox.close(reason)
            transport.close()
        await ear.until(lambda: bool(ear.closed))
        await asyncio.sleep(0.01)
        assert ear.closed == ["first" if side == "engine" else "closed by the client"]
        transport.send(Abort())  # nobody reads it, nothing happens

    asyncio.run(main())


def test_local_engine_that_ended_before_start_is_reported_at_start() -> None:
    async def main() -> None:
        transport, ear = LocalTransport(), Ear()
        transport.inbox.send([output(0)])
        transport.inbox.close("the engine was shut down")
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        await ear.until(lambda: bool(ear.closed))
        assert ear.closed == ["the engine was shut down"] and len(ear.replies) == 1

    asyncio.run(main())


def test_local_replies_to_a_loop_that_has_ended_are_dropped() -> None:
    transport, ear = LocalTransport(), Ear()

    async def main() -> None:
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)

    asyncio.run(main())
    transport.inbox.send([output(1)])
    transport.close()
    assert ear.replies == [] and transport.inbox.closed


# -- between two processes


def test_socket_carries_commands_and_frames(pair: Pair) -> None:
    transport, inbox = pair

    async def main() -> None:
        ear = Ear()
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        sent: list[Command] = [generate(1), Abort("r1"), Abort(), Control(7, "info", {"a": [1, "b"]})]
        for command in sent:
            transport.send(command)
        found: list[Command] = []
        while len(found) < len(sent):
            found += inbox.drain(5.0)
        assert found == sent
        inbox.send([output(1), Load("alive")])
        inbox.send([output(2)])
        await ear.until(lambda: ear.frames == 2)
        assert ear.replies == [output(1), Load("alive"), output(2)]

    asyncio.run(main())


def test_socket_drain_waits_no_longer_than_asked(pair: Pair) -> None:
    _, inbox = pair
    started = time.monotonic()
    assert inbox.drain(0) == [] and time.monotonic() - started < 0.5
    assert inbox.drain(0.05) == [] and time.monotonic() - started >= 0.05
    assert not inbox.closed


def test_socket_send_never_blocks_and_all_arrives_in_order(pair: Pair) -> None:
    """Megabytes are queued while nobody reads; then a slow engine reads them all."""
    transport, inbox = pair

    async def main() -> None:
        ear = Ear()
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        started = time.monotonic()
        for number in range(40):
            transport.send(generate(number, 20_000 if number % 2 else 1))
        assert time.monotonic() - started < 5
        found: list[Command] = []
        while len(found) < 40:
            found += await asyncio.to_thread(inbox.drain, 5.0)
        assert [(c.rid, len(c.input_ids)) for c in found if isinstance(c, Generate)] == [
            (f"r{n}", 20_000 if n % 2 else 1) for n in range(40)
        ]

    asyncio.run(main())


def test_socket_sends_from_many_threads_do_not_mix(pair: Pair) -> None:
    transport, inbox = pair

    async def main() -> None:
        ear = Ear()
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        threads = [
            threading.Thread(target=lambda t=t: [transport.send(generate(t * 100 + i, 500)) for i in range(50)])  # type: ignore[misc]
            for t in range(4)
        ]
        for thread in threads:
            thread.start()
        numbers: list[int] = []
        while len(numbers) < 200:
            for command in await asyncio.to_thread(inbox.drain, 5.0):
                assert isinstance(command, Generate) and len(set(command.input_ids)) == 1
                numbers.append(command.input_ids[0])
        for thread in threads:
            thread.join()
        for t in range(4):
            assert [n for n in numbers if n // 100 == t] == [t * 100 + i for i in range(50)]

    asyncio.run(main())


def test_socket_floods_in_both_directions_do_not_deadlock(pair: Pair) -> None:
    """The engine answers each command with more than the socket holds, and reads only between its answers."""
    transport, inbox = pair
    num, tokens = 60, 10_000

    def engine() -> None:
        seen = 0
        while seen < num:
            for command in inbox.drain(5.0):
                assert isinstance(command, Generate)
                inbox.send([output(command.input_ids[0], tokens)])
                seen += 1

    async def main() -> None:
        ear = Ear()
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        thread = threading.Thread(target=engine, daemon=True)
        thread.start()
        for number in range(num):
            transport.send(generate(number, tokens))
        await ear.until(lambda: len(ear.replies) == num)
        thread.join(5)
        assert not thread.is_alive()
        assert ear.replies == [output(n, tokens) for n in range(num)]

    asyncio.run(main())


def test_socket_engine_waits_for_a_slow_client(pair: Pair) -> None:
    """Back-pressure: the engine's send blocks instead of gathering replies without bound."""
    transport, inbox = pair
    sent = threading.Event()

    def engine() -> None:
        inbox.send([output(1, 200_000)])
        sent.set()

    thread = threading.Thread(target=engine, daemon=True)
    thread.start()
    assert not sent.wait(0.1)

    async def main() -> None:
        ear = Ear()
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        await ear.until(lambda: len(ear.replies) == 1)

    asyncio.run(main())
    assert sent.wait(5)


def test_socket_end_of_the_engine_is_told_once_and_later_sends_are_dropped(pair: Pair) -> None:
    transport, inbox = pair

    async def main() -> None:
        ear = Ear()
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        inbox.send([output(5)])
        inbox._socket.close()
        await ear.until(lambda: bool(ear.closed))
        for _ in range(3):
            transport.send(generate(1, 50_000))
            transport.close()
        await asyncio.sleep(0.01)
        assert ear.closed == ["the engine process ended"]
        assert ear.replies == [output(5)], "what was sent before the end is delivered"

    asyncio.run(main())


def test_socket_engine_that_dies_with_commands_unread(pair: Pair) -> None:
    transport, inbox = pair

    async def main() -> None:
        ear = Ear()
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        for number in range(20):
            transport.send(generate(number, 20_000))
        inbox._socket.close()
        await ear.until(lambda: bool(ear.closed))
        assert len(ear.closed) == 1

    asyncio.run(main())


def test_socket_inbox_gives_what_came_before_the_end(pair: Pair) -> None:
    transport, inbox = pair
    transport.send(generate(1))
    transport.close()
    transport.close()
    assert inbox.drain(5.0) == [generate(1)]
    assert inbox.drain(5.0) == [] and inbox.closed
    inbox.send([output(1)])  # nobody listens, nothing happens


def test_socket_half_a_command_then_the_end(pair: Pair) -> None:
    transport, inbox = pair
    body = frame(msgspec.msgpack.encode(generate(1)))
    transport._socket.send(body[:9])
    assert inbox.drain(0.05) == []
    transport.close()
    assert inbox.drain(5.0) == [] and inbox.closed


def test_socket_commands_sent_before_start_are_not_lost(pair: Pair) -> None:
    transport, inbox = pair
    for number in range(4):
        transport.send(generate(number, 50_000))

    async def main() -> None:
        ear = Ear()
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        found: list[Command] = []
        while len(found) < 4:
            news = await asyncio.to_thread(inbox.drain, 2.0)
            assert news, "the rest of the queue is never written"
            found += news

    asyncio.run(main())


# -- before the loop


def test_receive_gives_replies_one_by_one_and_start_delivers_the_rest(pair: Pair) -> None:
    transport, inbox = pair
    assert transport.receive(0.01) is None
    inbox.send([Load("weights", 0.5), Load("ready"), output(1)])
    inbox.send([output(2)])
    assert transport.receive(5.0) == Load("weights", 0.5)
    assert transport.receive(5.0) == Load("ready")

    async def main() -> None:
        ear = Ear()
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        inbox.send([output(3)])
        await ear.until(lambda: len(ear.replies) == 3)
        assert ear.replies == [output(1), output(2), output(3)]

    asyncio.run(main())


def test_receive_keeps_half_a_frame_for_start(pair: Pair) -> None:
    transport, inbox = pair
    whole = frame(msgspec.msgpack.encode(Frame([output(1)])))
    inbox._socket.send(frame(msgspec.msgpack.encode(Frame([Load("a")]))) + whole[:11])
    assert transport.receive(5.0) == Load("a")

    async def main() -> None:
        ear = Ear()
        transport.start(asyncio.get_running_loop(), ear.on_replies, ear.on_close)
        inbox._socket.send(whole[11:])
        await ear.until(lambda: len(ear.replies) == 1)
        assert ear.replies == [output(1)]

    asyncio.run(main())


@pytest.mark.parametrize("unread", [False, True])
def test_receive_reports_an_engine_that_ended(pair: Pair, unread: bool) -> None:
    transport, inbox = pair
    inbox.send([Load("weights")])
    if unread:
        transport.send(generate(1))  # the engine dies before it has read this: a reset instead of an end
    inbox._socket.close()
    assert transport.receive(5.0) == Load("weights")
    with pytest.raises(EngineUnavailable, match="ended while starting"):
        transport.receive(5.0)


def test_sockets_with_large_descriptors() -> None:
    """A host program with a thousand open files: select() would refuse."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip(f"at most {hard} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    fillers = []
    try:
        while not fillers or fillers[-1].fileno() < 1030:
            fillers.append(socket.socket())
        ours, theirs = socket.socketpair()
        transport, inbox = SocketTransport(ours), SocketInbox(theirs)
        transport.send(Abort("a"))
        assert inbox.drain(5.0) == [Abort("a")]
        inbox.send([Load("x")])
        assert transport.receive(5.0) == Load("x")
        transport.close()
        theirs.close()
    finally:
        for filler in fillers:
            filler.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
