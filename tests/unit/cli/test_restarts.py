"""When a process is started again."""

import pytest

from tidegate.cli.restarts import (
    ATTEMPTS_BEFORE_READY,
    LONGEST_DELAY_SECONDS,
    GiveUp,
    Restart,
    RestartPolicy,
    describe_exit,
)


def delays(policy, count, *, ran_seconds=1.0):
    decisions = [policy.after_exit(exit_code=-9, ran_seconds=ran_seconds, was_ready=True) for _ in range(count)]
    return [decision.delay_seconds for decision in decisions]


def test_each_crash_in_a_row_waits_longer_up_to_a_bound():
    assert delays(RestartPolicy(), 6) == pytest.approx(
        [0.2, 0.8, 3.2, 12.8, LONGEST_DELAY_SECONDS, LONGEST_DELAY_SECONDS]
    )


def test_a_process_that_ran_for_long_has_recovered():
    policy = RestartPolicy()
    delays(policy, 4)
    assert delays(policy, 1, ran_seconds=31) == pytest.approx([0.2])


def test_one_that_never_was_ready_is_given_up_after_a_few_attempts():
    policy = RestartPolicy()
    decisions = [policy.after_exit(exit_code=1, ran_seconds=0.1, was_ready=False) for _ in range(ATTEMPTS_BEFORE_READY)]
    assert [type(decision) for decision in decisions] == [Restart, Restart, GiveUp]


def test_wrong_settings_are_given_up_at_once():
    decision = RestartPolicy().after_exit(exit_code=2, ran_seconds=0.1, was_ready=False)
    assert decision == GiveUp("its settings are wrong")


def test_one_that_was_ready_is_never_given_up():
    policy = RestartPolicy()
    assert all(isinstance(policy.after_exit(exit_code=2, ran_seconds=0.1, was_ready=True), Restart) for _ in range(50))


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "killed by SIGKILL"), (-70, "killed by signal 70")],
)
def test_an_exit_is_told_in_words(exit_code, words):
    assert describe_exit(exit_code) == words


def test_a_process_that_crashes_without_end_is_started_again_without_end():
    assert delays(RestartPolicy(), 600)[-1] == LONGEST_DELAY_SECONDS
