"""Answers to control commands: info, stats, flush_cache, pause, resume, shutdown."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pando.cache.handle import SlotStats
from pando.core.messages import Control, ControlReply
from pando.errors import InvalidRequest

if TYPE_CHECKING:
    from pando.scheduler.scheduler import Scheduler

_NO_SLOTS = SlotStats(0, 0, 0, 0, 0)


class Controls:
    """One method per command name; the result is a flat dict."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._commands = {
            "info": self.info,
            "stats": self.stats,
            "flush_cache": self.flush_cache,
            "pause": self.pause,
            "resume": self.resume,
            "shutdown": self.shutdown,
        }

    def answer(self, command: Control) -> ControlReply:
        """Run the command; an unknown name raises InvalidRequest."""
        action = self._commands.get(command.name)
        if action is None:
            raise InvalidRequest(f"unknown control {command.name!r}; known: {', '.join(sorted(self._commands))}")
        return ControlReply(command.call_id, action())

    def info(self) -> dict[str, Any]:
        """What is served and its bounds."""
        return self._scheduler.rules.info

    def stats(self) -> dict[str, float]:
        """Counters and gauges under the names of `/metrics`, without prefix."""
        scheduler, stats = self._scheduler, self._scheduler.stats
        admission = scheduler.admission
        cache = admission.cache.stats()
        states = cache.by_component.get("state", _NO_SLOTS)
        page = admission.limits.page_size
        return {
            "requests_total": stats.requests,
            "prompt_tokens_total": stats.hit_tokens + stats.miss_tokens,
            "cached_tokens_total": stats.hit_tokens,
            "computed_prompt_tokens_total": stats.miss_tokens,
            "recomputed_tokens_total": stats.recomputed_tokens,
            "generation_tokens_total": stats.generation_tokens,
            "forced_tokens_total": stats.forced_tokens,
            "draft_tokens_total": stats.draft_tokens,
            "accepted_draft_tokens_total": stats.accepted_draft_tokens,
            **{f"finished_{kind}_total": count for kind, count in stats.finished.items()},
            "retracted_total": admission.num_retracted,
            "evicted_tokens_total": cache.evicted_tokens,
            "steps_total": stats.steps,
            "failed_steps_total": stats.failed_steps,
            "step_tokens_total": stats.step_tokens,
            "step_seconds_total": stats.step_seconds,
            "forward_seconds_total": stats.forward_seconds,
            "device_seconds_total": stats.device_seconds,
            "uptime_seconds": time.monotonic() - stats.started,
            "num_running": len(admission.running),
            "num_waiting": len(admission.waiting),
            "num_gated": scheduler.num_gated,
            "kv_tokens_total": cache.num_pages * page,
            "kv_tokens_used": (cache.num_pages - cache.num_free) * page,
            "kv_tokens_held": cache.num_held_tokens,
            "kv_tokens_evictable": cache.num_evictable * page,
            "states_total": states.num_slots,
            "states_used": states.num_slots - states.num_free,
            "states_evictable": states.num_evictable,
            "paused": int(scheduler.paused),
        }

    def flush_cache(self) -> dict[str, Any]:
        """Drop every cached prefix; refused while requests run."""
        if self._scheduler.num_unfinished:
            raise InvalidRequest(
                f"{self._scheduler.num_unfinished} requests are running or waiting; flush when they have ended"
            )
        self._scheduler.admission.cache.flush()
        return {"flushed": True}

    def pause(self) -> dict[str, Any]:
        """Plan no steps until `resume`; requests keep their places."""
        self._scheduler.paused = True
        return {"paused": True}

    def resume(self) -> dict[str, Any]:
        """Go on after `pause`."""
        self._scheduler.paused = False
        return {"paused": False}

    def shutdown(self) -> dict[str, Any]:
        """Abort everything and end the loop."""
        self._scheduler.stop()
        return {"stopping": True}
