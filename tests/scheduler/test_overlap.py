"""What waiting for a step costs, and when it pays."""

from __future__ import annotations

import pytest

from pando.scheduler.guide import Patience
from pando.scheduler.overlap import FIRST_PRICE, Overlap


@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize(("host", "forward", "price"), [(1.0, 10.0, 0.1), (3.0, 4.0, 0.75), (5.0, 2.0, 1.0)])
def test_the_price_is_the_hosts_share_of_a_step(host: float, forward: float, price: float, overlapped: bool) -> None:
    overlap = Overlap()
    assert overlap.price == FIRST_PRICE
    overlap.stepped(50.0, 10.0, overlapped=False)
    for _ in range(200):
        if overlapped:
            overlap.stepped(max(host, forward), max(0.0, forward - host), overlapped=True)
        else:
            overlap.stepped(host, 0.0, overlapped=False)
            overlap.stepped(forward, forward, overlapped=False)
    assert overlap.price == pytest.approx(price, rel=0.1)


def test_waiting_pays_for_forced_runs_and_drafts_only() -> None:
    free, forced, drafted = Patience(drafts=True), Patience(drafts=False), Patience(drafts=True)
    for _ in range(60):
        free.forced(0)
        free.drafted(0)
        forced.forced(3)
        drafted.forced(0)
        drafted.drafted(3)
    assert [patience.pays(0.2) for patience in (free, forced, drafted)] == [False, True, True]
    assert [patience.pays(1.0) for patience in (free, forced, drafted)] == [False, False, True]


def test_a_request_that_does_not_wait_tries_again() -> None:
    patience = Patience(drafts=True)
    for _ in range(60):
        patience.drafted(0)
        patience.forced(1)
    before = patience._drafts
    for _ in range(400):
        patience.forced(1)
    assert before < 0.5 < 1.2 < patience._drafts
