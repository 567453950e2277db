from __future__ import annotations

from tidegate.scheduler.circuit import Circuit


def test_some_failures_in_a_row_open_it_for_a_pause():
    circuit = Circuit(failure_limit=3, pause_seconds=1)
    circuit.fail("x", 0)
    circuit.fail("x", 0)
    assert not circuit.is_open(0)
    circuit.fail("x", 0)
    assert circuit.is_open(0.9)
    assert not circuit.is_open(1.0)
    assert circuit.last_error == "x"


def test_a_success_between_them_begins_the_count_anew():
    circuit = Circuit(failure_limit=2, pause_seconds=1)
    circuit.fail("x", 0)
    circuit.succeed()
    circuit.fail("x", 0)
    assert not circuit.is_open(0)


def test_after_the_pause_one_failure_opens_it_again():
    circuit = Circuit(failure_limit=2, pause_seconds=1)
    circuit.fail("x", 0)
    circuit.fail("x", 0)
    circuit.fail("y", 2)
    assert circuit.is_open(2.5)
    circuit.succeed()
    circuit.fail("z", 4)
    assert not circuit.is_open(4)
