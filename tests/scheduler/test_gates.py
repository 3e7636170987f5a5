"""Gates: a request is ready when every gate that wanted it is done, in any order; failures and departures."""

from __future__ import annotations

import random

from pando.core.messages import Abort, Failure, Generate
from pando.core.sampling import SamplingParams
from pando.errors import InvalidRequest, PandoError
from pando.scheduler.gates import Gates
from pando.scheduler.request import Request, State
from tests.scheduler.harness import bench


def request(rid: str) -> Request:
    return Request(Generate(rid=rid, input_ids=[1, 2], sampling=SamplingParams()), 1, 0.0, frozenset())


class ManualGate:
    """Wants requests whose id contains its letter; `open` and `fail` decide when they are ready."""

    def __init__(self, letter: str) -> None:
        self.letter = letter
        self.held: dict[str, Request] = {}
        self.done: list[tuple[Request, PandoError | None]] = []
        self.cancelled: list[str] = []
        self.submitted: list[str] = []
        self.polls = 0

    def wants(self, request: Request) -> bool:
        return self.letter in request.rid

    def submit(self, request: Request) -> None:
        self.submitted.append(request.rid)
        self.held[request.rid] = request

    def open(self, rid: str, error: PandoError | None = None) -> None:
        self.done.append((self.held.pop(rid), error))

    def poll(self) -> list[tuple[Request, PandoError | None]]:
        self.polls += 1
        done, self.done = self.done, []
        return done

    def cancel(self, request: Request) -> None:
        self.cancelled.append(request.rid)
        self.held.pop(request.rid, None)
        self.done = [entry for entry in self.done if entry[0] is not request]


def test_a_request_that_no_gate_wants_is_ready_at_once() -> None:
    gate = ManualGate("a")
    gates = Gates([gate])
    assert gates.enter(request("x")) and len(gates) == 0
    assert gates.poll() == [] and gate.submitted == [] and gate.polls == 0, "nothing is asked when nobody waits"
    assert Gates([]).enter(request("a"))


def test_ready_when_the_last_of_its_gates_is_done_in_any_order() -> None:
    for order in ("ab", "ba"):
        parts = {letter: ManualGate(letter) for letter in "abc"}
        gates = Gates(list(parts.values()))
        both = request("ab")
        assert not gates.enter(both) and len(gates) == 1
        assert parts["c"].submitted == []
        parts[order[0]].open("ab")
        assert gates.poll() == [] and len(gates) == 1
        parts[order[1]].open("ab")
        assert gates.poll() == [(both, None)] and len(gates) == 0
        assert gates.poll() == []
        assert all(part.cancelled == [] for part in parts.values())


def test_a_failure_at_one_gate_cancels_the_others() -> None:
    a, b = ManualGate("a"), ManualGate("b")
    gates = Gates([a, b])
    both, error = request("ab"), InvalidRequest("no such grammar")
    gates.enter(both)
    a.open("ab", error)
    assert gates.poll() == [(both, error)] and len(gates) == 0
    assert b.cancelled == ["ab"] and a.cancelled == []


def test_two_failures_in_one_poll_are_reported_once() -> None:
    a, b = ManualGate("a"), ManualGate("b")
    gates = Gates([a, b])
    both, error = request("ab"), InvalidRequest("first")
    gates.enter(both)
    a.open("ab", error)
    b.open("ab", InvalidRequest("second"))
    assert gates.poll() == [(both, error)]
    assert gates.poll() == []


def test_leaving_cancels_at_the_gates_that_still_hold_it() -> None:
    a, b = ManualGate("a"), ManualGate("b")
    gates = Gates([a, b])
    both = request("ab")
    gates.enter(both)
    a.open("ab")
    gates.poll()
    gates.leave(both)
    gates.leave(both)
    assert (a.cancelled, b.cancelled, len(gates)) == ([], ["ab"], 0)
    gates.leave(request("never entered"))


def test_in_the_loop_aborts_failures_and_others() -> None:
    rng = random.Random(0)
    parts = [ManualGate(letter) for letter in "ab"]
    b = bench(gates=parts)
    names = [f"{kind}{i}" for kind in ("x", "a", "b", "ab") for i in range(8)]
    for name in names:
        b.add(name, [rng.randrange(10, 900) for _ in range(6)], 3, ignore_eos=True)
    failed: set[str] = set()
    aborted: set[str] = set()
    for _ in range(400):
        b.step()
        gate = rng.choice(parts)
        if gate.held and rng.random() < 0.5:
            rid = rng.choice(list(gate.held))
            bad = rng.random() < 0.2
            failed |= {rid} if bad else set()
            gate.open(rid, InvalidRequest("bad") if bad else None)
        if rng.random() < 0.1:
            rid = rng.choice(names)
            aborted |= {rid} - set(b.ended)
            b.inbox.commands.append(Abort(rid))
        running = {r.rid for r in b.scheduler.admission.running}
        assert not running & {rid for part in parts for rid in part.held}, "it runs before its gates are done"
        assert b.scheduler.num_gated == len({rid for part in parts for rid in part.held} | _reported(parts))
        if len(b.ended) == len(names):
            break
    assert set(b.ended) == set(names) and b.scheduler.num_gated == 0
    for rid, end in b.ended.items():
        if isinstance(end, Failure):
            assert rid in failed and end.code == "invalid_value"
        elif end.finish is not None and end.finish.kind == "abort":
            assert rid in aborted
        else:
            assert len(b.tokens[rid]) == 3 and rid not in failed
    assert failed and aborted


def _reported(parts: list[ManualGate]) -> set[str]:
    """Requests a gate has finished with and the loop has not asked about yet."""
    return {entry[0].rid for part in parts for entry in part.done}


def test_states_of_a_gated_request() -> None:
    gate = ManualGate("a")
    b = bench(gates=[gate])
    b.add("a", [11, 12], 1)
    b.step()
    assert gate.held["a"].state is State.GATED and not len(b.scheduler.admission.waiting)
    b.inbox.commands.append(Abort("a"))
    b.step()
    assert b.finish("a").kind == "abort" and gate.cancelled == ["a"]


def test_a_gate_that_raises_fails_only_those_that_wait_for_it() -> None:
    class Broken(ManualGate):
        def poll(self) -> list[tuple[Request, PandoError | None]]:
            raise RuntimeError("no compiler")

    good, broken = ManualGate("a"), Broken("b")
    gates = Gates([good, broken])
    for rid in ("a", "b", "ab"):
        assert not gates.enter(request(rid))
    good.open("a")
    ready = {request.rid: error for request, error in gates.poll()}
    assert ready["a"] is None and set(ready) == {"a", "b", "ab"}
    assert all(error is not None and "no compiler" in error.message for rid, error in ready.items() if rid != "a")
    assert len(gates) == 0


class Broken(ManualGate):
    """Raises when it is given a request."""

    def submit(self, request: Request) -> None:
        raise ValueError("no room")


def test_a_gate_that_raises_costs_only_the_request_it_was_given() -> None:
    b = bench(gates=[Broken("g")])
    b.add("f", [1, 2, 3], 4, ignore_eos=True)
    b.add("g", [1, 2, 3], 4)
    b.run(100)
    end = b.ended["g"]
    assert isinstance(end, Failure) and "no room" in end.message
    assert len(b.tokens["f"]) == 4 and not b.scheduler.num_unfinished
