"""When the tuner switches, and when it does not."""

from __future__ import annotations

from pando.cache.simulator.generate import generate
from pando.cache.simulator.models import preset
from pando.cache.simulator.replay import Replay, Setup
from pando.cache.tuner import Tuner


def feed(tuner: Tuner, count: int, **saved: float) -> bool:
    return any([tuner.observe(saved) for _ in range(count)])


def test_it_never_switches_before_a_window_is_full() -> None:
    tuner = Tuner(("a", "b"), window=40)
    assert not feed(tuner, 39, a=1, b=9) and tuner.choice == "a"


def test_a_lasting_gain_switches_and_a_small_one_does_not() -> None:
    tuner = Tuner(("a", "b"), window=40)
    assert not feed(tuner, 100, a=100, b=101.9)
    assert feed(tuner, 100, a=100, b=103) and tuner.choice == "b"


def test_a_gain_that_the_newer_half_does_not_confirm_is_chance() -> None:
    tuner = Tuner(("a", "b"), window=40)
    feed(tuner, 20, a=1, b=5)
    assert not feed(tuner, 20, a=1, b=1) and tuner.choice == "a"


def test_a_tuned_replay_keeps_its_books() -> None:
    trace = generate("swebench", 13, sessions=4)
    tuned = Replay(Setup(preset("hybrid-7b"), "tuned", "branch+last", 2e9, 1), trace)
    tuned._tuner = Tuner(("lru", "reuse", "gdsf:0.25"), window=16)
    report = tuned.run()
    tuned.cache.check()
    fixed = Replay(Setup(preset("hybrid-7b"), "lru", "branch+last", 2e9, 1), trace).run()
    assert report.requests == len(trace) and report.token_hit_rate > 0.9 * fixed.token_hit_rate
