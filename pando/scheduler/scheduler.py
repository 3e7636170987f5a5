"""The loop: one iteration plans a step, lets it run behind the previous one, and commits that one's results.

    commands -> gates -> plan -> launch -> commit(previous) -> sample

`executor.depth` says how many steps may be in flight: 0 runs a step to its end before the next is planned, 1 plans and
launches the next while one runs. Nothing else in the loop depends on it.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import deque
from typing import Any, Protocol

from pando.core.batch import Batch, StepResult, TokenMask
from pando.core.messages import Abort, Command, Control, ControlReply, Failure, Generate, Load
from pando.errors import CapacityExceeded, PandoError, RequestAborted, RequestTimeout, StepFailed
from pando.scheduler.admission import Admission, Plan
from pando.scheduler.control import Controls
from pando.scheduler.gates import Gates
from pando.scheduler.masks import Masks
from pando.scheduler.reporter import Reporter
from pando.scheduler.request import Request, State
from pando.scheduler.results import Results
from pando.scheduler.rules import Rules
from pando.scheduler.stats import Stats
from pando.transport import Inbox

_log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
"""Longest sleep of an idle loop: it then says that it is alive."""


class Executor(Protocol):
    """The data plane. Steps run in the order they were launched. S is its own handle of a step."""

    depth: int
    """Steps that may be in flight while the next is planned: 0 or 1."""

    def launch(self, batch: Batch) -> Any:
        """Start the forward pass of a step and return its handle; may return before it has run."""

    def sample(self, step: Any, mask: TokenMask | None) -> None:
        """Choose the tokens of a launched step, where `mask` says only those that a grammar allows."""

    def collect(self, step: Any) -> StepResult:
        """Wait for a sampled step. Raises what the step raised."""

    def reset(self) -> None:
        """Forget all slots after a failed step."""


class Scheduler:
    """Owns the loop; everything it knows about requests, cache and devices is in the objects it is built from."""

    def __init__(
        self,
        executor: Executor,
        admission: Admission,
        inbox: Inbox,
        gates: Gates,
        stats: Stats,
        rules: Rules,
    ) -> None:
        self._executor = executor
        self._admission = admission
        self._inbox = inbox
        self._gates = gates
        self._stats = stats
        self._rules = rules
        self._requests: dict[str, Request] = {}
        self._deadlines: list[tuple[float, int, Request]] = []
        self._in_flight: deque[tuple[Plan, Any]] = deque()
        self._failing: Plan | None = None
        """The step being launched, sampled or committed, for whoever handles its failure."""
        self._sent_at = 0.0
        self._waited = 0.0
        """Seconds of this iteration spent on waiting for results."""
        self._order = 0
        self._stopping = False
        self.paused = False
        self._masks = Masks(rules.vocab_size, overlap=executor.depth > 0)
        self.results = Results(admission, stats, self._requests)
        self.controls = Controls(self)
        self.reporter = Reporter()

    def run(self) -> None:
        """Loop until a shutdown command comes or the other end is gone; nothing a request does ends it."""
        while not self._stopping and not self._inbox.closed:
            try:
                self.step()
            except Exception as error:
                _log.exception("a scheduler step failed; its requests run again apart")
                self._recover(error)
            self._send()
            self.reporter.tick(self._stats, self._admission)

    def step(self) -> bool:
        """One iteration; True if a step was launched or committed."""
        self._failing = None
        self._take_commands()
        self._expire()
        for request, error in self._gates.poll():
            self._ready(request, error)
        started = time.perf_counter()
        if started - self._sent_at > IDLE_SECONDS:
            self.results.replies.append(Load("alive"))
            self._send()
        plan = None if self.paused else self._admission.next()
        if plan is None and not self._in_flight:
            self._unstick()
            return False
        self._waited, overlapped = 0.0, plan is not None and bool(self._in_flight)
        self._masks.begin(plan)
        launched = self._launch(plan)
        while self._in_flight:
            self._commit(*self._in_flight[0])
        if plan is not None:
            self._failing = plan
            self._executor.sample(launched, self._masks.end())
            self._in_flight.append((plan, launched))
            if self._executor.depth == 0:
                self._commit(plan, launched)
        seconds = time.perf_counter() - started
        self._stats.step_seconds += seconds
        self._admission.overlap.stepped(seconds, self._waited, overlapped=overlapped)
        return True

    def _launch(self, plan: Plan | None) -> Any:
        if plan is None:
            return None
        self._admission.cache.launched(plan.batch.step)
        self._failing = plan
        launched = self._executor.launch(plan.batch)
        self._stats.steps += 1
        self._stats.step_tokens += plan.batch.total_tokens
        return launched

    def _commit(self, plan: Plan, launched: Any) -> None:
        self._failing = plan
        started = time.perf_counter()
        result = self._executor.collect(launched)
        self._waited += time.perf_counter() - started
        self._in_flight.popleft()
        self._admission.cache.collected(plan.batch.step)
        self._stats.forward_seconds += result.forward_seconds
        self._stats.device_seconds += result.device_seconds
        self.results.commit(plan, result)
        self._send()

    def _send(self) -> None:
        if self.results.replies:
            replies, self.results.replies = self.results.replies, []
            self._inbox.send(replies)
            self._sent_at = time.perf_counter()

    def _take_commands(self) -> None:
        """Handle what has arrived; with nothing to do, wait for it and send a sign of life."""
        timeout = self._patience()
        for command in self._inbox.drain(timeout):
            try:
                self._handle(command)
            except Exception as error:
                _log.exception("command %s failed", type(command).__name__)
                self._refuse(command, error)
        if timeout:
            self.results.replies.append(Load("alive"))
            self._send()

    def _patience(self) -> float:
        """Seconds to wait for a command: none while there is work."""
        if self._in_flight or (self.num_unfinished > len(self._gates) and not self.paused):
            return 0.0
        if len(self._gates):
            return 0.002
        if self._deadlines:
            return min(IDLE_SECONDS, max(0.001, self._deadlines[0][0] - time.monotonic()))
        return IDLE_SECONDS

    def _handle(self, command: Command) -> None:
        if isinstance(command, Generate):
            try:
                self._add(command)
            except PandoError as error:
                self._refuse(command, error)
        elif isinstance(command, Abort):
            self.abort(command.rid)
        else:
            self.results.replies.append(self.controls.answer(command))

    def _refuse(self, command: Command, error: Exception) -> None:
        known = error if isinstance(error, PandoError) else StepFailed(f"internal error: {error!r}")
        if isinstance(command, Generate):
            self.results.replies.append(
                Failure(rid=command.rid, code=known.code, message=known.message, param=known.param)
            )
        elif isinstance(command, Control):
            self.results.replies.append(ControlReply(command.call_id, error_code=known.code, message=known.message))

    def _add(self, message: Generate) -> None:
        self._rules.check(message, len(self._admission.waiting), self._requests)
        self._order += 1
        request = Request(message, self._order, time.monotonic(), self._rules.end_ids(message.sampling))
        if message.sampling.needs_text:
            request.stop = self._rules.stop_checker(message.sampling)
        self._requests[request.rid] = request
        self._stats.requests += 1
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.order, request))
        try:
            ready = self._gates.enter(request)
        except Exception as error:
            _log.exception("a gate refused request %s", request.rid)
            self._gates.leave(request)
            self.results.fail(request, StepFailed(f"internal error while preparing the request: {error!r}"))
            return
        if ready:
            self._ready(request, None)

    def _ready(self, request: Request, error: PandoError | None) -> None:
        if request.state is State.DONE:
            return
        if error is not None:
            self.results.fail(request, error)
            return
        try:
            if self.results.begin(request):
                return
        except Exception as problem:  # of its guide: nobody else's
            _log.exception("request %s failed before its first step", request.rid)
            self.results.fail(request, StepFailed(f"internal error while starting the request: {problem!r}"))
            return
        if request.state is State.GATED:  # else its prompt is read already
            request.move(State.WAITING)
            self._admission.waiting.push(request)

    def abort(self, rid: str | None, error: PandoError | None = None) -> None:
        """Abort exactly this request, or all with None. Its slot is free for the next step; unknown ids are ignored."""
        for request in [*self._requests.values()] if rid is None else filter(None, [self._requests.get(rid)]):
            self._gates.leave(request)
            self.results.abort(request, error or RequestAborted("aborted"))

    def _expire(self) -> None:
        if len(self._deadlines) > 2 * len(self._requests) + 64:  # most of them ended long before their time
            self._deadlines = [entry for entry in self._deadlines if entry[2].state is not State.DONE]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            request = heapq.heappop(self._deadlines)[2]
            if request.state is not State.DONE:
                seconds = time.monotonic() - request.arrival
                self.abort(request.rid, RequestTimeout(f"no result within the request's timeout ({seconds:.3g} s)"))

    def _unstick(self) -> None:
        """Nothing runs, nothing can be planned: the first request can never fit. It fails, the rest go on."""
        if self.paused or any(request.held for request in self._admission.running):
            return
        stuck = self._admission.running[0] if self._admission.running else self._admission.waiting.peek()
        if stuck is not None:
            cache = self._admission.cache
            total = cache.budget.num_bytes // max(1, cache.page_bytes) * cache.page_size
            self.results.fail(
                stuck, CapacityExceeded(f"the request needs more than the {total} tokens of the KV pool; shorten it")
            )

    def _recover(self, error: Exception) -> None:
        """A step raised. Everything in flight is dropped; its rows run again in halves until the culprit is alone."""
        self._stats.failed_steps += 1
        self._in_flight.clear()
        self._executor.reset()
        self._admission.cache.collected(self._admission.last_step)
        failing, self._failing = self._failing, None
        suspects = failing.rows if failing else self._admission.suspects()
        alone = suspects[0] if len(suspects) == 1 else None
        placed = {request.rid for request in suspects}
        others = [request for request in self._admission.running if request.rid not in placed]
        self._admission.split_for_trial(suspects, others)
        for request in self._requests.values():
            request.pending = request.void = 0  # tokens of the dropped steps will not come, also to retracted requests
            request.in_doubt = False
        culprits = list(self._requests.values()) if not suspects else [alone] if alone is not None else []
        for request in culprits:
            if request.state is not State.DONE:
                self._gates.leave(request)
                self.results.fail(request, StepFailed(f"the request made its step fail: {error!r}"))

    @property
    def num_unfinished(self) -> int:
        """Requests accepted and not ended."""
        return len(self._requests)

    @property
    def num_gated(self) -> int:
        """Requests that wait for a gate."""
        return len(self._gates)

    @property
    def stats(self) -> Stats:
        """The engine's counters."""
        return self._stats

    @property
    def admission(self) -> Admission:
        """The running set and the queue."""
        return self._admission

    @property
    def rules(self) -> Rules:
        """What a request must satisfy."""
        return self._rules

    def stop(self) -> None:
        """End the loop after this iteration; requests alive are aborted."""
        self.abort(None, RequestAborted("the engine is shutting down"))
        self._stopping = True
