"""A node beside node 0: starts its ranks, hands on to them what node 0 says, and ends with it.

Invariants: none of its ranks outlives it; how it ends is decided by what node 0 says last, or by its silence.
"""

from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

from .child_rank import STOP_SECONDS, ChildRank, wait_for_answers
from .config import EngineConfig
from .errors import EngineBroken, ModelLoadError
from .link import Link
from .remote_node import END
from .rendezvous import join
from .weights import check_model


def serve_node(config: EngineConfig) -> None:
    """Serve until node 0 ends on purpose; EngineError names what was lost otherwise."""
    if config.node_rank == 0:
        raise ModelLoadError(f"node_rank is 0 of {config.node_count}: node 0 has the engine, and does not join")
    check_model(Path(config.model_path), config.tensor_parallel_size)
    first = _FirstNode(join(config), f"node 0 at {config.master_address}:{config.master_port}")
    ranks: list[ChildRank] = []
    try:
        ranks.extend(ChildRank(config, rank, first.link.here) for rank in config.own_ranks)
        _serve(first, ranks)
    except _Ended:
        return
    finally:
        first.link.close()
        for rank in ranks:
            rank.disconnect()
        for rank in ranks:
            rank.end()


class _Ended(Exception):
    """Node 0 has ended, and nothing is wrong."""


class _FirstNode:
    """Node 0, as another one sees it."""

    def __init__(self, link: Link, name: str) -> None:
        self.link, self.name, self.connection = link, name, link.connection

    def next_order(self) -> bytes:
        """What it says to the ranks; _Ended or EngineBroken where it ends."""
        try:
            order = self.connection.recv_bytes()
            reason = self.connection.recv_bytes().decode() if order == END else ""
        except (EOFError, OSError):
            raise EngineBroken(f"{self.name} is gone") from None
        if order != END:
            return order
        if reason:
            raise EngineBroken(f"{self.name} has ended: {reason}")
        raise _Ended

    def take_answer(self) -> None:
        """It says nothing while others load, unless it ends."""
        order = self.next_order()
        raise EngineBroken(f"{self.name} sent an order of {len(order)} bytes before the ranks were there")

    def report(self, fault: str) -> None:
        """Says how the ranks are; what node 0 itself says last is read later."""
        with suppress(OSError):
            self.link.say(fault=fault)


def _serve(first: _FirstNode, ranks: list[ChildRank]) -> None:
    _answer(first, ranks)
    # Where the ranks meet, which they do before they answer again.
    _hand_on(first.next_order(), ranks)
    _answer(first, ranks)
    watched = {rank.connection: rank for rank in ranks}
    while True:
        for ready in wait([first.connection, *watched]):
            if ready is first.connection:
                _hand_on(first.next_order(), ranks)
            else:
                _give_up(first, watched[ready].fate())


def _answer(first: _FirstNode, ranks: list[ChildRank]) -> None:
    """Tells node 0 once all ranks have loaded, or are ready."""
    try:
        wait_for_answers(ranks, unless=first)
    except ModelLoadError as error:
        first.report(str(error))
        raise
    first.report("")


def _hand_on(order: bytes, ranks: list[ChildRank]) -> None:
    for rank in ranks:
        # One that is gone is seen by its connection's end, one that hangs by node 0, which waits for its part.
        with suppress(EngineBroken):
            rank.tell(order)


def _give_up(first: _FirstNode, fate: str) -> None:
    """Reports a rank that ended, which may be for node 0's own sake, and hears what node 0 makes of it."""
    first.report(fate)
    while first.connection.poll(STOP_SECONDS):
        first.next_order()
    raise EngineBroken(fate)
