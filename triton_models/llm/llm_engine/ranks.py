"""The collectives of tensor parallelism: sums over all ranks, and columns joined on the first.

Invariants: no wait is longer than the time-out; whatever goes wrong in a collective is EngineBroken, or on a GPU
the process's end. On CPUs it is gloo, on GPUs NCCL.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as distributed
import torch.nn.functional as F

from .errors import EngineBroken

LOOPBACK = "127.0.0.1"
Result = TypeVar("Result")


class Alone:
    """The only rank: sums and joins are what it has."""

    size = 1

    def add_up(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' rows."""
        return rows

    def joined(self, columns: torch.Tensor) -> torch.Tensor:
        """All ranks' columns, side by side."""
        return columns


class Group:
    """One of several ranks; building it waits for the others.

    Args:
        store: where the ranks find each other.
        column_counts: each rank's columns in what is joined.
        timeout: the bound on a collective, which is how long the slowest rank may be behind.
        address: where this rank listens for the others, which gloo does.
    """

    def __init__(
        self,
        store: distributed.Store,
        rank: int,
        *,
        column_counts: list[int],
        device: torch.device,
        timeout: timedelta,
        address: str = LOOPBACK,
    ) -> None:
        self.rank, self.size = rank, len(column_counts)
        self._column_counts = column_counts
        self._timeout = timeout
        self._is_on_gpu = device.type == "cuda"
        self._group = self._guarded(lambda: _backend(store, rank, self.size, device, timeout, address))
        # NCCL's ranks meet with their first collective; after it nobody needs the store.
        self.add_up(torch.zeros(1, device=device))

    def add_up(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' rows, on every rank."""
        summed = rows.contiguous()
        self._guarded(lambda: self._wait(self._group.allreduce([summed])))
        return summed

    def joined(self, columns: torch.Tensor) -> torch.Tensor:
        """All ranks' columns side by side, on the first rank; the others get their own back."""
        widest = max(self._column_counts)
        padded = F.pad(columns, (0, widest - columns.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else []
        options = distributed.GatherOptions()
        options.rootRank = 0
        self._guarded(lambda: self._wait(self._group.gather([parts] if parts else [], [padded], options)))
        if not parts:
            return columns
        return torch.cat([part[:, :count] for part, count in zip(parts, self._column_counts, strict=True)], dim=1)

    def _wait(self, work: distributed.Work) -> None:
        """Until it is done: on a GPU its stream waits alone, and NCCL's watchdog ends the process at the time-out.

        Given a time, NCCL's work would make the host wait, which is to lay out the next step meanwhile
        (`ProcessGroupNCCL::WorkNCCL::wait` in PyTorch).
        """
        if self._is_on_gpu:
            work.wait()
        else:
            work.wait(self._timeout)

    def _guarded(self, collective: Callable[[], Result]) -> Result:
        try:
            return collective()
        except RuntimeError as error:
            raise EngineBroken(f"rank {self.rank} of {self.size} lost the others: {error}") from error


def store_at(place: str | tuple[str, int], size: int, timeout: timedelta) -> distributed.Store:
    """Where ranks find each other: a file of one host, or the address and port of node 0's store."""
    store = (
        distributed.FileStore(place, size)
        if isinstance(place, str)
        else distributed.TCPStore(*place, size, is_master=False, timeout=timeout, wait_for_workers=False)
    )
    store.set_timeout(timeout)
    return store


def _backend(
    store: distributed.Store, rank: int, size: int, device: torch.device, timeout: timedelta, address: str
) -> distributed.Backend:
    """A group of its own: torch's global one would be shared by all engines of a process."""
    if device.type == "cuda":
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return distributed.ProcessGroupNCCL(store, rank, size, options)
    options = distributed.ProcessGroupGloo._Options()
    options._timeout = timeout
    # Gloo would otherwise listen where the host's name points to.
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname=address)]
    return distributed.ProcessGroupGloo(store, rank, size, options)
