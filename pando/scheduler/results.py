"""Turns the results of a step into tokens of requests, finishes and replies."""

from __future__ import annotations

import logging

import msgspec

from pando.core.batch import StepResult
from pando.core.messages import Failure, Finish, Output, Reply, TokenLogprobs
from pando.errors import GrammarFailed, PandoError, StepFailed
from pando.scheduler.admission import Admission, Plan
from pando.scheduler.guide import Guide
from pando.scheduler.request import Request, State
from pando.scheduler.stats import Stats

_log = logging.getLogger(__name__)

FIRST_PRICE = 0.1
PRICE_PER_ROW = 0.02
MAX_PRICE = 0.5
"""What a draft costs beside a token's share of its step: little while a step's time is the reading of weights, more the
more rows share them. Measured on two cores: 0.12 of a step for one stream, 0.35 for sixteen."""

_LENGTH = Finish("length")
_COMPLETE = Finish("stop")


class Results:
    """Applies step results to the requests and collects the replies of one loop iteration."""

    def __init__(self, admission: Admission, stats: Stats, requests: dict[str, Request]) -> None:
        self._admission = admission
        self._stats = stats
        self._requests = requests
        self.replies: list[Reply] = []
        self._price = FIRST_PRICE
        """Of a draft, in terms of a token won; see `Drafter.propose`."""

    def commit(self, plan: Plan, result: StepResult) -> None:
        """Append the step's tokens to their requests. Rows of requests that ended meanwhile are discarded."""
        tokens = iter(result.tokens)
        self._price = min(MAX_PRICE, FIRST_PRICE + PRICE_PER_ROW * len(plan.rows))
        plain = not (result.failed or result.prompt_logprobs)
        at = -1
        for row, (request, emit) in enumerate(zip(plan.rows, plan.batch.emit, strict=True)):
            new: list[int] = []
            if emit:
                at += 1
                new = next(tokens)
            if request.state is State.DONE:
                continue
            try:
                if plain or self._commit_extras(request, row, plan, result):
                    if emit:
                        self._commit_tokens(request, new, result.logprobs.get(at))
                    elif request.known == request.limit == plan.batch.start[row] + plan.batch.num_tokens[row]:
                        self._finish(request, _LENGTH)  # prefill only: its last position has run
            except GrammarFailed as error:
                self.fail(request, error)
            except Exception as error:  # a broken invariant ends this request, not the engine
                _log.exception("request %s failed in commit", request.rid)
                self.fail(request, StepFailed(f"internal error while committing a step: {error!r}"))

    def _commit_extras(self, request: Request, row: int, plan: Plan, result: StepResult) -> bool:
        """Prompt logprobs and failures of a row; False if it failed."""
        if row in result.failed:
            self._admission.cache.invalidate()
            self.fail(request, StepFailed(result.failed[row]))
            return False
        if row in result.prompt_logprobs and not request.prompt_logprobs_done:
            _take_prompt_logprobs(request, plan.batch.start[row], result.prompt_logprobs[row])
        return True

    def _commit_tokens(self, request: Request, new: list[int], logprobs: list[TokenLogprobs] | None) -> None:
        request.on_trial = False
        request.prompt_logprobs_done = True
        if request.void:
            request.void -= 1
            return
        request.pending -= 1
        if request.in_doubt:
            self._settle_drafts(request, len(new))
        finish = self._append(request, new, logprobs)
        request.written = request.known
        if finish is None and request.guide is not None:
            finish = self._follow_guide(request, request.guide)
            settled = not request.pending and not request.void and request.state is State.RUNNING
            if finish is None and settled:
                request.drafts = request.guide.draft(request.key, request.limit - request.known - 1, self._price)
        if finish is not None:
            self._finish(request, finish)
        elif request.stream:
            self.replies.append(_output(request, None))

    def _settle_drafts(self, request: Request, num_right: int) -> None:
        """A step with drafts came back with `num_right` tokens, the last of which is no draft: go on behind them."""
        request.in_doubt = False
        self._admission.settle(request, num_right - 1)
        self._stats.draft_tokens += len(request.drafts)
        self._stats.accepted_draft_tokens += num_right - 1
        if request.guide is not None:
            request.guide.judge(num_right - 1)
        request.drafts = []

    def begin(self, request: Request) -> bool:
        """A guided request is ready: what its output must begin with goes with its prompt. True if that is all."""
        finish = None if request.guide is None else self._follow_guide(request, request.guide)
        if finish is not None:
            self._finish(request, finish)
        return finish is not None

    def _follow_guide(self, request: Request, guide: Guide) -> Finish | None:
        """Append the tokens that must come next; what is under way in their place is void."""
        forced = guide.take_forced(request.limit - request.known)
        guide.patience.forced(len(forced))
        if forced:
            request.void, request.pending = request.void + request.pending, 0
            self._stats.forced_tokens += len(forced)
            finish = self._append(request, forced, None, follow=False)
            if finish is not None:
                return finish
        return _COMPLETE if guide.state.is_finished() else None

    def _append(
        self, request: Request, new: list[int], logprobs: list[TokenLogprobs] | None, *, follow: bool = True
    ) -> Finish | None:
        """Add tokens one by one until one of them ends the sequence; later ones are dropped.

        follow: the request's guide has not seen them.
        """
        guide = request.guide if follow else None
        for i, token in enumerate(new):
            if guide is not None and token not in request.end_ids:
                guide.accept(token)
            request.key.append(token)
            request.known = known = request.known + 1
            request.out_tokens.append(token)
            if logprobs is not None:
                request.out_logprobs.append(logprobs[i])
            self._stats.generation_tokens += 1
            if token in request.end_ids or request.stop is not None:
                matched: int | str | None = token if token in request.end_ids else None
                if matched is None and request.stop is not None:
                    matched = request.stop.push([token])
                if matched is not None and known - request.prompt_len >= request.sampling.min_new_tokens:
                    return Finish("stop", matched)
            if known >= request.limit:
                return _LENGTH
            if guide is not None and i + 1 < len(new) and guide.state.is_finished():
                return _COMPLETE  # by a draft; without drafts the end token behind it would not have been sampled
        return None

    def _finish(self, request: Request, finish: Finish) -> None:
        self._admission.finish(request, publish=True)
        del self._requests[request.rid]
        self._stats.finished[finish.kind] += 1
        if request.guide is not None and request.guide.relaxed:
            finish = msgspec.structs.replace(finish, relaxed=request.guide.relaxed)
        self.replies.append(_output(request, finish))

    def abort(self, request: Request, error: PandoError) -> None:
        """End a request from outside: tokens so far are sent with an abort finish; its computed prefix is kept."""
        self._admission.finish(request, publish=True)
        del self._requests[request.rid]
        self._stats.finished["abort"] += 1
        finish = Finish("abort", message=error.message, error_code=error.code)
        self.replies.append(_output(request, finish))

    def fail(self, request: Request, error: PandoError) -> None:
        """End a request with an error; nothing it computed is kept."""
        self._admission.finish(request, publish=False)
        del self._requests[request.rid]
        self._stats.finished["error"] += 1
        self.replies.append(Failure(rid=request.rid, code=error.code, message=error.message, param=error.param))


def _take_prompt_logprobs(request: Request, start: int, entries: list[TokenLogprobs]) -> None:
    """Log-probabilities read by a row from position `start` on; what a run before a retraction read is replaced."""
    assert request.logprobs is not None
    wanted = request.logprobs.start
    first = 0 if start == wanted == 0 else max(start + 1, wanted)
    del request.prompt_logprobs[first - wanted :]
    request.prompt_logprobs.extend(entries)


def _output(request: Request, finish: Finish | None) -> Output:
    """The reply with all tokens not yet sent."""
    tokens, request.out_tokens = request.out_tokens, []
    if request.logprobs is None:
        return Output(
            rid=request.rid,
            token_ids=tokens,
            prompt_tokens=request.prompt_len,
            cached_tokens=request.cached_tokens,
            completion_tokens=request.known - request.prompt_len,
            finish=finish,
        )
    logprobs, request.out_logprobs = request.out_logprobs, []
    prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, []
    return Output(
        rid=request.rid,
        token_ids=tokens,
        prompt_tokens=request.prompt_len,
        cached_tokens=request.cached_tokens,
        completion_tokens=request.known - request.prompt_len,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish=finish,
    )
