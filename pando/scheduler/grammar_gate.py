"""The admission gate that compiles a request's grammar while others run, and gives the request its guide."""

from __future__ import annotations

from pando.errors import PandoError
from pando.grammar.manager import GrammarManager
from pando.grammar.wrappers import ReasoningWrap
from pando.scheduler.guide import Guide
from pando.scheduler.ngram import NgramDrafter
from pando.scheduler.request import Request

MAX_AHEAD = 4
"""Requests whose prompts are read while their grammars compile; they hold slots and pages for so long."""
MIN_AHEAD_TOKENS = 128
"""Prompts shorter than this wait: their last token would take a step of its own."""


class GrammarGate:
    """Implements `pando.scheduler.gates.Gate` over a grammar manager. jump, draft: see `Guide`.

    wrap: puts what may come before a grammar in front of its state; None where no request asks for that.
    """

    def __init__(
        self, manager: GrammarManager, *, jump: bool = True, draft: bool = True, wrap: ReasoningWrap | None = None
    ) -> None:
        self._manager = manager
        self._wrap = wrap
        self._jump = jump
        self._draft = draft
        self._held: dict[str, Request] = {}
        self._ahead: set[str] = set()
        """Of those, the ids of requests whose prompts are being read."""

    def wants(self, request: Request) -> bool:
        """True if the request's output must match something."""
        return request.sampling.grammar is not None

    def submit(self, request: Request) -> None:
        """Have the grammar compiled."""
        assert request.sampling.grammar is not None
        self._held[request.rid] = request
        self._manager.submit(request.rid, request.sampling.grammar)

    def poll(self) -> list[tuple[Request, PandoError | None]]:
        """Requests whose grammar is there, or can not be; and such as need not wait for it yet."""
        ended: list[tuple[Request, PandoError | None]] = []
        for rid, outcome in self._manager.poll():
            request = self._held.pop(rid)
            self._ahead.discard(rid)
            request.held = 0
            if isinstance(outcome, PandoError):
                ended.append((request, outcome))
                continue
            # A forced token's log-probability is only known if the model runs for it.
            plain = request.logprobs is not None
            drafter = NgramDrafter() if self._draft and not plain else None
            state, spec = outcome.new_state(), request.sampling.grammar
            if self._wrap is not None and spec is not None and spec.after is not None:
                state = self._wrap(state, spec.after)
            relaxed = tuple((issue.pointer, issue.message) for issue in outcome.relaxed)
            request.guide = Guide(state, jump=self._jump and not plain, drafter=drafter, relaxed=relaxed)
            ended.append((request, None))
        return ended + self._send_ahead() if self._held else ended

    def _send_ahead(self) -> list[tuple[Request, PandoError | None]]:
        """Requests with long prompts go on without their guides, up to the end of the prompt."""
        sent: list[tuple[Request, PandoError | None]] = []
        for rid, request in self._held.items():
            if len(self._ahead) >= MAX_AHEAD:
                break
            if rid not in self._ahead and request.prompt_len >= MIN_AHEAD_TOKENS:
                self._ahead.add(rid)
                request.held = 1
                sent.append((request, None))
        return sent

    def cancel(self, request: Request) -> None:
        """The request is gone."""
        self._ahead.discard(request.rid)
        if self._held.pop(request.rid, None) is not None:
            self._manager.cancel(request.rid)
