"""What clients do after a no."""

from __future__ import annotations

import pytest

from tidegate.bench.ledger import Attempt, Ending
from tidegate.bench.retries import attempt_patience, next_delay


def attempt(ending: Ending, retry_after: float | None = None) -> Attempt:
    return Attempt(due=0, sent=0, ended=1, ending=ending, retry_after_seconds=retry_after)


@pytest.mark.parametrize("ending", [Ending.REFUSED, Ending.FAILED, Ending.DEADLINE_EXCEEDED])
def test_a_naive_client_comes_back_three_times_at_once(ending):
    assert [next_delay("naive", attempt(ending, 9), made, 5) for made in (1, 2, 3, 4)] == [0, 0, 0, None]


def test_an_obedient_client_waits_as_it_was_told_and_only_if_that_makes_sense():
    assert next_delay("obedient", attempt(Ending.REFUSED, 2), 1, 5) == 2
    assert next_delay("obedient", attempt(Ending.REFUSED, 2), 1, 1) is None
    assert next_delay("obedient", attempt(Ending.REFUSED), 1, 5) is None
    assert next_delay("obedient", attempt(Ending.FAILED, 2), 1, 5) is None
    assert next_delay("obedient", attempt(Ending.REFUSED, 0.1), 6, 5) is None


@pytest.mark.parametrize("policy", ["none", "naive", "obedient"])
@pytest.mark.parametrize("ending", [Ending.COMPLETED, Ending.LEFT])
def test_nobody_comes_back_after_an_answer_or_after_leaving(policy, ending):
    assert next_delay(policy, attempt(ending, 0.1), 1, 5) is None


def test_only_a_naive_client_gives_a_retry_its_full_patience():
    assert attempt_patience("naive", 1, 2.0, -1.0) == 2
    assert attempt_patience("naive", 0, 2.0, 1.5) == 1.5
    assert attempt_patience("obedient", 1, 2.0, 0.5) == 0.5
