"""The first rank's view of the others: starts a process a rank, gives each every step, and ends them.

Invariants: all ranks load at once; none outlives the first, whose end closes its connection; a rank or node that is
gone, or does not take a step in time, is EngineBroken, at the latest with the next step. Ranks of other nodes are
reached through their node, which joins this one.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as distributed

from .child_rank import ChildRank, wait_for_answers
from .config import EngineConfig
from .errors import EngineBroken, ModelLoadError
from .orders import packed, plain_works
from .rank import LoadedRank
from .ranks import LOOPBACK, Group, store_at
from .remote_node import RemoteNode
from .rendezvous import gather, listener
from .step_tensors import RowWork, StepTensors
from .weights import check_model


class RankGroup:
    """The first rank, and through it all of them; it has a `Rank`'s interface."""

    runs_ahead = False

    def __init__(self, config: EngineConfig) -> None:
        if config.node_rank != 0:
            raise ModelLoadError(
                f"node_rank is {config.node_rank}: the engine is on node 0, the others join it"
                " (`python -m llm_engine join`)"
            )
        check_model(Path(config.model_path), config.tensor_parallel_size)
        self._others: list[ChildRank | RemoteNode] = []
        self._nodes: list[RemoteNode] = []
        self._store_server: distributed.TCPStore | None = None
        self._fault = ""
        self._size = config.tensor_parallel_size
        try:
            if config.node_count > 1:
                self._nodes += [RemoteNode(node, link) for node, link in gather(config).items()]
                self._others += self._nodes
            address = self._nodes[0].here if self._nodes else LOOPBACK
            self._others.extend(ChildRank(config, rank, address) for rank in config.own_ranks[1:])
            self.loaded = LoadedRank(config, 0)
            wait_for_answers(self._others)
            # Only now, so that nobody waits in a collective for one who still loads.
            group = self._meet(config, address)
            self._rank = self.loaded.ready(group)
            wait_for_answers(self._others)
        except BaseException as error:
            self._fault = str(error) or type(error).__name__
            self.close()
            raise

    def lay_out(self, works: list[RowWork]) -> StepTensors:
        """A step's tensors on the first rank."""
        return self._rank.lay_out(works)

    def lay_out_after(self, works: list[RowWork], token_ids: torch.Tensor, rows: list[int]) -> StepTensors:
        """A `Rank`'s; not for several, which are told each step's tokens."""
        raise NotImplementedError

    def forward(self, step: StepTensors, *, give_up: Callable[[], bool] = lambda: False) -> torch.Tensor | None:
        """A step's logits, as a `Rank`'s; a step that others compute too is never given up."""
        with self._in_step():
            self._tell("step", plain_works(step.works), step.sample_rows.tolist())
            return self._rank.forward(step)

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that hold what is not finite, on all ranks."""
        with self._in_step():
            self._tell("clear", blocks)
            self._rank.clear(blocks)

    def watch(self, on_broken: Callable[[str], None]) -> None:
        """Calls back, from a thread of its own, when a rank or node ends that should not."""

        def broken(message: str) -> None:
            self._fault = self._fault or message
            self._dismiss()
            on_broken(message)

        for other in self._others:
            other.watch(broken)

    def close(self) -> None:
        """Ends the other ranks."""
        self._dismiss()
        for other in self._others:
            other.disconnect()
        for other in self._others:
            other.end()
        self._store_server = None

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Whatever fails here ends the engine: the others are in the same step, and would wait for this rank."""
        try:
            yield
        except Exception as error:
            self._fault = self._fault or str(error)
            if isinstance(error, EngineBroken):
                raise
            raise EngineBroken(f"rank 0 of {self._size} failed in a step of all: {error}") from error

    def _meet(self, config: EngineConfig, address: str) -> Group:
        """Tells all ranks where they find each other, and finds them there."""
        timeout = timedelta(seconds=config.collective_timeout_seconds)
        # A file that only this user can read: torch's store by TCP trusts everybody.
        with tempfile.TemporaryDirectory(prefix="tidegate-ranks-") as folder:
            place: str | tuple[str, int] = str(Path(folder) / "ranks")
            if self._nodes:
                self._store_server = _store_server(address)
                place = (address, self._store_server.port)
            self._tell("meet", place)
            return Group(
                store_at(place, config.tensor_parallel_size, timeout),
                0,
                column_counts=self.loaded.column_counts(),
                device=self.loaded.device,
                timeout=timeout,
                address=address,
            )

    def _dismiss(self) -> None:
        """Tells the other nodes that it ends here, and what went wrong, if anything did."""
        for node in self._nodes:
            node.dismiss(self._fault)

    def _tell(self, *words: object) -> None:
        order = packed(*words)
        for other in self._others:
            other.tell(order)


def _store_server(address: str) -> distributed.TCPStore:
    """Torch's store, which of itself would listen on all of the host's addresses."""
    listening = listener(address, 0)
    port = listening.getsockname()[1]
    return distributed.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
