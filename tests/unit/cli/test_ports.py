"""Ports: which, whether free, and what is said when not."""

import socket

import pytest

from tidegate.cli import ports


@pytest.fixture
def taken_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_defaults_are_those_of_the_design():
    numbers = ports.assign(2, given={}, auto=False)
    assert (numbers["ingress"], numbers["scheduler"], numbers["model-1"], numbers["triton-1"]) == (
        8080,
        50051,
        50061,
        8011,
    )


def test_a_given_port_wins_over_default_and_over_auto():
    assert ports.assign(1, given={"admin": 9902}, auto=False)["admin"] == 9902
    assert ports.assign(1, given={"admin": 9902}, auto=True)["admin"] == 9902


def test_auto_gives_every_process_a_free_port_of_its_own():
    numbers = ports.assign(3, given={}, auto=True)
    assert numbers.keys() == ports.assign(3, given={}, auto=False).keys()
    assert len(set(numbers.values())) == len(numbers)
    ports.check_free("127.0.0.1", numbers)


def test_the_lite_models_replicas_have_ports_beside_the_others():
    numbers = ports.assign(1, 2, given={}, auto=False)
    names = ("model-lite-0", "model-lite-1", "triton-lite-0", "triton-lite-0-metrics", "triton-lite-1")
    assert tuple(numbers[name] for name in names) == (50061, 50062, 8003, 8004, 8011)
    assert len(set(numbers.values())) == len(numbers)


def test_schedulers_beside_the_first_have_ports_of_their_own():
    numbers = ports.assign(1, 0, 3, given={"scheduler-2": 9}, auto=False)
    names = [f"scheduler{number}{what}" for number in ("", "-1", "-2") for what in ("", "-metrics")]
    assert [numbers[name] for name in names] == [50051, 51051, 50041, 51041, 9, 51042]
    assert ports.scheduler_names(3) == ["scheduler", "scheduler-1", "scheduler-2"]
    with pytest.raises(ports.PortError, match="there is no port named 'scheduler-1'"):
        ports.assign(1, given={"scheduler-1": 9}, auto=False)


def test_two_processes_on_one_port_are_refused_by_name():
    with pytest.raises(ports.PortError, match="port 8081 is given to both mesh and admin"):
        ports.assign(1, given={"admin": 8081}, auto=False)


def test_a_name_that_no_process_has_is_refused():
    with pytest.raises(ports.PortError, match="there is no port named 'model-1'"):
        ports.assign(1, given={"model-1": 9}, auto=False)


def test_a_taken_port_is_told_in_one_line_with_its_flag(taken_port):
    with pytest.raises(ports.PortError) as raised:
        ports.check_free("127.0.0.1", {"admin": taken_port})
    message = str(raised.value)
    assert message.startswith(f"port {taken_port} (Envoy's admin page) is taken")
    assert message.endswith("choose another with --port-of admin=N, or --ports auto")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("pair", ["admin", "admin=", "admin=x", "admin=0", "admin=65536", "admin=-1"])
def test_a_pair_that_makes_no_sense_is_refused(pair):
    with pytest.raises(ports.PortError, match="must be NAME=PORT"):
        ports.parse_given([pair])


@pytest.mark.parametrize("count", [9, 32, 64])
def test_many_replicas_move_on_past_ports_that_are_given_already(count):
    numbers = ports.assign(count, given={}, auto=False)
    assert len(set(numbers.values())) == len(numbers)
    assert numbers == ports.assign(count, given={}, auto=False)
    assert (numbers["triton-8"], numbers["triton-8-metrics"]) == (8082, 8083)


def test_a_replica_moves_on_past_a_port_of_the_command_line():
    numbers = ports.assign(1, given={"ingress": 8001}, auto=False)
    assert (numbers["triton-0"], numbers["triton-0-metrics"]) == (8002, 8003)


@pytest.mark.parametrize(
    ("host", "listening", "asked"),
    [
        ("127.0.0.1", "127.0.0.1:80", "127.0.0.1:80"),
        ("0.0.0.0", "0.0.0.0:80", "127.0.0.1:80"),
        ("::1", "[::1]:80", "[::1]:80"),
        ("::", "[::]:80", "[::1]:80"),
        ("10.0.0.0", "10.0.0.0:80", "10.0.0.0:80"),
    ],
)
def test_what_listens_everywhere_is_asked_on_loopback(host, listening, asked):
    assert ports.address(host, 80) == listening
    assert ports.reachable(listening) == asked
