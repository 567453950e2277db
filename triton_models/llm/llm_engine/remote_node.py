"""Another node as node 0 sees it: one connection, behind which that node hands on all orders to its own ranks."""

import contextlib
import threading
from collections.abc import Callable

from .errors import EngineBroken, ModelLoadError
from .link import Link

END = b""
"""Said before node 0 ends on purpose; the next message is the reason, empty where nothing went wrong."""


class RemoteNode:
    """It has a `ChildRank`'s interface, for all ranks of the node at once."""

    def __init__(self, node: int, link: Link) -> None:
        self.name = f"node {node} at {link.there}"
        self.connection = link.connection
        self.here = link.here
        """The address of this host that the node reaches."""
        self._link = link
        self._is_closing = False

    def take_answer(self) -> None:
        """Reads that all ranks have loaded, or are ready; ModelLoadError with their own words where one could not."""
        try:
            fault = self._link.hear().get("fault")
        except (EOFError, OSError, ValueError):
            raise ModelLoadError(f"{self.name} is gone, while it loaded") from None
        if fault:
            raise ModelLoadError(f"{self.name}: {fault}")

    def tell(self, order: bytes) -> None:
        """Hands over a step or another order."""
        try:
            self._link.send(order)
        except OSError as error:
            raise EngineBroken(f"{self.name} is gone: {error}") from error

    def watch(self, on_broken: Callable[[str], None]) -> None:
        """Calls back when the node or one of its ranks ends, unless it was told to."""

        def wait_for_end() -> None:
            try:
                fate = f"{self.name}: {self._link.hear().get('fault')}"
            except (EOFError, OSError, ValueError):
                fate = f"{self.name} is gone"
            if not self._is_closing:
                on_broken(fate)

        threading.Thread(target=wait_for_end, name=f"{self.name}-watch", daemon=True).start()

    def dismiss(self, reason: str) -> None:
        """Lets the node end, and tells it why; empty where nothing is wrong."""
        if self._is_closing:
            return
        self._is_closing = True
        with contextlib.suppress(OSError):
            self._link.send(END)
            self._link.send(reason.encode())

    def disconnect(self) -> None:
        """Ends the connection."""
        self._link.close()

    def end(self) -> None:
        """Does not wait: the node ends its own processes."""
