"""Plans the next step: every decoding sequence, then prompt chunks under way, then newly admitted requests.

One token budget covers the whole step. Decoding rows are planned first and take one token each, so a stream is never
starved and the gap between two of its tokens is bounded by the time of one full step. A prompt chunk is published to
the prefix cache when it is *planned*: steps run in order and a layer stores the KV of all rows before it attends, so a
request admitted later in the same step already reads it. 64 equal prompts that arrive together compute their prefix
once. Where that takes waiting, for the rest of a prompt that is read in chunks, or for a recurrent state that can be
resumed only after the step that saves it, a request waits, and those behind it go first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from pando.cache.awaited import awaited
from pando.cache.handle import CacheHandle, PageWrite
from pando.cache.manager import CacheManager
from pando.cache.scratch import Scratch
from pando.cache.spec import FULL, WINDOW
from pando.core.batch import Batch, NewSlot
from pando.scheduler.guide import Guide
from pando.scheduler.overlap import Overlap
from pando.scheduler.policy import WaitingQueue
from pando.scheduler.request import Request, State
from pando.scheduler.stats import Stats

MIN_SAVED = 16
"""Tokens that waiting a step must save at least."""
MAX_WAITING = 8
"""Requests that may be passed over in one step because they wait for a prefix."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a step and of a sequence, all in tokens or sequences."""

    token_budget: int
    max_running: int
    context_length: int
    page_size: int


@dataclass(slots=True)
class Plan:
    """A planned step: the batch that goes down, and the requests behind its rows."""

    batch: Batch
    rows: list[Request]


class Reserve:
    """Pages kept free for the growth of running sequences: a few tokens ahead for each.

    Too little and requests are retracted, too much and the pool idles. So it doubles with every retraction and decays
    slowly without one.
    """

    def __init__(self, low: float = 8.0, high: float = 1024.0, decay: float = 0.999) -> None:
        self.low, self.high, self.decay = low, high, decay
        self.ahead = low

    def retracted(self) -> None:
        """A request had to be retracted: keep more."""
        self.ahead = min(self.high, self.ahead * 2)

    def stepped(self) -> None:
        """A step was planned without retraction: relax."""
        self.ahead = max(self.low, self.ahead * self.decay)


class Admission:
    """Owns the running set and the slots; turns waiting requests into rows."""

    def __init__(self, cache: CacheManager, waiting: WaitingQueue, limits: Limits, stats: Stats) -> None:
        self.cache = cache
        self._stats = stats
        self.waiting = waiting
        self.limits = limits
        self.running: list[Request] = []
        self.trials: deque[list[Request]] = deque()
        """Groups that took part in a failed step and now run apart, to find the one that fails."""
        self.overlap = Overlap()
        self.planning: Request | None = None
        """The request a row is being planned for: the suspect if planning raises."""
        self.reserve = Reserve()
        self._saves_decodes = cache.states is not None and limits.page_size > 1
        self._scratch = Scratch(cache.store, cache.eviction)
        self._has_windows = cache.window is not None
        self.num_retracted = 0
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self._blocked: tuple[Request | None, int] = (None, 0)
        """The request that was denied last, and the available bytes it waits for (saves a match per step)."""
        self._freed: list[int] = []
        self._new: list[NewSlot] = []
        self._step = 0
        self._reading: list[CacheHandle] = []
        """Whose prompts are being read in the step that is planned."""

    def next(self) -> Plan | None:
        """The next step, or None if nothing can run. Its pages are allocated and its prompt chunks published."""
        plan = Plan(Batch(self._step, [], [], [], [], [], [], [], [], [], []), [])
        retracted = self.num_retracted
        self._plan_running(plan)
        while self.trials and all(request.state is State.DONE for request in self.trials[0]):
            self.trials.popleft()
        if self.trials:
            self._admit_trial(plan)
        elif self.num_retracted == retracted or not plan.rows:
            self._admit_waiting(plan)
            self.reserve.stepped()
        self.planning = None
        if not plan.rows:
            return None
        plan.batch.new_slots, self._new = self._new, []
        plan.batch.freed_slots, self._freed = self._freed, []
        self._step += 1
        return plan

    @property
    def last_step(self) -> int:
        """Number of the step planned last."""
        return self._step - 1

    def retract(self, request: Request) -> None:
        """Take a request out of the running set; what it computed stays in the cache while there is room."""
        self._release(request, min(request.planned, request.known), publish=True)
        request.leave(State.WAITING)
        self.waiting.push_front(request)
        self.num_retracted += 1

    def finish(self, request: Request, *, publish: bool) -> None:
        """A request is done, from whatever state: its slot and pages are free once no step in flight uses them."""
        if request.state is State.RUNNING:
            self._release(request, min(request.planned, request.known), publish=publish)
        elif request.state is State.WAITING and not self._in_trial(request):
            self.waiting.remove(request)
        request.leave(State.DONE)

    def split_for_trial(self, rows: list[Request], others: list[Request]) -> None:
        """A step with `rows` failed: those still alive run again in two halves, `others` and the queue after them.

        Nothing that the failed step computed is kept.
        """
        alive = [request for request in rows if request.state is State.RUNNING]
        for request in [*alive, *others]:
            self._release(request, 0, publish=False)
            request.leave(State.WAITING)
        self._new = []  # entered by a plan that failed: their slots and states are others' from now on
        for request in others:
            self.waiting.push_front(request)
        self.cache.invalidate()
        middle = len(alive) // 2
        self.trials.extendleft(group for group in (alive[middle:], alive[:middle]) if group)

    def suspects(self) -> list[Request]:
        """Whom to blame when planning raised: requests with impossible counts, else the one being planned."""
        sick = [request for request in self.running if not request.is_sound()]
        return sick or ([self.planning] if self.planning is not None else [])

    def _in_trial(self, request: Request) -> bool:
        return any(request in group for group in self.trials)

    def _plan_running(self, plan: Plan) -> None:
        """Rows for the running set: decoding sequences first, then prompts under way, oldest first."""
        decoding: list[Request] = []
        extending: list[Request] = []
        prefilling: list[Request] = []
        unsure: list[tuple[Request, Guide]] = []
        for request in self.running:
            length = request.known + request.pending
            to_run = length - request.planned - request.held
            if request.in_doubt:
                continue
            reading = request.planned < request.written - 1  # of its prompt, whatever was forced behind that
            if request.drafts or request.stale or (request.written < request.known and not reading):
                extending.append(request)
            elif to_run > 1 or (to_run and request.held):
                prefilling.append(request)
            elif to_run == 1 and (length < request.limit or request.planned < request.known):
                if request.pending and request.guide is not None:
                    unsure.append((request, request.guide))
                else:
                    decoding.append(request)
        if unsure:
            alone = not (decoding or extending or prefilling)
            decoding += _impatient(unsure, self.overlap.price if alone else None)
        if decoding:
            self._plan_decodes(plan, decoding)
        for request in extending:
            if request.state is State.RUNNING:
                self._plan_extend(plan, request, request.to_run, request.drafts)
        self._reading = [request.handle for request in prefilling if request.handle is not None]
        budget = max(self.limits.token_budget - len(plan.rows), self.limits.token_budget // 8)
        for request in prefilling:
            if budget > 0 and request.state is State.RUNNING:
                budget -= self._plan_chunk(plan, request, budget)

    def _plan_decodes(self, plan: Plan, decoding: list[Request]) -> None:
        """One token for each, in one cache call; if pages are short, one by one with retractions."""
        handles = [request.handle for request in decoding]
        grown = self.cache.grow_many(handles, [request.planned + 1 for request in decoding])  # type: ignore[arg-type]
        if grown.denied:
            for request in decoding:
                if request.state is State.RUNNING:
                    self._plan_extend(plan, request, 1, [])
            return
        batch = plan.batch
        slots = [request.slot for request in decoding]
        batch.page_slot += [slots[row] for row in grown.row]
        batch.page_index += grown.page_index
        batch.page_id += grown.page_id
        if self._has_windows:
            batch.page_group += grown.group
        batch.slot += slots
        batch.start += [request.planned for request in decoding]
        batch.num_tokens += [1] * len(decoding)
        emits = [1 if request.known + request.pending < request.limit else 0 for request in decoding]
        batch.emit += emits
        batch.num_draft += [0] * len(decoding)
        plan.rows += decoding
        first = len(plan.rows) - len(decoding)
        for row, (request, emit) in enumerate(zip(decoding, emits, strict=True), first):
            request.planned += 1
            request.pending += emit
            if self._saves_decodes:
                self._plan_saves(plan, row, request.planned - 1)

    def _plan_extend(self, plan: Plan, request: Request, num: int, drafts: list[int]) -> None:
        """A row of `num` known positions of a generating sequence, and its drafts; retracts others for room."""
        num += len(drafts)
        self.planning = request
        room = not drafts or self._may_go_back(request)
        if not room or not self._grow(plan, request, num, patient=not drafts):
            if drafts:
                request.drafts = []
                self._plan_extend(plan, request, num - len(drafts), [])
            return
        self._write_tokens(plan.batch, request, drafts)
        self._row(plan, request, num, int(request.known + request.pending < request.limit), len(drafts))
        request.in_doubt = bool(drafts)
        if self.cache.states is not None:
            self._plan_way_back(plan, request, bool(drafts))
        if self._saves_decodes:
            self._plan_saves(plan, len(plan.rows) - 1, request.planned - num)

    def _may_go_back(self, request: Request) -> bool:
        """Whether the request can go on behind its first wrong draft: a recurrent state needs a copy from before."""
        assert request.handle is not None
        return self.cache.states is None or self._scratch.lend(request.handle)

    def _plan_way_back(self, plan: Plan, request: Request, drafts: bool) -> None:
        """The row planned last goes on from the state before wrong drafts, and leaves one before those of its own."""
        handle, batch, row = request.handle, plan.batch, len(plan.rows) - 1
        assert handle is not None
        if request.stale:
            batch.restore_row.append(row)
            batch.restore_from.append(handle.scratch)
            request.stale = False
        if drafts:
            batch.save_row.append(row)
            batch.save_position.append(request.known)
            batch.save_slot.append(handle.scratch)
        else:
            self._scratch.take_back(handle, planned=True)

    def settle(self, request: Request, num_right: int) -> None:
        """A step with drafts has ended, `num_right` of them were right; the request has not got their tokens yet."""
        if self.cache.states is None or request.handle is None:
            request.planned = min(request.planned, request.known + num_right)
        elif request.planned > request.known + num_right:
            request.planned, request.stale = request.known, True
        else:
            self._scratch.take_back(request.handle)

    def _grow(self, plan: Plan, request: Request, num: int, *, patient: bool = True) -> bool:
        """Pages for the request's next `num` positions; a patient one retracts others for room, or itself. False if
        it has none.
        """
        assert request.handle is not None
        start = request.planned
        grown = self.cache.grow(request.handle, start + num, start)
        while grown.denied:
            victim = self._victim(plan) if patient else None
            if victim is None:
                return False
            self.retract(victim)
            self.reserve.retracted()
            if victim is request:
                return False
            grown = self.cache.grow(request.handle, start + num, start)
        self._write(plan.batch, request.slot, grown.writes)
        return True

    def _victim(self, plan: Plan) -> Request | None:
        """The latest running request that is not in this step yet (lowest priority first)."""
        placed = {request.rid for request in plan.rows}
        candidates = [request for request in self.running if request.rid not in placed]
        return min(candidates, key=lambda request: (request.priority, -request.order), default=None)

    def _plan_chunk(self, plan: Plan, request: Request, budget: int) -> int:
        """One row with the next positions of a prompt; returns how many."""
        self.planning = request
        to_run = request.to_run
        num = min(to_run, budget)
        page = self.limits.page_size
        if num < to_run and num > page:
            num -= (request.planned + num) % page
        assert request.handle is not None
        if self._has_windows:
            if not self._grow_window(plan, request, num):
                return 0
        elif request.known > request.handle.prompt_len and not self._grow(plan, request, num):
            return 0
        if request.written < request.known:
            self._write_tokens(plan.batch, request, [])
        may_emit = num == to_run and not request.held
        emit = int(may_emit and request.known + request.pending < request.limit)
        self._row(plan, request, num, emit)
        if self.cache.states is not None:
            self._plan_saves(plan, len(plan.rows) - 1, request.planned - num)
        self._write(plan.batch, request.slot, self.cache.publish(request.handle, request.planned))
        return num

    def _grow_window(self, plan: Plan, request: Request, num: int) -> bool:
        """Window pages for the next `num` positions of a prompt, those it can not see any more being let go first."""
        assert request.handle is not None
        known = min(request.planned, request.known)
        self._write(plan.batch, request.slot, self.cache.publish(request.handle, known, request.planned))
        return self._grow(plan, request, num)

    def _plan_saves(self, plan: Plan, row: int, start: int) -> None:
        """Recurrent states of a planned row that the cache wants to keep; the row runs from position `start`."""
        request, batch = plan.rows[row], plan.batch
        assert request.handle is not None
        certain = request.planned - len(request.drafts) if request.in_doubt else request.planned
        for position, slot in self.cache.plan_saves(request.handle, start, certain):
            batch.save_row.append(row)
            batch.save_position.append(position)
            batch.save_slot.append(slot)

    @staticmethod
    def _write_tokens(batch: Batch, request: Request, drafts: list[int]) -> None:
        """Tokens that the device's history lacks, and guesses for the positions after them."""
        tokens = [*request.key.tokens(request.written, request.known), *drafts]
        batch.token_slot += [request.slot] * len(tokens)
        batch.token_position += range(request.written, request.written + len(tokens))
        batch.token_id += tokens
        request.written = request.known

    def _row(self, plan: Plan, request: Request, num: int, emit: int, num_draft: int = 0) -> None:
        batch = plan.batch
        batch.slot.append(request.slot)
        batch.start.append(request.planned)
        batch.num_tokens.append(num)
        batch.emit.append(emit)
        batch.num_draft.append(num_draft)
        plan.rows.append(request)
        request.planned += num
        request.pending += emit

    def _write(self, batch: Batch, slot: int, writes: Iterable[PageWrite]) -> None:
        for group, index, page_id in writes:
            batch.page_slot.append(slot)
            batch.page_index.append(index)
            batch.page_id.append(page_id)
            if self._has_windows:
                batch.page_group.append(group)

    def _admit_waiting(self, plan: Plan) -> None:
        """Admit in queue order until budget, slots or pages run out. The queue's first is never overtaken for pages."""
        budget = self.limits.token_budget - plan.batch.total_tokens
        if budget <= 0 or not self._free_slots or not len(self.waiting):
            return
        passed: list[Request] = []
        try:
            self._admit_next(plan, budget, passed)
        finally:
            for request in passed:
                self.waiting.push_front(request)

    def _admit_next(self, plan: Plan, budget: int, passed: list[Request]) -> None:
        """Admit what `budget` tokens allow; those that wait for a prefix are taken out of the queue into `passed`."""
        ahead = sum(map(self._growth, self.running))
        while budget > 0 and self._free_slots and len(passed) < MAX_WAITING:
            request = self.waiting.peek()
            # A retracted request whose last token is still under way comes back when the host has seen it.
            if request is None or request.pending or request.void:
                break
            if self._reading and self._waits(request):
                self.waiting.remove(request)
                passed.append(request)
                continue
            if not self._admit(plan, request, int(ahead / self.limits.page_size)):
                break
            self.waiting.pop(request)
            ahead += self._growth(request)
            budget -= self._plan_chunk(plan, request, budget)
            if request.handle is not None and (self.cache.states is not None or request.to_run > 1):
                self._reading.append(request.handle)

    def _waits(self, request: Request) -> bool:
        """Whether others are about to leave a longer prefix of the prompt than there is."""
        key, namespace, limit = request.key, request.namespace, request.reusable
        found = awaited(self.cache, self._reading, key, namespace, limit) if self.cache.sharing else 0
        return found >= MIN_SAVED and found - self.cache.match(key, namespace, limit).num_tokens >= MIN_SAVED

    def _admit_trial(self, plan: Plan) -> None:
        """Admit the next group that has to prove itself, once those before it have emitted a token."""
        if any(request.on_trial for request in self.running):
            return
        budget = self.limits.token_budget
        for request in self.trials.popleft():
            if request.state is not State.WAITING:
                continue
            if budget > 0 and self._free_slots and self._admit(plan, request, 0):
                request.on_trial = True
                budget -= self._plan_chunk(plan, request, budget)
            else:
                self.waiting.push_front(request)

    def _growth(self, request: Request) -> float:
        """Tokens of room to keep for a running request."""
        left = request.limit - request.known
        ahead = self.reserve.ahead
        return left if left < ahead else ahead

    def _admit(self, plan: Plan, request: Request, keep: int) -> bool:
        """Give the request a slot and pages for all its tokens, leaving `keep` pages available; False if it can not."""
        self.planning = request
        needed = request.known
        page = self.limits.page_size
        keep = keep if self.running else 0
        blocked, wanted = self._blocked
        kept_bytes = keep * self.cache.page_bytes
        if blocked is request and self.running and self.cache.budget.available_bytes < wanted + kept_bytes:
            return False
        # Those who wait with the same prompt resume before its last token, so there has to be a state.
        hints = request.breakpoints
        if self.cache.states is not None and self.waiting.repeated(request):
            hints = [*hints, needed - 1]
        step, limit = self.limits.token_budget, request.reusable
        handle = self.cache.admit(
            request.key, request.namespace, needed, limit=limit, keep=keep, hints=hints, step=step
        )
        if handle.denied:
            available = self.cache.budget.available_bytes
            self._blocked = (request, available + handle.shortfall_bytes - kept_bytes)
            return False
        self._blocked = (None, 0)
        slot = self._free_slots.pop()
        request.begin(slot, handle)
        self.running.append(request)
        tokens, ends = request.key.tokens(), sorted(request.end_ids)
        states = handle.state, handle.restore
        self._new.append(
            NewSlot(slot, tokens, request.prompt_len, request.sampling, request.seed, request.logprobs, ends, *states)
        )
        pages = handle.pages[: (needed + page - 1) // page]
        self._write(plan.batch, slot, [(FULL, index, page_id) for index, page_id in enumerate(pages)])
        if self._has_windows:
            seen = enumerate(handle.window_pages[handle.first_window_page :], handle.first_window_page)
            self._write(plan.batch, slot, [(WINDOW, index, page_id) for index, page_id in seen])
        num_cached = min(handle.num_cached, request.prompt_len) if not request.admitted else handle.num_cached
        self._stats.count_admission(request, num_cached, first=not request.admitted)
        if not request.admitted:
            request.admitted = True
            request.cached_tokens = min(handle.num_cached, request.prompt_len)
        return True

    def _release(self, request: Request, num_tokens: int, *, publish: bool) -> None:
        assert request.handle is not None
        self.cache.release(
            request.handle, num_tokens, publish=publish, state_at=None if request.stale else request.planned
        )
        self.running.remove(request)
        self._free_slots.append(request.slot)
        self._freed.append(request.slot)


def _impatient(unsure: list[tuple[Request, Guide]], price: float | None) -> list[Request]:
    """Guided requests with a token under way that are planned all the same; the others wait until it is known.

    price: of waiting where nobody else runs, so that nothing overlaps if all wait; None if others do: it costs a step.
    """
    if price is not None and 2 * sum(guide.patience.pays(price) for _, guide in unsure) > len(unsure):
        return []
    return [request for request, guide in unsure if not guide.patience.pays(1.0)]
