"""The simulator finds what the engine finds: several conversations of a recurrent model in a pool too small for all."""

from __future__ import annotations

import random

import pytest
import torch

from pando.cache.manager import CacheManager
from pando.cache.profile import FlopProfile
from pando.cache.simulator.models import SimulatedModel
from pando.cache.simulator.replay import Replay, Setup, layout_of
from pando.cache.simulator.traces import TraceRequest
from tests.engine.tiny_engine import tiny_engine, tiny_model
from tests.tiny_models import prompt_ids

FAMILY = "qwen3_5"
NEW = 6


@pytest.mark.parametrize("policy", ["reuse", "lru"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_hit_tokens_agree(policy: str, page_size: int) -> None:
    torch.set_num_threads(1)
    plan = tiny_model(FAMILY, "auto").cache_plan
    budget = 250 * plan.bytes_per_token + 10 * plan.bytes_per_state
    layout = layout_of(plan, page_size)
    cache = CacheManager(layout, budget, num_slots=[640 // page_size, 24], policy=policy)
    engine = tiny_engine(FAMILY, page_size=page_size, num_states=24, num_tokens=640, cache=cache)

    rng = random.Random(page_size)
    sessions = {session: prompt_ids(20, seed=100 + session % 3) for session in range(9)}
    trace: list[TraceRequest] = []
    hits = 0
    for number in range(70):
        session = min(rng.randrange(9), rng.randrange(9))
        prompt = sessions[session] + prompt_ids(rng.randrange(3, 12), seed=1000 + number)
        if len(prompt) + NEW > 150:
            sessions[session] = prompt_ids(20, seed=100 + session % 3)
            continue
        rid = str(number)
        engine.add(rid, prompt, NEW, ignore_eos=True)
        engine.run()
        hits += engine.ended[rid].cached_tokens
        sessions[session] = prompt + engine.tokens[rid]
        # The engine never runs the last token it sampled, so nothing of it is left behind.
        trace.append(TraceRequest.of(0.0, prompt, engine.tokens[rid][:-1]))

    simulated = SimulatedModel("tiny", plan, FlopProfile.of([]))
    replay = Replay(Setup(simulated, policy, "branch+last", float(budget), page_size), trace)  # type: ignore[arg-type]
    total = sum(request.prompt_len for request in trace)
    found = sum(replay.serve(request) for request in trace)
    assert sum(cache.eviction.evicted) > 0 and 0.2 < hits / total < 0.95
    assert abs(hits - found) / total <= 0.02, (hits / total, found / total)
