"""How the nodes of an engine find each other: node 0 listens, the others come and say what they have.

Invariants: nobody is let in whose settings or model differ; no wait is longer than `join_timeout_seconds`, and an
error after it names who is missing. Whoever reaches the port can join: it belongs into a network of the nodes' own.
"""

import logging
import socket
import time
from multiprocessing.connection import wait
from typing import Any

from .agreement import agreement, differences
from .config import EngineConfig
from .errors import ModelLoadError
from .link import Link

HELLO_SECONDS = 5.0
"""How long who connects may take to say who it is, and a connection to come about."""

RETRY_SECONDS = 0.2

_log = logging.getLogger("llm_engine.rendezvous")


def gather(config: EngineConfig) -> dict[int, Link]:
    """Node 0's links to all others, by their ranks; ModelLoadError names those that have not come in time."""
    meeting = _Gathering(config)
    deadline = time.monotonic() + config.join_timeout_seconds
    with listener(config.master_address, config.master_port) as listening:
        # Who connects may be gone again before it is accepted.
        listening.settimeout(HELLO_SECONDS)
        while meeting.missing and (seconds := deadline - time.monotonic()) > 0:
            meeting.attend(listening, seconds)
    meeting.end()
    return meeting.links


def join(config: EngineConfig) -> Link:
    """Another node's link to node 0, once all nodes are there; ModelLoadError says why there is none."""
    hello = {"node_rank": config.node_rank, "agreement": agreement(config)}
    deadline = time.monotonic() + config.join_timeout_seconds
    while True:
        try:
            return _joined(config, hello, deadline)
        except (OSError, EOFError, ValueError) as error:
            # Node 0 may not be there yet, or be about to end and to come again.
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise ModelLoadError(
                    f"node {config.node_rank} has not found node 0 at {config.master_address}:{config.master_port}"
                    f" within {config.join_timeout_seconds:g} s: {error or 'it went away'}"
                ) from error
        time.sleep(RETRY_SECONDS)


def listener(address: str, port: int) -> socket.socket:
    """A socket that listens on one address of this host; port 0 is any."""
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family)
    except OSError as error:
        raise ModelLoadError(
            f"node 0 cannot listen on {address}:{port} (master_address, master_port): {error}"
        ) from error


class _Gathering:
    """Who has come to node 0."""

    def __init__(self, config: EngineConfig) -> None:
        self.links: dict[int, Link] = {}
        self._config = config
        self._agreement = agreement(config)
        self._refusals: dict[int, str] = {}

    @property
    def missing(self) -> list[int]:
        """The ranks of nodes that have not come."""
        return [node for node in range(1, self._config.node_count) if node not in self.links]

    def attend(self, listening: socket.socket, seconds: float) -> None:
        """Waits for the next that comes, or goes again."""
        nodes = {link.connection: node for node, link in self.links.items()}
        for ready in wait([listening, *nodes], seconds):
            if ready is listening:
                self._meet(listening)
            else:
                # Nobody has anything to say before all are there.
                self.links.pop(nodes[ready]).close()

    def end(self) -> None:
        """Tells all who have come that all are there, or that they are not."""
        fault = self._fault()
        for link in self.links.values():
            try:
                link.say(fault=fault)
            except OSError:
                _log.warning("a node at %s left while the others came", link.there)
            if fault:
                link.close()
        if fault:
            raise ModelLoadError(fault)

    def _meet(self, listening: socket.socket) -> None:
        try:
            link = Link(listening.accept()[0])
        except OSError as error:
            _log.warning("somebody connected, and was gone: %s", error)
            return
        try:
            hello = link.hear_within(HELLO_SECONDS)
            fault = self._refusal(hello)
            if not fault:
                self.links[hello["node_rank"]] = link
                return
            _log.warning("refused a node at %s: %s", link.there, fault)
            link.say(fault=fault)
        except (OSError, EOFError, ValueError) as error:
            _log.warning("%s connected and is no node: %s", link.there, error)
        link.close()

    def _refusal(self, hello: dict[str, Any]) -> str:
        """Why somebody cannot be let in; empty where it can."""
        node, theirs = hello.get("node_rank"), hello.get("agreement")
        if type(node) is not int or not isinstance(theirs, dict):
            raise ValueError("it does not say what it has")
        fault = differences(theirs, self._agreement)
        if not fault and not 0 < node < self._config.node_count:
            fault = f"node_rank is {node}, expected from 1 to {self._config.node_count - 1}"
        if not fault and node in self.links:
            fault = f"node {node} is there already, from {self.links[node].there}"
        if fault:
            self._refusals[node] = fault
        return fault and f"node {node} was refused: {fault}"

    def _fault(self) -> str:
        if not self.missing:
            return ""
        seconds = f"{self._config.join_timeout_seconds:g} s"
        told = (f" ({self._refusals[node]})" if node in self._refusals else "" for node in self.missing)
        nodes = ", ".join(f"node {node}{why}" for node, why in zip(self.missing, told, strict=True))
        return f"of {self._config.node_count} nodes did not join within {seconds} (join_timeout_seconds): {nodes}"


def _joined(config: EngineConfig, hello: dict[str, object], deadline: float) -> Link:
    """One attempt."""
    connected = socket.create_connection((config.master_address, config.master_port), HELLO_SECONDS)
    link = Link(connected)
    try:
        # On one host, who connects often enough to a port that nobody listens on reaches itself.
        if connected.getsockname() == connected.getpeername():
            raise OSError("nobody listens")
        link.say(**hello)
        if not link.connection.poll(max(0.0, deadline - time.monotonic()) + HELLO_SECONDS):
            raise OSError("it does not say that all nodes are there")
        fault = link.hear().get("fault", "")
    except BaseException:
        link.close()
        raise
    if fault:
        link.close()
        raise ModelLoadError(f"node 0 at {config.master_address}:{config.master_port}: {fault}")
    return link
